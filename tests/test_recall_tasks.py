"""The lm-eval task files of JRT-Prompt: what they say without lm-eval, and what lm-eval makes of them."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from real_text import save_source, text_tokenizer

from varidepth.analysis.lm_eval_tasks.recall_rows import prompted_rows, score, task_folder
from varidepth.generation.jrt_tasks import truncate_row


DATASETS = {
    "fda": ("fda", "based-fda"),
    "swde": ("swde", "based-swde-v2"),
    "squad": ("squad", "based-squad"),
    "drop": ("drop", "based_drop"),
    "triviaqa": ("triviaqa", "based_triviaqa"),
    "nq_512": ("nq", "based_nq_512"),
    "nq_1024": ("nq", "based_nq_1024"),
    "nq_2048": ("nq", "based_nq_2048"),
}
TASKS = {
    f"based_{name}{suffix}": {"path": f"hazyresearch/{dataset}", "recall_task": task, "repeats": repeats}
    for name, (task, dataset) in DATASETS.items()
    for suffix, repeats in (("", 1), ("_twice", 2))
}
ROWS = [
    {"text": "A pump. Speed: 5 rpm. Mass: {{2}} kg.", "key": "speed", "value": "5 rpm"},
    {"text": "A lamp. Power: 9 watts.\nPower:", "key": "power", "value": "9 watts"},
    {"text": "No such thing.", "key": "size", "value": "7"},
]
PROMPT = "Information about Speed. A pump. Speed: 5 rpm. Mass: {{2}} kg.\nA pump. Speed: 5 rpm. Mass: {{2}} kg. Speed:"


class Functions(yaml.SafeLoader):
    """Reads `!function module.name` as lm-eval does: a file beside the YAML file, loaded by its path."""


def function_of(loader, node):
    module, _, name = loader.construct_scalar(node).partition(".")
    spec = importlib.util.spec_from_file_location(module, task_folder() / f"{module}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, name)


Functions.add_constructor("!function", function_of)


def read(path: Path) -> dict:
    content = yaml.load(path.read_text(encoding="utf-8"), Functions)
    if "include" in content:
        content = read(path.parent / content.pop("include")) | content
    return content


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """The options of `prompted_rows` for a file in place of the published dataset."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return {"path": "json", "data_files": {"validation": str(path)}, "recall_task": "fda", "repeats": 2}


def test_there_is_a_file_for_every_task():
    files = {path.stem: read(path) for path in task_folder().glob("based_*.yaml")}
    assert {name: content["dataset_kwargs"] for name, content in files.items()} == TASKS
    for name, content in files.items():
        assert content["task"] == name
        assert content["output_type"] == "generate_until" and content["validation_split"] == "validation"
        assert content["generation_kwargs"] == {"until": ["\n"], "max_gen_toks": 48, "do_sample": False}
        assert content["metric_list"] == [{"metric": "contains", "aggregation": "mean", "higher_is_better": True}]


def test_the_functions_of_the_files_make_prompts_and_scores(rows):
    pytest.importorskip("datasets", reason="the rows are a dataset")
    content = read(task_folder() / "based_fda_twice.yaml")
    # lm-eval passes the metadata, too
    docs = content["custom_dataset"](**content["metadata"], **rows)["validation"]
    assert docs[0][content["doc_to_text"]] == PROMPT
    assert [doc["answers"] for doc in docs] == [["5 rpm"], ["9 watts"], ["7"]]
    score_of = content["process_results"]
    assert score_of(docs[0], [" 5 RPM at most\nx"]) == {"contains": 1.0}
    assert score_of(docs[0], [" slow\n5 rpm"]) == {"contains": 0.0}


def test_contexts_are_cut_around_the_answer_as_in_the_paper(rows, tmp_path):
    pytest.importorskip("datasets", reason="the rows are a dataset")
    save_source(tmp_path / "model")
    sizes = {"context_length": 12, "answer_length": 2}
    docs = prompted_rows(**{**rows, "repeats": 1}, pretrained=str(tmp_path / "model"), **sizes)["validation"]
    # the last row has an answer of one character, which the paper leaves out
    assert len(docs) == 2
    cut = truncate_row("fda", ROWS[0], text_tokenizer(), **sizes)["text"]
    assert len(cut) < len(ROWS[0]["text"]) and docs[0]["prompt"] == f"{cut.strip('.')}. Speed:"
    with pytest.raises(ValueError, match='no tokenizer is given; add "tokenizer"'):
        prompted_rows(**rows, context_length=12)


def test_a_row_has_several_answers():
    assert score({"answers": ["Leeds", "the town"]}, [" in The Town of"]) == {"contains": 1.0}


def own_task(folder: Path, rows: dict) -> None:
    """A task of one's own that takes over everything but the rows, as docs/jrt_prompt.md shows."""
    content = {"include": str(task_folder() / "based_fda_twice.yaml"), "task": "own", "dataset_kwargs": rows}
    folder.mkdir()
    (folder / "own.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def test_lm_eval_runs_the_tasks(rows, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is in the extra `eval`, not in `dev`")
    from lm_eval.tasks import TaskManager

    own_task(tmp_path / "tasks", rows)
    manager = TaskManager(include_path=[str(task_folder()), str(tmp_path / "tasks")])
    assert set(TASKS) <= set(manager.all_tasks)
    save_source(tmp_path / "model")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "model")},
        device="cpu",
        batch_size=2,
        tasks=["own"],
        task_manager=manager,
        bootstrap_iters=0,
    )
    assert found["n-samples"]["own"] == {"original": 3, "effective": 3}
    samples = {sample["doc_id"]: sample for sample in found["samples"]["own"]}
    prompt, options = samples[0]["arguments"][0]
    assert prompt == PROMPT and options == {"until": ["\n"], "max_gen_toks": 48, "do_sample": False}
    assert samples[0]["target"] == "5 rpm"
    hits = [score({"answers": [ROWS[i]["value"]]}, sample["resps"][0])["contains"] for i, sample in samples.items()]
    assert found["results"]["own"]["contains,none"] == sum(hits) / 3
