"""Which start, sharing and healing brings a cut model back? Conversions of one small Llama, healed on equal tokens.

    python benchmarks/healing_study.py --text a.txt b.txt --work study
    python benchmarks/healing_study.py --work study --only 'middle_cycle/*/logits/*'
    python benchmarks/healing_study.py --work study --only none --write

A vanilla Llama (the source) is trained on text, once. Its conversions to two recursions, by all forms of sharing and
all initialisations, are healed with a tenth of the tokens that the source was trained on. A cell is
`sharing/initialisation/method/seed`; its seed decides which rows of the text it may read and their order, so that the
cells of a seed are paired. Every token runs at full depth. Learning rates are chosen once per method, on another seed
and other held-out text: doubled and halved until the loss no longer falls.

All that is done is kept in `--work`: a run that was stopped goes on where it was, and one that is called again only
runs the cells that are missing. A method is a line of `METHODS`.
"""

import argparse
import copy
import dataclasses
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from interleaved import machine, publish
from mod_from_scratch import train_tokenizer
from paired_seeds import mean_interval, paired_difference
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from varidepth import convert
from varidepth.configuration.configuration_mor import SHARINGS
from varidepth.training.distillation import DistillationTrainer
from varidepth.training.fitted_start import fit_shared_layers
from varidepth.training.healing import HealingTrainer
from varidepth.training.healing_run import HealingSettings
from varidepth.training.progressive_sharing import ProgressiveSharing, load_shared
from varidepth.training.sampled_rows import sample_rows
from varidepth.training.text_blocks import TokenBlocks, load_documents, split_documents, token_blocks


INITS = ("stepwise", "upper", "lower", "average")
# made of the cut model, its source, the rows it may read, and arguments with seed, steps and learning rate: the healed
# model, which may be another one
Method = Callable[[PreTrainedModel, PreTrainedModel, TokenBlocks, TrainingArguments], PreTrainedModel]


def trained(trainer: Trainer) -> PreTrainedModel:
    trainer.train()
    return trainer.model


