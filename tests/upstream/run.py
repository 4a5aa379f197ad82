"""Runs the test mixins of the installed transformers against our models: `python tests/upstream/run.py`.

The mixins are in the sdist of transformers (`tests/test_*.py`), not in its wheel. The sdist of the installed version
is downloaded once into `.cache/`; afterwards the run is offline. A temporary tree joins those files with small modules
of our own for what the sdist lacks, pytest runs in it, and the outcome is compared with the table in `skips.py`.

Exit status 0: no test failed, no table entry is stale, no test skipped itself for an unknown reason.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import skips
from skips import DISTRIBUTED_MODES


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".cache"
DOCS = ROOT / "docs" / "upstream_suite.md"

# Our file -> its place in the temporary tree.
PLACES = {
    "standin_distributed.py": "tests/distributed_testing_utils.py",
    "standin_generation.py": "tests/generation/test_utils.py",
    "standin_export.py": "tests/exporters/test_export.py",
    "standin_config_kwargs.py": "tests/utils/test_configuration_utils.py",
    "standin_pipelines.py": "tests/pipeline_checks.py",
    "standin_tester.py": "tests/causal_lm_tester.py",
    "suite_plugin.py": "conftest.py",
    "skips.py": "skips.py",
    "vanilla_cases.py": "tests/models/test_vanilla.py",
    "steady_routing.py": "tests/steady_routing.py",
    "mor_cases.py": "tests/models/test_mor.py",
    "mod_cases.py": "tests/models/test_mod.py",
    "jrt_cases.py": "tests/models/test_jrt.py",
}
INI = "[pytest]\naddopts = -p no:cacheprovider --disable-warnings\n"


def sdist(version: str) -> Path:
    """Path of the cached sdist of transformers `version`, downloaded when missing. Raises SystemExit without one."""
    target = CACHE / f"transformers-{version}.tar.gz"
    if target.is_file():
        return target
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        done = subprocess.run([*command, "--dest", folder, f"transformers=={version}"], check=False)
        found = list(Path(folder).glob("transformers-*.tar.gz"))
        if done.returncode or not found:
            raise SystemExit(
                f"The sdist of transformers {version} could not be downloaded; connect to a package index, or put "
                f"it at {target.relative_to(ROOT)}."
            )
        os.replace(found[0], target)
    return target


def build_tree(version: str, tree: Path) -> None:
    """Fills `tree` with the test files of the sdist and ours beside them."""
    with tarfile.open(sdist(version)) as archive:
        for member in archive.getmembers():
            match = re.fullmatch(r"transformers-[^/]+/(tests/test_\w+\.py)", member.name)
            source = archive.extractfile(member) if match else None
            if match and source:
                target = tree / match[1]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read())
    for name, place in PLACES.items():
        target = tree / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(HERE / name, target)
    add_pipeline_modules(tree / "tests")
    # The mixins load `src/transformers/__init__.py`; an empty file leaves the installed transformers in place.
    for folder in ("tests", "tests/generation", "tests/exporters", "tests/utils", "tests/models", "src/transformers"):
        (tree / folder).mkdir(parents=True, exist_ok=True)
        (tree / folder / "__init__.py").touch()
    (tree / "tests/utils/tiny_model_summary.json").write_text("{}")
    (tree / "pytest.ini").write_text(INI)


def add_pipeline_modules(tests: Path) -> None:
    """One module per pipeline task that the mixin names: our checks for text tasks, an empty class for the rest."""
    mixin = (tests / "test_pipeline_mixin.py").read_text(encoding="utf-8")
    ours = (HERE / "standin_pipelines.py").read_text(encoding="utf-8")
    folder = tests / "pipelines"
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").touch()
    for module, name in set(re.findall(r"pipelines\.(test_pipelines_\w+)(?:\.| import )(\w+)", mixin)):
        known = f"class {name}(" in ours
        text = f"from tests.pipeline_checks import {name}  # noqa: F401\n" if known else f"class {name}:\n    pass\n"
        (folder / f"{module}.py").write_text(text)


def run_pytest(tree: Path, report: Path, arguments: argparse.Namespace) -> int:
    """Runs pytest inside the tree, one thread per process, offline; returns its exit status."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VARIDEPTH_UPSTREAM_REPORT": str(report),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if arguments.everything:
        environment["VARIDEPTH_UPSTREAM_EVERYTHING"] = "1"
    command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "--rootdir", str(tree), "tests/models", "-q"]
    command += ["--timeout", "900", "--tb", "short", *arguments.pytest_arguments]
    if arguments.workers > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(arguments.workers)]
    if arguments.select:
        command += ["-k", arguments.select]
    return subprocess.run(command, cwd=tree, env=environment, check=False).returncode


def read_report(report: Path) -> list[dict[str, Any]]:
    """One record per test; a test with failing sub-tests counts as failed."""
    rank = {"passed": 0, "skipped": 1, "xpassed": 2, "xfailed": 3, "failed": 4}
    tests: dict[str, dict[str, Any]] = {}
    for line in report.read_text(encoding="utf-8").splitlines() if report.exists() else []:
        record = json.loads(line)
        known = tests.get(record["id"])
        if known is None or rank[record["outcome"]] >= rank[known["outcome"]]:
            tests[record["id"]] = record
    return list(tests.values())


