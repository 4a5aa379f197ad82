"""Runs the same correctness checks on several implementations of Mixture-of-Depths and prints a Markdown page.

    python benchmarks/mod_peers/run.py --peer astramind=checkout --python astramind=old-venv/bin/python [--write]

Every adapter runs in its own process, with the interpreter given for it, because implementations pin different
versions of transformers. `README.md` next to this file says where to get them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from registry import IMPLEMENTATIONS, NOT_RUN


HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "peers.md"
TIMEOUT = 300
CELLS = {"pass": "pass", "fail": "**fail**", "not offered": "–", "not possible": "?"}


def pairs(values: list[str], option: str) -> dict[str, str]:
    """NAME=VALUE arguments as a dictionary."""
    found = {}
    for value in values:
        name, separator, rest = value.partition("=")
        if not separator or name not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            raise SystemExit(f"{option} got {value!r}, but takes NAME=PATH with a NAME of {known}.")
        found[name] = rest
    return found


def run_adapter(adapter: str, folders: list[str], python: str) -> dict[str, Any]:
    """The worker's report.

    Raises:
        SystemExit: where the worker ends without one.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        command = [python, str(HERE / "worker.py"), adapter, str(output), *map(os.path.abspath, folders)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise SystemExit(f"{adapter} did not finish within {TIMEOUT} seconds.") from error
        if not output.exists():
            raise SystemExit(f"{adapter} gave no report; its process ends with:\n{done.stderr[-2000:]}")
        return json.loads(output.read_text(encoding="utf-8"))


def commit_of(folder: str) -> str:
    """Commit of a checkout, empty for anything else."""
    done = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def definitions() -> dict[str, str]:
    """What each check asks, from its docstring."""
    code = "import json, checks; print(json.dumps({k: v.__doc__ for k, v in checks.CHECKS.items()}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def wrapped(text: str) -> str:
    """A list item, folded."""
    return textwrap.fill(
        text, 118, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def page(reports: list[dict[str, Any]], asked: dict[str, str]) -> str:
    """The page: table, what failed, definitions, and what was run."""
    titles = [report["title"] for report in reports]
    lines = [
        "# Mixture-of-Depths implementations",
        "",
        "The same checks, run on public implementations of Mixture-of-Depths that run on a CPU, with tiny models and",
        "random weights. This page is written by `benchmarks/mod_peers/run.py`; what the checks ask is below, and",
        "`benchmarks/mod_peers/README.md` says how to repeat them. Several of these repositories are for study or for",
        'one experiment, and a row may ask what they never meant to do: "–" stands where a design does not offer it,',
        '"?" where it could not be measured. Differences count from 1e-4 of the largest output on.',
        "",
        "| | " + " | ".join(titles) + " |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for check in asked:
        cells = [CELLS[report["verdicts"][check]["status"]] for report in reports]
        lines.append(f"| {check} | " + " | ".join(cells) + " |")
    lines += ["", "## What was measured where a check fails", ""]
    for check in asked:
        failed = [report for report in reports if report["verdicts"][check]["status"] == "fail"]
        if failed:
            lines += [f"**{check}**", ""]
            lines += [wrapped(f"{report['title']}: {report['verdicts'][check]['fact']}.") for report in failed] + [""]
    lines += ["## What is not offered, or could not be measured", ""]
    for report in reports:
        why: dict[str, list[str]] = {}
        for check, verdict in report["verdicts"].items():
            if verdict["status"] in ("not offered", "not possible"):
                why.setdefault(verdict["fact"], []).append(check)
        if why:
            text = "; ".join(f"{', '.join(checks)}: {fact}" for fact, checks in why.items())
            lines.append(wrapped(f"{report['title']}. {text}."))
    lines += ["", "## What the checks ask", ""]
    lines += [wrapped(f"**{check}.** {text}") for check, text in asked.items()]
    lines += ["", "## What was run", ""]
    for report in reports:
        versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        parts = [report["source"], versions, *report["notes"]]
        lines.append(wrapped(f"{report['title']}: {report['where']}; {'; '.join(parts)}."))
    if NOT_RUN:
        lines += ["", "Could not be run:", ""]
        lines += [wrapped(f"{link(repository, commit)}: {why}.") for repository, commit, why in NOT_RUN]
    return "\n".join(lines) + "\n"


def link(repository: str, commit: str) -> str:
    """A link to a repository at a commit."""
    if not commit:
        return f"[{repository}](https://github.com/{repository})"
    return f"[{repository}](https://github.com/{repository}/tree/{commit}) at {commit[:7]}"


def main() -> None:
    """Run what was given and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="folders, separated by ':'")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of a peer")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(HERE.parents[1])}")
    arguments = parser.parse_args()
    folders, pythons = pairs(arguments.peer, "--peer"), pairs(arguments.python, "--python")
    reports = []
    for name, implementation in IMPLEMENTATIONS.items():
        if implementation.needs_folder and name not in folders:
            continue
        given = [folder for folder in folders.get(name, "").split(os.pathsep) if folder]
        for adapter in implementation.adapters:
            report = run_adapter(adapter, given, pythons.get(name, sys.executable))
            commit = commit_of(given[0]) if given else ""
            report["where"] = (
                link(implementation.repository, commit) if implementation.repository else "this repository"
            )
            reports.append(report)
            print(f"{report['title']}: done", file=sys.stderr)
    text = page(reports, definitions())
    if arguments.write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