def fitted(model: PreTrainedModel, teacher: PreTrainedModel, rows: TokenBlocks, args: TrainingArguments) -> Any:
    """The start does not count as tokens: it reads rows that are trained on as well."""
    fit_shared_layers(model, teacher, rows.blocks[: FIT_TOKENS // rows.blocks.shape[1]].split(8))
    return healing(model, teacher, rows, args)


def healing(model: PreTrainedModel, teacher: PreTrainedModel, rows: TokenBlocks, args: TrainingArguments) -> Any:
    return trained(HealingTrainer(model, args, train_dataset=rows, teacher=teacher, hidden_states="all"))


def heal_defaults(model: PreTrainedModel, teacher: PreTrainedModel, rows: TokenBlocks, args: TrainingArguments) -> Any:
    """As `varidepth heal` does it: some rows are the source's own, which cost no text."""
    settings, length = HealingSettings(tokens=1), rows.blocks.shape[1]
    sampled = sample_rows(teacher, settings.sampled_tokens // length, length, seed=args.seed)
    shown = rows.blocks[: FIT_TOKENS // length]
    fit_shared_layers(model, teacher, torch.cat([shown, sampled]).split(8))
    generator = torch.Generator().manual_seed(args.seed)
    chosen = torch.rand(len(rows.blocks), 1, generator=generator) < settings.sampled_rows
    drawn = sampled[torch.randint(len(sampled), (len(rows.blocks),), generator=generator)]
    mixed = TokenBlocks(torch.where(chosen, drawn.to(rows.blocks.dtype), rows.blocks))
    trainer = HealingTrainer(
        model, args, train_dataset=mixed, teacher=teacher, hidden_states=settings.hidden_states,
        hidden_weight=settings.hidden_weight,
    )  # fmt: skip
    return trained(trainer)


def progressive(model: PreTrainedModel, teacher: PreTrainedModel, rows: TokenBlocks, args: TrainingArguments) -> Any:
    trainer = DistillationTrainer(
        copy.deepcopy(teacher).requires_grad_(True), args, train_dataset=rows, teacher=teacher
    )
    ProgressiveSharing(model.config.physical_layers, end=0.7).attach(trainer)
    load_shared(model, trained(trainer))
    return model


FIT_TOKENS = 32768
METHODS: dict[str, Method] = {
    "lm": lambda model, teacher, rows, args: trained(Trainer(model, args, train_dataset=rows)),
    "logits": lambda model, teacher, rows, args: trained(
        DistillationTrainer(model, args, train_dataset=rows, teacher=teacher)
    ),
    "states": healing,
    "fitted": fitted,
    # recursions that differ; their differences are fitted too
    "relaxed": fitted,
    "heal": heal_defaults,
    # begins with the source, whatever the initialisation of the cut
    "progressive": progressive,
}

# fields of the conversion
CUTS: dict[str, dict[str, Any]] = {"relaxed": {"recursion_rank": 16}}

TUNING_SEED, TUNING_CELL = 1000, ("middle_cycle", "stepwise")
FIRST_RATE, MOST_RATES = 1.6e-3, 7
SETTINGS = (
    "layers", "width", "vocabulary", "length", "batch", "source_tokens", "source_learning_rate", "share",
    "held_out_rows",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Study:
    """What all cells have in common.

    Attributes:
        work: folder of everything that is kept.
        source: folder of the source checkpoint.
        teacher: the source.
        train: rows that the source was trained on.
        tuning, held_out: rows of held-out text, for learning rates and for results; of shape `(rows, length)`.
        batch: rows per step.
        share: of the rows of `train` that a cell may read.
    """

    work: Path
    source: Path
    teacher: PreTrainedModel
    train: torch.Tensor
    tuning: torch.Tensor
    held_out: torch.Tensor
    batch: int
    share: float

    @property
    def steps(self) -> int:
        return max(1, round(self.share * len(self.train)) // self.batch)

    @property
    def tokens(self) -> int:
        """That a cell may read."""
        return self.steps * self.batch * self.train.shape[1]


class Ledger:
    """What was measured, by name: a line of JSON each, written when it is known; several runs may share it."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, dict[str, Any]]:
        if not self.path.exists():
            return {}
        records = (json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines())
        return {record.pop("name"): record for record in records}

    def add(self, name: str, **measured: Any) -> dict[str, Any]:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, **measured}) + "\n")
        print(name, *(f"{key} {value:.6g}" for key, value in measured.items()), flush=True)
        return measured


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    ledger = Ledger(args.work / "measured.jsonl")
    study = prepare(args, ledger)
    for cell in wanted_cells(args):
        if "/".join(map(str, cell)) not in ledger.read():
            run_cell(study, ledger, *cell)
    publish(__file__, report(study, ledger.read()), args.write)


def prepare(args: argparse.Namespace, ledger: Ledger) -> Study:
    """Makes rows, tokenizer and source, as far as they are not in the folder.

    Raises:
        SystemExit: the folder was made with other settings, or there is no text yet.
    """
    args.work.mkdir(parents=True, exist_ok=True)
    settings, noted = {name: getattr(args, name) for name in SETTINGS}, args.work / "settings.json"
    if noted.exists() and (before := json.loads(noted.read_text(encoding="utf-8"))) != settings:
        other = ", ".join(f"{name} {before.get(name)}" for name in SETTINGS if before.get(name) != settings[name])
        raise SystemExit(f"{args.work} was made with {other}: give the same, or another --work.")
    noted.write_text(json.dumps(settings), encoding="utf-8")
    source, rows_file = args.work / "source", args.work / "rows.pt"
    if not rows_file.exists():
        made = make_rows(args)
        torch.save(made, rows_file)
    rows = torch.load(rows_file)
    if not (source / "config.json").exists():
        train_source(args, rows["train"])
    teacher = AutoModelForCausalLM.from_pretrained(source).eval()
    study = Study(args.work, source, teacher, **rows, batch=args.batch, share=args.share)
    if "source" not in ledger.read():
        ledger.add("source", loss=loss_of(teacher, study.held_out), parameters=teacher.num_parameters())
    return study


def make_rows(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Trains the tokenizer, and cuts rows of the text and of the held-out text."""
    if not args.text:
        raise SystemExit(f"There is no source in {args.work} yet: give --text FILE ... to train one.")
    documents = documents_of(args.text)
    train, held = (documents, documents_of(args.held_out)) if args.held_out else split_documents(documents, seed=0)
    bpe = train_tokenizer(train, args.vocabulary)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", bos_token="</s>")
    tokenizer.save_pretrained(args.work / "tokenizer")
    blocks, held_out = (token_blocks(texts, tokenizer, args.length).blocks for texts in (train, held))
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    count = args.source_tokens // args.length // args.batch * args.batch
    if count > len(blocks) or len(held_out) < 2 * args.held_out_rows:
        raise SystemExit(
            f"The text has {blocks.numel()} tokens and {len(held_out)} held-out rows, less than --source-tokens "
            f"{args.source_tokens} or twice --held-out-rows {args.held_out_rows}: give more text or smaller numbers."
        )
    held_out = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))]
    tuning, measured = held_out[: 2 * args.held_out_rows].chunk(2)
    return {"train": blocks[order[:count]], "tuning": tuning.clone(), "held_out": measured.clone()}


def documents_of(paths: list[Path]) -> list[str]:
    """The documents of files, and of the text files in folders."""
    files = [file for path in paths for file in (sorted(path.rglob("*.txt")) if path.is_dir() else [path])]
    return [document for file in files for document in load_documents(file)]


def train_source(args: argparse.Namespace, rows: torch.Tensor) -> None:
    """One pass over the rows; goes on at the last checkpoint of a run that was stopped."""
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        num_key_value_heads=args.width // 32,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    checkpoints = args.work / "source-checkpoints"
    plan = training_arguments(
        checkpoints, len(rows) // args.batch, args.batch, args.source_learning_rate, seed=0, weight_decay=0.1,
        save_strategy="steps", save_steps=50, save_total_limit=1, logging_strategy="steps", logging_steps=25,
    )  # fmt: skip
    trainer = Trainer(LlamaForCausalLM(config), plan, train_dataset=TokenBlocks(rows))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.exists() else None)
    unfinished = args.work / "source.partial"
    trainer.save_model(unfinished)
    AutoTokenizer.from_pretrained(args.work / "tokenizer").save_pretrained(unfinished)
    unfinished.rename(args.work / "source")
    shutil.rmtree(checkpoints, ignore_errors=True)


def training_arguments(
    folder: Path, steps: int, batch: int, learning_rate: float, seed: int, **others: Any
) -> TrainingArguments:
    """AdamW along a cosine behind a short rise, in fp32 on the CPU."""
    plan = {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": learning_rate,
        "seed": seed,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 20,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**plan, **others})


def wanted_cells(args: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """Seed by seed, those that fit a pattern."""
    for seed in args.seeds:
        for sharing in SHARINGS:
            for init in INITS:
                for method in METHODS:
                    cell = (sharing, init, method, seed)
                    if any(fnmatchcase("/".join(map(str, cell)), pattern) for pattern in args.only):
                        yield cell


def run_cell(study: Study, ledger: Ledger, sharing: str, init: str, method: str, seed: int) -> None:
    """Cuts, measures, heals and measures."""
    rate = learning_rate_of(study, ledger, method)
    started = time.process_time()
    measured = heal(study, sharing, init, method, seed, rate, study.held_out)
    seconds = time.process_time() - started
    ledger.add(
        f"{sharing}/{init}/{method}/{seed}", **measured, learning_rate=rate, tokens=study.tokens, cpu_seconds=seconds
    )


def heal(
    study: Study, sharing: str, init: str, method: str, seed: int, learning_rate: float, held_out: torch.Tensor
) -> dict[str, float]:
    """Held-out loss of the conversion before and after, nats per token, and how many parameters it has."""
    fields = CUTS.get(method, {})
    folder = study.work / "cuts" / "-".join([sharing, init, *fields])
    if not folder.exists():
        convert(
            study.source, folder, num_recursions=2, sharing=sharing, init=init, routing="none", quiet=True, **fields
        )
    model = AutoModelForCausalLM.from_pretrained(folder)
    measured = {"cut": loss_of(model, held_out), "parameters": model.num_parameters()}
    picked = torch.randperm(len(study.train), generator=torch.Generator().manual_seed(seed))
    rows = TokenBlocks(study.train[picked[: study.steps * study.batch]])
    plan = training_arguments(study.work / "healing", study.steps, study.batch, learning_rate, seed)
    torch.manual_seed(seed)
    return {**measured, "healed": loss_of(METHODS[method](model, study.teacher, rows, plan), held_out)}


def learning_rate_of(study: Study, ledger: Ledger, method: str) -> float:
    """The rate of a method: from the first one, doubled or halved as long as the loss on the tuning rows falls."""

    def loss(rate: float) -> float:
        name = f"tuning/{method}/{rate:.3g}"
        known = ledger.read().get(name)
        if known is None:
            healed = heal(study, *TUNING_CELL, method, TUNING_SEED, rate, study.tuning)["healed"]
            known = ledger.add(name, healed=healed)
        return known["healed"]

    best = FIRST_RATE
    for factor in (2.0, 0.5):
        for _ in range(MOST_RATES):
            if not loss(best * factor) < loss(best):
                break
            best *= factor
        if best != FIRST_RATE:
            break
    return best


@torch.no_grad()
def loss_of(model: PreTrainedModel, rows: torch.Tensor) -> float:
    """Nats per token."""
    model.eval()
    parts = [(len(part), float(model(part, labels=part, use_cache=False).loss)) for part in rows.split(8)]
    return sum(count * loss for count, loss in parts) / len(rows)


def report(study: Study, measured: dict[str, dict[str, Any]]) -> list[str]:
    """The Markdown page of all cells that were run."""
    source, config = measured["source"]["loss"], study.teacher.config
    by_row: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for name, cell in measured.items():
        if name.count("/") == 3:
            sharing, init, method, seed = name.split("/")
            by_row.setdefault((sharing, init, method), {})[int(seed)] = cell
    lines = [
        "# Healing on equal tokens",
        "",
        f"A Llama of {measured['source']['parameters'] / 1e6:.1f} million parameters ({config.num_hidden_layers} "
        f"layers of width {config.hidden_size}, BPE of {config.vocab_size} tokens) was trained on "
        f"{study.train.numel()} tokens, to {source:.4f} nats per token on held-out text. Its conversions to "
        f"two recursions were healed on {study.tokens} tokens each ({study.steps} steps of {study.batch} x "
        f"{study.train.shape[1]}), every token at full depth. `recovered` is the share of the gap "
        "between the cut model and the source that is closed; intervals are of 95 % over the seeds, which decide rows "
        "and their order. Learning rates were chosen once per method, on another seed and other held-out text, for "
        f"{' with '.join(TUNING_CELL)}.",
        "",
        "| sharing | start | method | parameters, M | learning rate | seeds | cut | healed | recovered, % | nats per "
        "1000 tokens |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(by_row, key=lambda row: (SHARINGS.index(row[0]), mean_of(by_row[row], "healed"))):
        cells = [by_row[row][seed] for seed in sorted(by_row[row])]
        gained = [cell["cut"] - cell["healed"] for cell in cells]
        shares = [100 * gain / (cell["cut"] - source) for gain, cell in zip(gained, cells, strict=True)]
        figures = [
            f"{cells[0]['parameters'] / 1e6:.2f}",
            f"{cells[0]['learning_rate']:.2g}",
            " ".join(map(str, sorted(by_row[row]))),
            f"{cells[0]['cut']:.4f}",
            mean_interval([cell["healed"] for cell in cells]),
            mean_interval(shares, digits=1),
            f"{1000 * statistics.fmean(gained) / cells[0]['tokens']:.4f}",
        ]
        lines.append(f"| {' | '.join([*row, *figures])} |")
    lines += ["", "Paired over seeds, healed loss:", "", *comparisons(by_row)]
    hours = sum(cell.get("cpu_seconds", 0) for cell in measured.values()) / 3600
    lines += ["", f"{hours:.1f} hours of processor time for the cells. {machine()}."]
    return lines


def mean_of(cells: dict[int, dict[str, Any]], field: str) -> float:
    return statistics.fmean(cell[field] for cell in cells.values())


def comparisons(by_row: dict[tuple[str, str, str], dict[int, dict[str, Any]]]) -> list[str]:
    """Each method against cross-entropy and plain distillation, each start against the first, the rest being equal."""
    lines = []
    for row in by_row:
        sharing, init, method = row
        for other in ((sharing, init, "lm"), (sharing, init, "logits"), (sharing, INITS[0], method)):
            seeds = sorted(by_row[row].keys() & by_row.get(other, {}).keys())
            if other == row or not seeds:
                continue
            first, second = ([by_row[one][seed]["healed"] for seed in seeds] for one in (other, row))
            lines.append(f"- {' '.join(row)} minus {' '.join(other)}: {paired_difference(first, second)}")
    return sorted(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of what is kept between runs")
    parser.add_argument("--text", type=Path, nargs="+", help="text files, or folders of them, for the source")
    parser.add_argument("--held-out", type=Path, nargs="+", help="the same to measure on (default: a tenth of --text)")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of sharing/initialisation/method/seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--source-tokens", type=int, default=3_000_000)
    parser.add_argument("--source-learning-rate", type=float, default=3e-3)
    parser.add_argument("--share", type=float, default=0.1, help="of the source's tokens to heal with")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--held-out-rows", type=int, default=256, help="rows to measure on, and as many to tune on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write the page beside this script")
    return parser.parse_args()


if __name__ == "__main__":
    main()
