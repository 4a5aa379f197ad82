"""How far does a given time bring a pretrained model back? A checkpoint as Middle-Cycle, healed by `heal`.

    python benchmarks/pretrained_healing.py --source smollm2.gguf --text a.txt b.txt --held-out c.txt --write

The source is converted to two recursions that differ by matrices of low rank, and healed with every token at full
depth; then, with `--routing-minutes`, routing is turned on. All that is done to the model counts as time: what the
source writes, the fitted start and the training, with the losses that are measured along it.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from healing_study import documents_of
from interleaved import machine, publish
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback
from transformers.utils import logging

from varidepth import convert
from varidepth.analysis.perplexity import held_out_loss
from varidepth.cli.checkpoint_loading import load_teacher
from varidepth.training.healing_run import Healed, HealingSettings, heal
from varidepth.training.schedules import Ramp


Loss = Callable[[PreTrainedModel, int], float]


class Curve(TrainerCallback):
    """Held-out loss before the first step and every so many tokens, in windows of the rows that are trained on."""

    def __init__(self, loss: Loss, settings: HealingSettings, every: int):
        self.loss, self.settings, self.every = loss, settings, every
        self.points: list[tuple[int, float, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._note(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        size = self.settings.tokens_per_step
        tokens = state.global_step * size
        if tokens // self.every > (tokens - size) // self.every:
            self._note(tokens, model)

    def _note(self, tokens: int, model: Any) -> None:
        self.points.append((tokens, time.monotonic(), self.loss(model, self.settings.seq_len)))
        print(f"{tokens} tokens: {self.points[-1][-1]:.3f}", flush=True)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    teacher = load_teacher(args.source)
    documents = documents_of(args.text)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    documents = [documents[i] for i in order]
    held_out = documents_of([args.held_out])
    with tempfile.TemporaryDirectory() as made:
        work = args.output or Path(made)
        begin = time.monotonic()
        convert(
            args.source, work / "cut", num_recursions=2, sharing="middle_cycle", init="upper", dtype="float32",
            recursion_rank=args.recursion_rank, overwrite=True, quiet=True,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(work / "cut")
        tokenizer = AutoTokenizer.from_pretrained(work / "cut")

        def loss(measured: PreTrainedModel, window: int, tokens: int = args.held_out_tokens) -> float:
            result = held_out_loss(measured, tokenizer, held_out, window=window, max_tokens=tokens)
            return result.nats_per_token

        settings = HealingSettings(
            minutes=args.minutes,
            fit_tokens=args.fit_tokens,
            sampled_tokens=args.sampled_tokens,
            sampled_rows=args.sampled_rows,
            learning_rate=args.learning_rate,
            hidden_weight=Ramp(3.0, 0.0, 0.0, 0.6),
        )
        capacities, model.config.capacities = model.config.capacities, [1.0] * len(model.config.capacities)
        curve = Curve(lambda measured, window: loss(measured, window, args.curve_tokens), settings, args.every)
        train = partial(heal, model, teacher, documents, tokenizer)
        healed = train(settings, work / "depth", callbacks=[curve])
        minutes = (time.monotonic() - begin) / 60
        model.save_pretrained(work / "healed")
        rows = [
            row("source", teacher, loss, args.windows),
            row("cut", AutoModelForCausalLM.from_pretrained(work / "cut"), loss, args.windows),
            row("healed, all tokens at full depth", model, loss, args.windows),
        ]
        lines = [*header(args, teacher, model, healed, minutes), *rows]
        if args.routing_minutes:
            model.config.capacities = capacities
            lines += routed(args, model, train, loss, work)
    lines += ["", "## Along the training", "", f"On {args.curve_tokens} tokens, windows of {settings.seq_len}:", ""]
    lines += ["| tokens | minutes | loss |", "|---|---|---|"]
    lines += [f"| {tokens} | {(at - begin) / 60:.1f} | {loss:.3f} |" for tokens, at, loss in curve.points]
    publish(__file__, [*lines, "", f"{machine()}."], args.write)


def row(name: str, model: PreTrainedModel, loss: Loss, windows: list[int]) -> str:
    cells = [f"{loss(model, window):.3f}" for window in windows]
    return f"| {' | '.join([name, f'{model.num_parameters() / 1e6:.1f}', *cells])} |"


def header(
    args: argparse.Namespace, teacher: PreTrainedModel, model: PreTrainedModel, healed: Healed, minutes: float
) -> list[str]:
    return [
        "# A pretrained model, cut and brought back",
        "",
        f"{Path(args.source).name} ({teacher.config.num_hidden_layers} layers) as Middle-Cycle with two recursions of "
        f"{len(healed.fitted)} shared layers, which differ by matrices of rank {model.config.recursion_rank}. "
        f"{minutes:.1f} minutes in all on {args.threads} threads: {args.sampled_tokens} tokens that the source wrote, "
        f"the fitted start on these and {args.fit_tokens} of the text, and {healed.tokens} tokens of training (one "
        f"seed), of which {args.sampled_rows:.0%} are the source's own. Loss in nats per token on "
        f"{args.held_out_tokens} tokens of {args.held_out.name}, by windows.",
        "",
        f"| model | parameters, M | {' | '.join(f'window {window}' for window in args.windows)} |",
        "|" + "---|" * (2 + len(args.windows)),
    ]


def routed(
    args: argparse.Namespace, model: PreTrainedModel, train: Callable[..., Healed], loss: Loss, work: Path
) -> list[str]:
    """Trains on with routing, and measures by the causal rule; rows of the table and what was calibrated."""
    begin = time.monotonic()
    settings = HealingSettings(
        minutes=args.routing_minutes,
        start="as_converted",
        sampled_tokens=0,
        hidden_weight=0.0,
        learning_rate=args.learning_rate / 2,
        routing_begin=0.0,
        routing_end=0.5,
        seed=1,
    )
    healed = train(settings, work / "routing")
    minutes = (time.monotonic() - begin) / 60
    model.save_pretrained(work / "routed")
    rows = [row(f"routed, compute of the layers {healed.calibration.compute:.3f}", model, loss, args.windows)]
    model.config.capacities = [1.0] * len(model.config.capacities)
    rows.append(row("the same weights, all tokens at full depth", model, loss, args.windows))
    return [
        *rows,
        "",
        f"Routing took {minutes:.1f} minutes more, {healed.tokens} tokens.",
        "",
        "```",
        healed.calibration.table(),
        "```",
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder, GGUF file or Hub id")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files, or folders of them")
    parser.add_argument("--held-out", type=Path, required=True, help="text file that is only measured")
    parser.add_argument("--minutes", type=float, default=44, help="of training at full depth")
    parser.add_argument("--routing-minutes", type=float, default=0, help="of training with routing behind it")
    parser.add_argument("--recursion-rank", type=int, default=64)
    parser.add_argument("--fit-tokens", type=int, default=16384, help="of the text, for the fitted start")
    parser.add_argument("--sampled-tokens", type=int, default=32768, help="that the source writes")
    parser.add_argument("--sampled-rows", type=float, default=0.33, help="share of the rows that are the source's own")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="relative to the size of each weight")
    parser.add_argument("--held-out-tokens", type=int, default=16384)
    parser.add_argument("--windows", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--every", type=int, default=30720, help="tokens between the points of the curve")
    parser.add_argument("--curve-tokens", type=int, default=2048, help="held-out tokens of each point")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder that keeps the checkpoints")
    parser.add_argument("--write", action="store_true", help="write the page beside this script")
    return parser.parse_args()


if __name__ == "__main__":
    main()
