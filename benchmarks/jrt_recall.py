"""Does a recurrent model recall more when it may read its input as a prefix? Two models with the same state, paired.

    python benchmarks/jrt_recall.py --seeds 0 1 2 --write

Both are JRT-RNNs of the same layers: `prefix` reads a prefix; `causal` has `prefix_length=0` (Based, the baseline of
the paper) and wider MLPs in place of the weights that read one. The arms of a seed see the same batches in the same
order. They are trained on the cross-entropy of the labels alone, without next-token loss, on inputs of several sizes,
and measured on new examples of the largest.

Set disjointness (JRT, arXiv 2407.05483, Figure 2; here with fewer and smaller sets): the prefix is the whole input,
which does not tell the answer. The claim is about the larger set first; the other order is the control.

MQAR (Zoology, arXiv 2312.04927): the pairs are the prefix, so the model reads them twice; the queries behind them are
answered causally. Here both arms have to remember the same pairs.
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from interleaved import machine, publish
from paired_seeds import paired_difference
from torch.nn.functional import cross_entropy

from varidepth import JRTConfig, JRTForCausalLM
from varidepth.analysis.recurrent_state import state_bytes
from varidepth.analysis.synthetic_recall import (
    NO_LABEL,
    MultiQueryRecall,
    SetDisjointness,
    batches,
    draw_all,
    recall_accuracy,
)


ARMS = ("causal", "prefix")
WIDTH, INNER, HEADS, FEATURE_DIM = 48, 96, 2, 4
LAYERS = ["conv", "linear_attention"] * 2
TRAIN_EXAMPLES, TEST_EXAMPLES, TEST_SEED = 20_000, 1000, 10_000


@dataclass(frozen=True)
class Task:
    """A recall task.

    Attributes:
        vocab_size: number of token ids.
        train: settings to train on, in one model; small ones teach what is asked before large ones ask to remember.
        measured: those of them that are reported, by name.
        prefix: tokens of the prefix by tokens of the input.
        steps: training steps.
    """

    vocab_size: int
    train: Sequence[SetDisjointness | MultiQueryRecall]
    measured: dict[str, SetDisjointness | MultiQueryRecall]
    prefix: dict[int, int]
    steps: int


def sets_task(steps: int) -> Task:
    """Both orders of each pair of sizes; the prefix is everything."""
    sizes = ((2, 2), (8, 2), (2, 8), (8, 4), (4, 8), (24, 4), (4, 24))
    settings = {size: SetDisjointness(*size, TRAIN_EXAMPLES, vocab_size=68) for size in sizes}
    measured = {"sets, A of 24, B of 4": settings[24, 4], "sets, A of 4, B of 24 (control)": settings[4, 24]}
    return Task(68, list(settings.values()), measured, {a + b + 3: a + b + 3 for a, b in sizes}, steps)


def mqar_task(steps: int) -> Task:
    """As many queries as pairs; the prefix is the pairs."""
    settings = [MultiQueryRecall(4 * n, n, TRAIN_EXAMPLES, vocab_size=128) for n in (2, 4, 8, 16)]
    measured = {"MQAR, 16 pairs": settings[-1]}
    return Task(128, settings, measured, {one.length: 2 * one.pairs for one in settings}, steps)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    lines = header(args)
    started = time.process_time()
    for task in (sets_task(args.steps), mqar_task(args.mqar_steps)):
        accuracies: dict[str, dict[str, list[float]]] = {name: {arm: [] for arm in ARMS} for name in task.measured}
        for seed in args.seeds:
            for arm in ARMS:
                model = train_model(make_model(arm, task, seed), task, args, seed)
                for name, accuracy in measure(model, task).items():
                    accuracies[name][arm].append(accuracy)
                    print(f"seed {seed} {arm:<7} {name:<32} {accuracy:.4f}", flush=True)
        for name, by_arm in accuracies.items():
            lines += rows(name, by_arm, args.seeds)
    lines += ["", f"{(time.process_time() - started) / 60:.0f} minutes of processor time. {machine()}."]
    publish(__file__, lines, args.write)


def make_model(arm: str, task: Task, seed: int) -> JRTForCausalLM:
    """Random weights of the seed; `causal` has at least as many of them."""
    reading = LAYERS.count("linear_attention") * (HEADS * FEATURE_DIM + WIDTH) * WIDTH
    config = JRTConfig(
        vocab_size=task.vocab_size,
        hidden_size=WIDTH,
        intermediate_size=INNER if arm == "prefix" else INNER + math.ceil(reading / (len(LAYERS) * 3 * WIDTH)),
        num_hidden_layers=len(LAYERS),
        num_attention_heads=HEADS,
        layer_types=LAYERS,
        feature_dim=FEATURE_DIM,
        prefix_length=max(task.prefix.values()) if arm == "prefix" else 0,
        mask_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.1,
    )
    torch.manual_seed(seed)
    return JRTForCausalLM(config)


def train_model(model: JRTForCausalLM, task: Task, args: argparse.Namespace, seed: int) -> JRTForCausalLM:
    """Trains on batches that depend on the seed alone."""
    examples = draw_all(task.train, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / task.steps))
    )
    model.train()
    step = 0
    while step < task.steps:
        for input_ids, labels in batches(examples, args.batch, seed=seed + step):
            logits, labels = answers(model, task, input_ids, labels)
            cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step == task.steps:
                break
    return model.eval()


@torch.no_grad()
def measure(model: JRTForCausalLM, task: Task) -> dict[str, float]:
    """Accuracy in each measured setting, on the same examples for every model."""
    settings = [replace(setting, examples=TEST_EXAMPLES) for setting in task.measured.values()]
    drawn = draw_all(settings, TEST_SEED)
    return {
        name: recall_accuracy(*answers(model, task, examples.input_ids, examples.labels))
        for name, examples in zip(task.measured, drawn, strict=True)
    }


def answers(
    model: JRTForCausalLM, task: Task, input_ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the columns from the first label on; no column before it is asked for."""
    columns = labels.shape[1]
    kept = columns - int((labels != NO_LABEL).any(dim=0).nonzero()[0])
    prefix = {"prefix_length": task.prefix[columns]} if model.config.prefix_length else {}
    return model(input_ids, use_cache=False, logits_to_keep=kept, **prefix).logits, labels[:, -kept:]


