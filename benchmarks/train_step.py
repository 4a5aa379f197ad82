"""Time and memory of a training step against vanilla, beside the accountant's limit, for the three architectures.

    python benchmarks/train_step.py [--steps 7] [--threads 1] [--clock cpu] [--write]

A step is forward and backward, without optimizer. MoR and MoD are compared with a vanilla Llama of the same unrolled
depth, JRT-RNN with one of as many layers of the same widths, on longer rows; all models of a group have random weights
and take turns in one process (see `interleaved.py`). The limit is the share of vanilla's matrix products that is left
(`training_cost`, forward and backward), `reached` the limit over the ratio of the times; both are given as the
accountant counts, and without the products that SDPA skips. Peak memory is what a step adds to the resident
size of a process of its own, which has imported everything before: weights, gradients and activations.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from interleaved import CLOCKS, machine, publish, take_turns
from transformers import LlamaForCausalLM

from varidepth import JRTForCausalLM, MoDForCausalLM, MoRForCausalLM
from varidepth.analysis.cost import slot_loads, training_routing
from varidepth.analysis.training_cost import row_flops


SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
LAYERS, JRT_LAYERS = 8, 5
# tokens of a step, as (rows, tokens)
BATCH, JRT_BATCH = (2, 512), (1, 4096)


@dataclass(frozen=True)
class Contender:
    """A model of a group.

    Attributes:
        architecture: its class.
        fields: of its configuration, beside `SHAPE`.
        batch: shape of its input.
    """

    architecture: Any
    fields: dict[str, Any]
    batch: tuple[int, int] = BATCH

    def config(self) -> Any:
        return self.architecture.config_class(**SHAPE, **self.fields)

    def build(self) -> Any:
        """In training mode, with fixed random weights and sdpa attention."""
        torch.manual_seed(0)
        return self.architecture._from_config(self.config(), attn_implementation="sdpa").train()

    def step(self, model: Any) -> Callable[[int], None]:
        """Forward and backward on tokens that depend on the number of the step."""

        @torch.enable_grad()
        def run(number: int) -> None:
            ids = torch.randint(3, SHAPE["vocab_size"], self.batch, generator=torch.Generator().manual_seed(number))
            model(ids, labels=ids, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)

        return run


MOR = {"num_hidden_layers": LAYERS, "sharing": "middle_cycle"}
MOD = {"num_hidden_layers": LAYERS}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}  # those of the default vocabulary are none here
# the first of a group is what the others are compared with
GROUPS: dict[str, dict[str, Contender]] = {
    "MoR and MoD": {
        "vanilla": Contender(LlamaForCausalLM, {"num_hidden_layers": LAYERS}),
        "MoR, 2 recursions": Contender(MoRForCausalLM, {"num_recursions": 2, **MOR}),
        "MoR, 3 recursions": Contender(MoRForCausalLM, {"num_recursions": 3, **MOR}),
        "MoR, 2 recursions, shared KV": Contender(MoRForCausalLM, {"num_recursions": 2, "kv_mode": "shared", **MOR}),
        "MoD, every other block, 12.5 % enter": Contender(MoDForCausalLM, {"capacity": 0.125, **MOD}),
        "MoD, every attention, 50 % enter": Contender(
            MoDForCausalLM,
            {"capacity": 0.5, "routing_unit": "attention", "routed_layers": list(range(LAYERS)), **MOD},
        ),
    },
    "JRT-RNN": {
        "vanilla, long rows": Contender(LlamaForCausalLM, {"num_hidden_layers": JRT_LAYERS}, JRT_BATCH),
        "JRT-RNN, a quarter is prefix": Contender(
            JRTForCausalLM,
            {"num_hidden_layers": JRT_LAYERS, "prefix_length": JRT_BATCH[1] // 4, **NO_TOKENS},
            JRT_BATCH,
        ),
    },
}
CONTENDERS = {name: contender for group in GROUPS.values() for name, contender in group.items()}


def step_flops(contender: Contender, skips: bool) -> float:
    """Matrix products of one row's step, by the accountant.

    Args:
        skips: count attention under a causal mask as half, since the kernel of SDPA skips what lies behind the
            diagonal. It cannot where a mask is given: in windows, and where tokens read the keys of all others.
    """
    config, tokens = contender.config(), contender.batch[1]
    flops = row_flops(config, tokens)
    if not skips or config.model_type == "jrt":
        return flops
    loads = slot_loads(config, training_routing(config, tokens))
    skipped = sum(2 * load.queries * load.keys * config.hidden_size for load in loads if load.queries == load.keys)
    return flops - 3 * skipped


def peak_memory(name: str) -> int:
    """Bytes that a step adds to the resident size of a fresh process."""
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--memory-of", name]
    # a fixed threshold gives every large block back when it is freed
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    answer = subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, text=True)
    return int(answer.stdout)


def measure_memory(name: str) -> int:
    """The same, of this process."""
    import torch._dynamo  # noqa: F401  whose import checkpointed functions wait for

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    CONTENDERS[name].step(CONTENDERS[name].build())(0)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def table(group: dict[str, Contender], seconds: list[list[float]], memory: list[int]) -> list[str]:
    """Markdown lines; the second list of seconds is vanilla's once more."""
    names = list(group)
    whole = statistics.median(seconds[0] + seconds[1])
    rows = [(names[0], seconds[0], 0), (f"{names[0]}, second copy", seconds[1], 0)]
    rows += [(name, seconds[i + 1], i) for i, name in enumerate(names) if i]
    columns = ("model", "ms", "time / vanilla", "limit", "reached", "limit, causal", "reached, causal", "peak MB")
    lines = [f"| {' | '.join(columns)} | peak / vanilla |", "|---" * (len(columns) + 1) + "|"]
    for name, times, i in rows:
        ratio = statistics.median(times) / whole
        cells = [f"{1000 * statistics.median(times):.0f}", f"{ratio:.3f}"]
        for skips in (False, True):
            limit = step_flops(group[names[i]], skips) / step_flops(group[names[0]], skips)
            cells += [f"{limit:.3f}", f"{limit / ratio:.2f}"]
        cells += [f"{memory[i] / 1e6:.0f}", f"{memory[i] / memory[0]:.2f}"]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(measure_memory(args.memory_of))
        return
    host = machine()
    lines = [
        "# Time and memory of a training step",
        "",
        f"Forward and backward, without optimizer. Width {SHAPE['hidden_size']}, MLPs of "
        f"{SHAPE['intermediate_size']}, a vocabulary of {SHAPE['vocab_size']}, random weights, fp32. `limit` is the "
        "share of vanilla's matrix products as the accountant counts them, `reached` is limit / (time / vanilla). "
        "The accountant counts every product of a query and a key; SDPA skips those that a plain causal mask hides, "
        "which the columns `causal` take into account. Peak memory is that of weights, gradients and activations, in "
        "a process of its own. Capacities of MoR are the default ones.",
        "",
        f"Machine: {host}. {args.clock} time.",
    ]
    memory = {name: peak_memory(name) for group in args.groups for name in GROUPS[group]}
    for title in args.groups:
        group = GROUPS[title]
        contenders = list(group.values())
        runs = [contender.step(contender.build()) for contender in (contenders[0], *contenders)]
        depth, (rows, tokens) = contenders[0].fields["num_hidden_layers"], contenders[0].batch
        # as many tokens in each group, as far as that is possible
        steps = max(args.steps * BATCH[0] * BATCH[1] // (rows * tokens), min(args.steps, 3))
        seconds = take_turns(runs, steps, CLOCKS[args.clock], warm_up=1)
        lines += ["", f"{title}: {depth} layers, {rows} x {tokens} tokens, medians of {steps} interleaved steps.", ""]
        lines += table(group, seconds, [memory[name] for name in group])
    publish(__file__, lines, args.write)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="timed steps per model, at least 3 of long rows")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="cpu time ignores other processes")
    parser.add_argument("--memory-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write the report beside this script")
    return parser.parse_args()


if __name__ == "__main__":
    main()
