"""The scripts that measure training run as their pages say, at a tiny size."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from real_text import source_config, text_blocks, text_tokenizer, training_arguments
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer

from varidepth.training.text_blocks import load_documents


TINY = (
    "--source-tokens 3000 --share 0.5 --layers 4 --width 32 --vocabulary 300 --length 32 --batch 4 --held-out-rows 8 "
    "--seeds 0 1"
).split()


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark, and runs its `main` on a command line."""
    folder = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))

    def load(name: str):
        module = importlib.import_module(name)

        def run(*words: str) -> None:
            monkeypatch.setattr(sys, "argv", [name, *words])
            module.main()

        module.run = run
        return module

    before = set(sys.modules)
    yield load
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


def lines_of(work: Path) -> list[dict]:
    return [json.loads(line) for line in (work / "measured.jsonl").read_text().splitlines()]


def test_a_healing_study_goes_on_where_it_stopped_and_its_cells_are_paired(script, tmp_path, capsys, monkeypatch):
    study = script("healing_study")
    text, work = tmp_path / "topics.txt", tmp_path / "work"
    text.write_text("\n\n".join(load_documents()[:40]))
    seen: dict[tuple[str, int], list] = {}
    for name, method in list(study.METHODS.items()):

        def noting(model, teacher, rows, args, name=name, method=method):
            assert len(rows) == args.max_steps * args.per_device_train_batch_size
            seen.setdefault((name, args.seed), []).append(rows.blocks)
            return method(model, teacher, rows, args)

        monkeypatch.setitem(study.METHODS, name, noting)

    study.run("--work", str(work), "--text", str(text), "--only", "middle_cycle/upper/*/0", *TINY)
    first = lines_of(work)
    source = (work / "source" / "model.safetensors").stat().st_mtime_ns
    study.run("--work", str(work), "--only", "middle_cycle/upper/*", "cycle/average/logits/0", *TINY)
    again = lines_of(work)
    assert again[: len(first)] == first
    assert (work / "source" / "model.safetensors").stat().st_mtime_ns == source
    new = [line["name"] for line in again[len(first) :]]
    assert new == ["cycle/average/logits/0", *(f"middle_cycle/upper/{method}/1" for method in study.METHODS)]

    cells = {line["name"]: line for line in again}
    lm, logits = cells["middle_cycle/upper/lm/0"], cells["middle_cycle/upper/logits/0"]
    assert lm["cut"] == logits["cut"] and lm["tokens"] == logits["tokens"]
    assert lm["healed"] != logits["healed"] and lm["healed"] != cells["middle_cycle/upper/lm/1"]["healed"]
    assert torch.equal(seen["lm", 0][0], seen["logits", 0][0])
    assert not torch.equal(seen["lm", 0][0], seen["lm", 1][0])
    # the rate of a method is the best that was tried, on rows and text of no cell
    for method in study.METHODS:
        tried = {name: line["healed"] for name, line in cells.items() if name.startswith(f"tuning/{method}/")}
        best = min(tried, key=tried.__getitem__)
        assert (
            len(tried) >= 3 and float(best.split("/")[2]) == cells[f"middle_cycle/upper/{method}/0"]["learning_rate"]
        )
    page = capsys.readouterr().out
    assert "| middle_cycle | upper | logits |" in page
    assert "- middle_cycle upper logits minus middle_cycle upper lm: " in page
    assert page.count("Made by `python benchmarks/healing_study.py --work work --text topics.txt --only ") == 1

    with pytest.raises(SystemExit, match="was made with width 32"):
        study.run("--work", str(work), *TINY, "--width", "64")


def test_a_study_without_source_and_text_says_what_is_missing(script, tmp_path):
    with pytest.raises(SystemExit, match="give --text FILE"):
        script("healing_study").run("--work", str(tmp_path), *TINY)


