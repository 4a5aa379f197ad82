"""The interface between the checks and an implementation of Mixture-of-Depths.

An adapter subclasses `Peer`: it builds a tiny model with random weights and says where its routed layers are.
Forward hooks watch what happens inside, so that the checks measure what an implementation does, not what it says.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


VOCAB = 120


class NotOfferedError(Exception):
    """The design has no such feature; the message says what it has instead."""


class NotPossibleError(Exception):
    """The feature may exist but cannot be measured here; the message says why."""


class PeerError(Exception):
    """The implementation itself failed; the message says how."""


@dataclass
class RoutedLayer:
    """Where a routed layer can be watched.

    Attributes:
        layer: gets the whole sequence and returns it; or the router, where no module does.
        router: its output is the routing weight of every token.
        entry: the first module that gets the gathered tokens only.
        parts: modules whose outputs are the update of the gathered tokens, as attention and MLP.
        whole: the one entry of `parts` is the block with its residual connections, not an update.
        silence: linear layers that write the update; with their weights at zero the block changes nothing.
        leaves_at: the module that gets the routed part's output, where that is not the end of `layer`.
        router_call: which call of the router is this layer's, where layers share one.
    """

    layer: Any
    router: Any
    entry: Any
    parts: list[Any]
    whole: bool
    silence: list[Any] = field(default_factory=list)
    leaves_at: Any = None
    router_call: int = 0


@dataclass
class Trace:
    """One sequence on its way through a routed layer.

    Attributes:
        x: input of the layer (tokens, hidden).
        y: output of the layer (tokens, hidden).
        selected: indices of the tokens that the block got, in the order in which it got them.
        block: output of the block for these tokens, its residual connections included (selected, hidden).
        router: output of the router (tokens).
    """

    x: Tensor
    y: Tensor
    selected: Tensor
    block: Tensor
    router: Tensor


@dataclass
class Store:
    """What one routed layer keeps for later steps after a prompt and some decoding steps.

    Attributes:
        decoded: tokens decoded one at a time.
        decoded_routed: those of them that entered the layer.
        decoded_stored: entries that the layer's cache gained with them.
        size: bytes of the layer's keys and values at the end.
        dense_size: bytes of those of a layer without routing.
    """

    decoded: int
    decoded_routed: int
    decoded_stored: int
    size: int
    dense_size: int


class Peer:
    """A tiny model of one implementation.

    Attributes:
        title: column head of the table.
        source: repository or package, and which part of it is run.
        seq: length of the sequences that the checks use.
        trains_to_route: top-k runs in training mode only; generation has another rule.
        gate: what the design multiplies the update by, to force it to one: "raw", "sigmoid" or "softmax".
        notes: what was changed around the implementation to run it.
    """

    title = ""
    source = ""
    seq = 64
    trains_to_route = False
    gate = "raw"
    notes: tuple[str, ...] = ()
    model: Any
    routed: list[RoutedLayer]
    built_with: dict[str, Any]

    def build(self, layers: int = 4, capacity: float = 0.125) -> None:
        """Make `self.model` with random weights and list `self.routed`."""
        raise NotImplementedError

    def call(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Outputs of every position (batch, seq, features), in whatever mode the model is in."""
        raise NotImplementedError

    def dense(self, ids: Tensor) -> Tensor:
        """Outputs of the same weights in a model without routing."""
        raise NotImplementedError

    def cached(self, ids: Tensor, prompt: int) -> Tensor:
        """Outputs of every position: `prompt` tokens at once, then one at a time with the library's cache."""
        raise NotOfferedError("no cache")

    def store(self, ids: Tensor, prompt: int) -> list[Store]:
        """What the routed layers kept after `cached`."""
        raise NotOfferedError("no cache")

    def save_and_load(self, folder: Path) -> "Peer":
        """Save with the library's own means and load into a new object; a plain module has its state dict."""
        torch.save(self.model.state_dict(), folder / "model.pt")
        again = type(self)()
        again.build(**self.built_with)
        redraw(again.model, seed=1)
        again.model.load_state_dict(torch.load(folder / "model.pt"))
        return again

    def auto_outputs(self, folder: Path, ids: Tensor) -> Tensor:
        """Outputs after save_pretrained and AutoModelForCausalLM.from_pretrained."""
        raise NotOfferedError("no save_pretrained")

    def capacity_of(self, capacity: float, length: int) -> int:
        """How many tokens this design means to select."""
        return int(capacity * length)

    def force_value(self) -> float:
        """Router output at which the gate is one."""
        if self.gate == "softmax":
            raise NotOfferedError("gates are a softmax over tokens, they sum to one")
        return {"raw": 1.0, "sigmoid": 50.0}[self.gate]

    def mode(self, routing: bool) -> None:
        """Training mode where only that routes by top-k, else evaluation mode."""
        self.model.train(routing and self.trains_to_route)

    @torch.no_grad()
    def routing_outputs(self, ids: Tensor) -> Tensor:
        """Outputs in the mode that selects by capacity."""
        self.mode(routing=True)
        return self.call(ids)

    @torch.no_grad()
    def outputs(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Outputs in the mode used for generation, without a cache."""
        self.mode(routing=False)
        return self.call(ids, attention_mask)

    def traces(self, ids: Tensor) -> list[Trace]:
        """Watch every routed layer while it routes one sequence (1, seq)."""
        with watch(self.routed) as seen:
            self.routing_outputs(ids)
        return [seen_to_trace(layer, entry) for layer, entry in zip(self.routed, seen, strict=True)]

    def silence(self) -> None:
        """Zero the projections through which the routed blocks write."""
        for routed in self.routed:
            for linear in routed.silence:
                for parameter in linear.parameters():
                    nn.init.zeros_(parameter)

    @contextmanager
    def forced_router(self, value: float) -> Iterator[None]:
        """Make every router answer `value` for every token."""
        handles = [
            routed.router.register_forward_hook(lambda module, args, output: torch.full_like(output, value))
            for routed in self.routed
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def first_tensor(value: Any) -> Tensor:
    """The tensor itself or the first of a tuple."""
    return value[0] if isinstance(value, tuple) else value


@contextmanager
def watch(routed: list[RoutedLayer]) -> Iterator[list[dict[str, list[Tensor]]]]:
    """Record input and output of each layer, its router, its entry and its parts."""
    seen: list[dict[str, list[Tensor]]] = []
    handles = []
    for layer in routed:
        record: dict[str, list[Tensor]] = {"x": [], "y": [], "router": [], "entry": []}
        record |= {f"part{i}": [] for i in range(len(layer.parts))}
        seen.append(record)

        def keep_input(key: str, record: dict[str, list[Tensor]] = record) -> Any:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                value: Any = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
                record[key].append(value.detach().clone())

            return hook

        def keep_output(key: str, record: dict[str, list[Tensor]] = record) -> Any:
            def hook(module: nn.Module, args: tuple, output: Any) -> None:
                record[key].append(first_tensor(output).detach().clone())

            return hook

        handles += [
            layer.layer.register_forward_pre_hook(keep_input("x"), with_kwargs=True),
            layer.leaves_at.register_forward_pre_hook(keep_input("y"), with_kwargs=True)
            if layer.leaves_at is not None
            else layer.layer.register_forward_hook(keep_output("y")),
            layer.router.register_forward_hook(keep_output("router")),
            layer.entry.register_forward_pre_hook(keep_input("entry"), with_kwargs=True),
        ]
        handles += [part.register_forward_hook(keep_output(f"part{i}")) for i, part in enumerate(layer.parts)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def seen_to_trace(layer: RoutedLayer, seen: dict[str, list[Tensor]]) -> Trace:
    """Find the gathered tokens of one sequence again in the layer's input."""
    x, y = seen["x"][layer.router_call if layer.layer is layer.router else 0][0], seen["y"][0][0]
    gathered = torch.cat([each.flatten(0, -2) for each in seen["entry"]]) if seen["entry"] else x[:0]
    selected = torch.tensor(
        [int((x == token).all(-1).nonzero()[0]) if (x == token).all(-1).any() else -1 for token in gathered],
        dtype=torch.long,
    )
    block = torch.zeros_like(gathered) if layer.whole else gathered.clone()
    for i in range(len(layer.parts)):
        if seen[f"part{i}"]:
            block = block + torch.cat([each.flatten(0, -2) for each in seen[f"part{i}"]])
    return Trace(x=x, y=y, selected=selected, block=block, router=seen["router"][layer.router_call][0].flatten())


@torch.no_grad()
def redraw(model: nn.Module, seed: int = 0) -> None:
    """Random weights of a size at which every layer matters: N(0, 1 / inputs), embeddings N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        is_embedding = any(part in name for part in ("emb", "wte", "wpe"))
        std = 1.0 if is_embedding else parameter.shape[-1] ** -0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def tensor_bytes(*tensors: Tensor) -> int:
    """Bytes that the elements take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
