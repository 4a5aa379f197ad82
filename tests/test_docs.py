"""Every command and Python block of README and docs runs, on a tiny checkpoint in place of the pretrained one."""

import re
import shlex
from pathlib import Path

import pytest
from real_text import save_source

from varidepth import JRTConfig
from varidepth.cli.main import main
from varidepth.conversion.recipe_fields import FIELDS


ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
STAND_IN = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a folder of this name goes before the Hub id
# these set the machine up: .ci/run calls them (`make demo` with the real checkpoint)
SET_UP = ("make ", "pip ")
# tests/test_distributed.py starts processes like these
SEVERAL_PROCESSES = ("accelerate launch ", "torchrun ")


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and content of the fenced blocks of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_source(tmp_path / STAND_IN)
    names: dict[str, object] = {"__name__": "__main__"}
    for language, content in blocks(page):
        assert language in ("python", "bash"), f"{page} has a block in {language!r} that no test runs"
        if language == "python":
            exec(compile(content, page, "exec"), names)
            continue
        for line in content.splitlines():
            if line.startswith(SET_UP + SEVERAL_PROCESSES):
                continue
            command, *arguments = shlex.split(line)
            assert command == "varidepth", f"{page}: {line}"
            assert main(arguments) == 0, f"{page}: {line}\n{capsys.readouterr().err}"


def test_every_field_is_documented():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    own = set(vars(JRTConfig)["__annotations__"]) - {"attention_dropout", "use_cache", "tie_word_embeddings"}
    own = {name for name in own if not name.endswith(("pad_token_id", "bos_token_id", "eos_token_id"))}
    missing = [name for name in (*FIELDS["mor"], "backbone", "num_hidden_layers", *own) if f"`{name}`" not in page]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"
