"""pytest plugin of the upstream run: applies the table of expected failures and writes one JSON line per test.

It becomes the `conftest.py` of the temporary tree that `run.py` builds. Expected failures are run, not skipped: one
that passes comes back as `xpassed`, and `run.py` reports the table entry as stale.
"""

import json
import os
from typing import Any

import pytest
import skips
import transformers


def case_of(nodeid: str) -> tuple[str, str]:
    """(test class, test name) of a pytest node id."""
    parts = nodeid.split("::")
    return (parts[1] if len(parts) > 2 else "", parts[-1])


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    if "VARIDEPTH_UPSTREAM_EVERYTHING" not in os.environ:
        left_out = [item for item in items if skips.is_left_out(*case_of(item.nodeid))]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        entry = skips.find(*case_of(item.nodeid), transformers.__version__)
        if entry is not None:
            item.add_marker(pytest.mark.xfail(reason=entry.reason, run=entry.run, strict=False))


def _text(report: Any) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[-1]).removeprefix("Skipped: ")
    return str(report.longrepr or "")


def pytest_runtest_logreport(report: Any) -> None:
    # Under xdist every report passes through the workers and the controller; the controller alone writes.
    if os.environ.get("PYTEST_XDIST_WORKER") or "VARIDEPTH_UPSTREAM_REPORT" not in os.environ:
        return
    if report.when != "call" and report.passed:
        return
    expected = hasattr(report, "wasxfail")
    outcome = ("xfailed" if report.skipped else "xpassed") if expected else report.outcome
    record = {
        "id": report.nodeid,
        "outcome": outcome,
        "reason": report.wasxfail if expected else _text(report),
        "text": _text(report),
        "seconds": report.duration,
    }
    with open(os.environ["VARIDEPTH_UPSTREAM_REPORT"], "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
