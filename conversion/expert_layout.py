"""The two layouts of a mixture-of-experts MLP: one matrix per expert in files, stacked ones in the model.

transformers writes and publishes `experts.0.w1.weight`, `experts.1.w1.weight` ..., and its models hold
`experts.gate_up_proj` of shape `(experts, 2 * inner, hidden)` and `experts.down_proj` of `(experts, hidden, inner)`.
Both views here compute a tensor when it is read.
"""

import re
from dataclasses import dataclass

import torch

from .errors import ConversionError
from .tensor_source import TensorInfo, TensorSource


@dataclass(frozen=True)
class ExpertNames:
    """Names of a family in files: its MLP, and the three matrices of an expert."""

    mlp: str
    gate: str
    up: str
    down: str


EXPERT_NAMES = {
    "mixtral": ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ExpertNames("mlp", "gate_proj", "up_proj", "down_proj"),
}
_EXPERT = re.compile(r"^(.*layers\.\d+)\.(\w+)\.experts\.(\d+)\.(\w+)\.weight$")
_STACKED = re.compile(r"^(.*layers\.\d+)\.mlp\.experts\.(gate_up_proj|down_proj)$")


def stack_experts(weights: TensorSource, family: str) -> TensorSource:
    """The weights under the names of the model, whatever layout the files have.

    Raises:
        ConversionError: if an expert of a layer is incomplete.
    """
    return _Stacked(weights, EXPERT_NAMES[family]) if family in EXPERT_NAMES else weights


def split_experts(weights: TensorSource, family: str) -> TensorSource:
    """The weights under the names that transformers writes to files."""
    return _Split(weights, EXPERT_NAMES[family]) if family in EXPERT_NAMES else weights


class _Stacked(TensorSource):
    def __init__(self, inner: TensorSource, names: ExpertNames):
        self._inner = inner
        self._old_names: dict[str, str] = {}
        self._stacks: dict[str, list[list[str]]] = {}  # new name -> for each expert the matrices to join
        self.infos = {}
        experts: dict[str, dict[int, dict[str, str]]] = {}
        for name in inner.infos:
            match = _EXPERT.match(name)
            if match and match[2] == names.mlp:
                experts.setdefault(match[1], {}).setdefault(int(match[3]), {})[match[4]] = name
            else:
                new_name = name.replace(f".{names.mlp}.", ".mlp.")
                self._old_names[new_name] = name
                self.infos[new_name] = inner.infos[name]
        for layer, group in experts.items():
            for new_part, parts in (("gate_up_proj", (names.gate, names.up)), ("down_proj", (names.down,))):
                self._add(f"{layer}.mlp.experts.{new_part}", group, parts)

    def _add(self, name: str, group: dict[int, dict[str, str]], parts: tuple[str, ...]) -> None:
        count = 1 + max(group)
        missing = [f"{i}.{part}" for i in range(count) for part in parts if part not in group.get(i, {})]
        if missing:
            raise ConversionError(
                f"The weights lack expert {missing[0]} of {name}; the checkpoint is incomplete, download it again."
            )
        matrices = [[group[i][part] for part in parts] for i in range(count)]
        infos = [[self._inner.infos[old] for old in expert] for expert in matrices]
        first = infos[0]
        if any([info.shape for info in expert] != [info.shape for info in first] for expert in infos):
            raise ConversionError(
                f"The experts of {name} differ in shape, but a layer's experts are alike; the checkpoint is damaged."
            )
        shape = (count, sum(info.shape[0] for info in first), *first[0].shape[1:])
        self._stacks[name] = matrices
        self.infos[name] = TensorInfo(shape, first[0].dtype, first[0].file)

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        if name not in self._stacks:
            return self._inner.read(self._old_names[name], rows)
        matrices = self._stacks[name][rows]
        value = torch.empty(len(matrices), *self.infos[name].shape[1:], dtype=self.infos[name].dtype)
        for i, expert in enumerate(matrices):
            value[i] = torch.cat([self._inner.read(old) for old in expert])
        return value


class _Split(TensorSource):
    def __init__(self, inner: TensorSource, names: ExpertNames):
        self._inner = inner
        self._origins: dict[str, tuple[str, int, slice]] = {}  # new name -> stacked name, expert, rows of the expert
        self.infos = {}
        for name, info in inner.infos.items():
            match = _STACKED.match(name)
            if match is None:
                new_name = name.replace(".mlp.", f".{names.mlp}.")
                self._origins[new_name] = (name, -1, slice(None))
                self.infos[new_name] = info
                continue
            half = info.shape[1] // 2
            parts = (
                ((names.gate, slice(0, half)), (names.up, slice(half, None)))
                if match[2] == "gate_up_proj"
                else ((names.down, slice(None)),)
            )
            for expert in range(info.shape[0]):
                for part, part_rows in parts:
                    new_name = f"{match[1]}.{names.mlp}.experts.{expert}.{part}.weight"
                    height = len(range(info.shape[1])[part_rows])
                    self._origins[new_name] = (name, expert, part_rows)
                    self.infos[new_name] = TensorInfo((height, *info.shape[2:]), info.dtype, info.file)

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        stacked, expert, part_rows = self._origins[name]
        if expert < 0:
            return self._inner.read(stacked, rows)
        return self._inner.read(stacked, slice(expert, expert + 1))[0][part_rows][rows]