def judge(tests: list[dict[str, Any]], version: str) -> tuple[dict[str, Counter], dict[str, dict], list[str]]:
    """Counts per mode, the reasons of everything that did not pass, and the problems that make the run fail."""
    counts: dict[str, Counter] = defaultdict(Counter)
    reasons: dict[str, dict[tuple[str, str], set[str]]] = {
        "listed": defaultdict(set),
        "itself": defaultdict(set),
    }
    problems = []
    for record in tests:
        parts = record["id"].split("::")
        test_class, test, outcome = parts[1], parts[-1], record["outcome"]
        mode = skips.mode_of(test_class)
        entry = skips.find(test_class, test, version)
        if outcome == "xpassed":
            outcome = "passed"
            if entry is not None and not entry.flaky:
                problems.append(f"stale entry: {mode}: {test} passes; take it out of EXPECTED_FAILURES in skips.py")
        if outcome == "skipped":
            why = skips.self_skip(record["reason"])
            if why is None:
                problems.append(f"unknown skip: {mode}: {test}: {record['reason']}")
            reasons["itself"][why or record["reason"], ""].add(strip_parameter(test))
        if outcome == "xfailed":
            reasons["listed"][entry.reason if entry else record["reason"], strip_parameter(test)].add(mode)
        if outcome == "failed":
            problems.append(f"failed: {mode}: {test}")
        counts[mode][outcome] += 1
    return counts, reasons, problems


def strip_parameter(test: str) -> str:
    """`test_x_00_fp16_pad_left` -> `test_x`: parameterised cases are listed once; `flash_attn_2` is a name."""
    return re.sub(r"(?<!attn)_\d{1,2}(_\w+)?$", "", test)


def as_markdown(version: str, counts: dict[str, Counter], reasons: dict[str, dict]) -> str:
    """The text of docs/upstream_suite.md."""
    lines = [
        "# The test suite of transformers against our models",
        "",
        "Written by `python tests/upstream/run.py --write-docs`; do not edit by hand.",
        "",
        f"transformers {version}: the mixins in the sdist (model, configuration, pipeline, training, tensor-parallel,",
        "FSDP, memory) with stand-ins of our own for what the sdist lacks. `vanilla` is an out-of-tree copy of Llama,",
        "run by the same harness as a yardstick. Generation has cases of its own in `tests/test_generation_cases.py`.",
        f"The multi-process cases (FSDP, tensor parallel) run for {' and '.join(DISTRIBUTED_MODES)};",
        "`--everything` runs them for every mode.",
        "",
        "| mode | passed | expected failures | skipped by the test itself | failed |",
        "|---|---|---|---|---|",
    ]
    for mode in sorted(counts, key=lambda name: (name != "vanilla", name)):
        row = counts[mode]
        lines.append(f"| {mode} | {row['passed']} | {row['xfailed']} | {row['skipped']} | {row['failed']} |")
    lines += ["", "## Expected failures", ""]
    listed = sorted(reasons["listed"].items(), key=lambda item: item[0][1])
    if listed:
        lines += ["| test | modes | reason |", "|---|---|---|"]
        lines += [f"| `{test}` | {', '.join(sorted(modes))} | {reason} |" for (reason, test), modes in listed]
    else:
        lines.append("None.")
    lines += ["", "## Tests that skip themselves", "", "| why it does not concern us | tests |", "|---|---|"]
    for (why, _), names in sorted(reasons["itself"].items()):
        lines.append(f"| {why} | {', '.join(f'`{name}`' for name in sorted(names))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", "--workers", type=int, default=2, help="test processes (default 2)")
    parser.add_argument("-k", "--select", default="", help="pytest expression, as `MoRPlain and not fsdp`")
    parser.add_argument("--write-docs", action="store_true", help=f"write {DOCS.relative_to(ROOT)}")
    parser.add_argument("--everything", action="store_true", help="multi-process cases in every mode, not in two")
    parser.add_argument("--keep", action="store_true", help="keep the temporary tree and print where it is")
    parser.add_argument("pytest_arguments", nargs="*", help="passed on to pytest, after --")
    arguments = parser.parse_args()
    version = importlib.metadata.version("transformers")
    CACHE.mkdir(exist_ok=True)
    tree = Path(tempfile.mkdtemp(prefix="upstream-", dir=CACHE))
    try:
        build_tree(version, tree)
        report = tree / "report.jsonl"
        status = run_pytest(tree, report, arguments)
        counts, reasons, problems = judge(read_report(report), version)
    finally:
        if arguments.keep:
            print(f"tree kept: {tree.relative_to(ROOT)}")
        else:
            shutil.rmtree(tree, ignore_errors=True)
    for mode, row in sorted(counts.items()):
        print(f"{mode:20s} " + "  ".join(f"{name} {row[name]}" for name in ("passed", "xfailed", "skipped", "failed")))
    for problem in problems:
        print(problem)
    if status not in (0, 1):
        problems.append(f"pytest stopped with status {status}")
        print(problems[-1])
    if arguments.write_docs and not problems:
        DOCS.parent.mkdir(exist_ok=True)
        temporary = DOCS.with_suffix(".tmp")
        temporary.write_text(as_markdown(version, counts, reasons), encoding="utf-8")
        os.replace(temporary, DOCS)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
