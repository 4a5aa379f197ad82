"""The demo refuses bad input in one sentence before it converts."""

import importlib.util
import sys
from pathlib import Path

import pytest
from real_text import save_source


def load_demo():
    spec = importlib.util.spec_from_file_location("demo", Path(__file__).parents[1] / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("demo") / "source")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes is 0.0, but must be a finite number above 0"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["--minutes", "inf"], "--minutes is inf"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--source", "./nowhere"], "'./nowhere' does not exist"),
        (["--source", "empty"], "holds no weights"),
        (["--text", "empty"], "No text in empty"),
        (["--text", "one.txt"], "1 document cannot be split"),
        (["--text", "binary.txt"], "binary.txt is not UTF-8"),
        (["--text", "no/such/text"], "no/such/text"),
    ],
)
def test_bad_input_is_one_sentence_before_the_conversion(arguments, message, source, tmp_path, monkeypatch):
    demo = load_demo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.txt").write_text("one short document")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    given = arguments if "--source" in arguments else ["--source", str(source), *arguments]
    monkeypatch.setattr(sys, "argv", ["demo.py", *given])
    with pytest.raises(SystemExit) as caught:
        demo.main()
    said = caught.value.code
    assert isinstance(said, str) and said.startswith("demo: ") and message in said and "\n" not in said
    assert not (tmp_path / "demo-output" / "converted").exists()