def test_a_pretrained_model_is_cut_healed_and_routed(script, tmp_path, capsys):
    text, held_out = tmp_path / "topics.txt", tmp_path / "held-out.txt"
    documents = load_documents()
    text.write_text("\n\n".join(documents[:20]))
    held_out.write_text("\n\n".join(documents[20:24]))
    source, output = tmp_path / "source", tmp_path / "output"
    model = LlamaForCausalLM(source_config())
    plan = training_arguments(tmp_path, max_steps=150, per_device_train_batch_size=16)
    Trainer(model, plan, train_dataset=text_blocks()).train()
    model.save_pretrained(source)
    text_tokenizer().save_pretrained(source)
    words = (
        "--recursion-rank 2 --minutes 0.05 --routing-minutes 0.05 --fit-tokens 1024 --sampled-tokens 512 "
        "--held-out-tokens 512 --windows 32 64 --every 2048 --curve-tokens 128 --threads 1"
    ).split()
    files = ["--source", str(source), "--text", str(text), "--held-out", str(held_out), "--output", str(output)]
    script("pretrained_healing").run(*files, *words)
    page = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    losses = {row[0]: list(map(float, row[2:])) for row in rows if len(row) == 4 and row[0] != "model"}
    names = list(losses)
    assert names[:3] == ["source", "cut", "healed, all tokens at full depth"] and len(names) == 5
    assert 0.5 < float(names[3].removeprefix("routed, compute of the layers ")) < 1
    assert all(known < healed < cut for known, cut, healed in zip(*(losses[n] for n in names[:3]), strict=True))
    parameters = {row[0]: row[1] for row in rows if len(row) == 4}
    assert parameters["cut"] == parameters[names[2]] and parameters["source"] != parameters["cut"]
    curve = [(int(row[0]), float(row[2])) for row in rows if len(row) == 3 and row[0] != "tokens"]
    assert len(curve) > 1 and curve[0][0] == 0 and curve == sorted(curve)
    assert "Made by `python benchmarks/pretrained_healing.py --source source --text topics.txt" in page

    # what it leaves loads as what was measured
    routed = AutoModelForCausalLM.from_pretrained(output / "routed")
    assert routed.config.capacities == AutoModelForCausalLM.from_pretrained(output / "cut").config.capacities
    assert AutoModelForCausalLM.from_pretrained(output / "healed").config.capacities == [1.0, 1.0]


def test_intervals_over_seeds(script):
    seeds = script("paired_seeds")
    assert seeds.mean_interval([1.5]) == "1.5000"
    assert seeds.mean_interval([1.0, 2.0, 3.0], digits=2) == "2.00 (-0.48 to 4.48)"
    assert seeds.paired_difference([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).startswith("+1.0000 (95 % interval -1.4843")


def test_a_training_step_is_timed_beside_its_limit(script, monkeypatch, capsys):
    bench = script("train_step")
    monkeypatch.setattr(bench, "peak_memory", lambda name: 1 + bench.measure_memory(name))
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    monkeypatch.setattr(bench, "SHAPE", small)
    monkeypatch.setattr(bench, "BATCH", (2, 24))
    for group in bench.GROUPS.values():
        for name, contender in group.items():
            fields = contender.fields | ({"prefix_length": 6} if "prefix_length" in contender.fields else {})
            shape = bench.Contender(contender.architecture, fields, bench.BATCH)
            monkeypatch.setitem(group, name, shape)
            monkeypatch.setitem(bench.CONTENDERS, name, shape)
    bench.run("--steps", "1")
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cells = {row[1].strip(): [cell.strip() for cell in row[2:]] for row in rows}
    assert set(bench.CONTENDERS) <= set(cells)
    limits = {name: float(row[2]) for name, row in cells.items() if name != "model"}
    assert limits["vanilla"] == limits["vanilla, second copy"] == 1
    assert limits["MoR, 3 recursions"] < limits["MoR, 2 recursions"] < 1
    assert limits["MoD, every other block, 12.5 % enter"] < limits["MoD, every attention, 50 % enter"] < 1
