"""Two implementations inside a small GPT: epfml/llm-baselines (branch mixture_of_depth) and EduardoPach/nanoMoD."""

import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from peer import VOCAB, NotOfferedError, Peer, RoutedLayer, redraw
from torch import Tensor, nn


NO_CACHE = "no cache: its generate runs the whole sequence again for every token"


class Gpt(Peer):
    """What both share: learned absolute positions, and logits of every position only when targets are given."""

    def cached(self, ids: Tensor, prompt: int) -> Tensor:
        raise NotOfferedError(NO_CACHE)

    def store(self, ids: Tensor, prompt: int) -> list:
        raise NotOfferedError(NO_CACHE)


class LlmBaselines(Gpt):
    title = "epfml llm-baselines"
    source = "`models.base.GPTBase` with `mixture_of_depth`"
    notes = ("tiktoken is replaced by a stand-in: only `generate_from_string` uses it",)

    def config(self, layers: int, capacity: float, routed: bool) -> SimpleNamespace:
        return SimpleNamespace(
            vocab_size=VOCAB,
            sequence_length=self.seq,
            n_embd=48,
            n_head=4,
            n_layer=layers,
            dropout=0.0,
            bias=False,
            mixture_of_depth=routed,
            mod_capacity_factor=capacity,
            mod_every=2,
        )

    def build(self, layers: int = 4, capacity: float = 0.125) -> None:
        sys.modules.setdefault("tiktoken", MagicMock())
        from models.base import GPTBase

        self.built_with = {"layers": layers, "capacity": capacity}
        self.model = GPTBase(self.config(layers, capacity, routed=True)).eval()
        redraw(self.model)
        self.routed = [
            RoutedLayer(
                layer=layer,
                router=layer.mod_router,
                entry=layer.block,
                parts=[layer.block],
                whole=True,
                silence=[layer.block.attn.c_proj, layer.block.mlp.c_proj],
            )
            for layer in self.model.transformer.h
            if hasattr(layer, "mod_router")
        ]

    def call(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            raise NotOfferedError("takes no attention mask")
        return self.model(ids, targets=ids, get_logits=True)["logits"]

    def dense(self, ids: Tensor) -> Tensor:
        from models.base import GPTBase

        base = GPTBase(self.config(self.built_with["layers"], 1.0, routed=False)).eval()
        weights = {name.replace(".block.", "."): value for name, value in self.model.state_dict().items()}
        base.load_state_dict({name: value for name, value in weights.items() if "mod_router" not in name})
        with torch.no_grad():
            return base(ids, targets=ids, get_logits=True)["logits"]


class NanoMod(Gpt):
    title = "nanoMoD"
    source = "`nanomod.model.GPT`"
    notes = ("wandb, pandas and hydra are replaced by stand-ins: only its training script uses them",)

    def gpt(self, layers: int, capacity: float, routed: bool) -> nn.Module:
        for name in ("wandb", "pandas", "hydra", "hydra.core", "hydra.core.config_store"):
            sys.modules.setdefault(name, MagicMock())
        from nanomod.configuration import GPTConfig
        from nanomod.model import GPT

        config = GPTConfig(
            block_size=self.seq,
            vocab_size=VOCAB,
            n_layer=layers,
            n_head=4,
            n_embd=48,
            bias=False,
            capacity_ratio=capacity,
            use_mod=routed,
        )
        return GPT(config).eval()

    def build(self, layers: int = 4, capacity: float = 0.125) -> None:
        self.built_with = {"layers": layers, "capacity": capacity}
        self.model = self.gpt(layers, capacity, routed=True)
        redraw(self.model)
        self.routed = [
            RoutedLayer(
                layer=layer,
                router=layer.router,
                entry=layer.ln_1,
                parts=[layer.attn, layer.mlp],
                whole=False,
                silence=[layer.attn.c_proj, layer.mlp.c_proj],
            )
            for layer in self.model.transformer.h
            if hasattr(layer, "router")
        ]

    def call(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            raise NotOfferedError("takes no attention mask")
        return self.model(ids, ids)[0]

    def force_value(self) -> float:
        """At capacity 1 its layer is a dense one and asks no router."""
        return 1.0

    def dense(self, ids: Tensor) -> Tensor:
        base = self.gpt(self.built_with["layers"], 1.0, routed=False)
        base.load_state_dict({k: v for k, v in self.model.state_dict().items() if ".router." not in k})
        with torch.no_grad():
            return base(ids, ids)[0]