def header(args: argparse.Namespace) -> list[str]:
    """What is compared."""
    task = sets_task(args.steps)
    causal, prefix = (make_model(arm, task, seed=0) for arm in ARMS)
    sizes = [state_bytes(model.config).total for model in (causal, prefix)]
    assert sizes[0] == sizes[1], "the arms must keep the same state"
    return [
        "# Recall with and without a prefix",
        "",
        f"JRT-RNNs of {len(LAYERS)} layers (convolution and linear attention by turns), width {WIDTH}, {HEADS} heads, "
        f"feature size {FEATURE_DIM}: a state of {sizes[0]} bytes in both arms, {causal.num_parameters()} weights "
        f"without and {prefix.num_parameters()} with a prefix (set disjointness). Trained for {args.steps} (sets) and "
        f"{args.mqar_steps} (MQAR) steps of {args.batch} examples. Accuracy on {TEST_EXAMPLES} new examples.",
        "",
        "| task | seed | " + " | ".join(ARMS) + " | difference |",
        "|---|---|" + "---|" * (len(ARMS) + 1),
    ]


def rows(name: str, by_arm: dict[str, list[float]], seeds: Sequence[int]) -> list[str]:
    """A row per seed and one for their mean."""
    lines = [
        f"| {name} | {seed} | {causal:.4f} | {prefix:.4f} | {prefix - causal:+.4f} |"
        for seed, causal, prefix in zip(seeds, *(by_arm[arm] for arm in ARMS), strict=True)
    ]
    means = " | ".join(f"{statistics.fmean(by_arm[arm]):.4f}" for arm in ARMS)
    return [*lines, f"| {name} | mean | {means} | {paired_difference(*(by_arm[arm] for arm in ARMS))} |"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000, help="training steps of set disjointness")
    parser.add_argument("--mqar-steps", type=int, default=1600, help="training steps of MQAR")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the page beside this script")
    return parser.parse_args()


if __name__ == "__main__":
    main()
