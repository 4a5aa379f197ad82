# Two commands set everything up: `make test` and `make demo`. Needed beforehand: Python 3.10 or newer, and make.
PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 4
DEMO_OUTPUT ?= demo-output
DEMO_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
DEPENDENCIES := $(VENV)/dependencies.stamp
export TOKENIZERS_PARALLELISM := false

.PHONY: test lint demo upstream clean install

$(DEPENDENCIES): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77"
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# strict, so that mypy finds the package; repeated each time, so that new files are seen
install: $(DEPENDENCIES)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --config-settings editable_mode=strict -e .

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# one thread per worker: two workers on two cores, no oversubscription
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

upstream: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/upstream/run.py

demo: install
	$(BIN)/python examples/demo.py --minutes $(MINUTES) --output $(DEMO_OUTPUT) $(DEMO_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .cache $(DEMO_OUTPUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis
