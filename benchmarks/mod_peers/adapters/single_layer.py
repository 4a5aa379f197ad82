"""Two implementations that are one layer around a block of the user's: kyegomez/Mixture-of-Depths and Mixture-AI.

They get a block written here (causal attention and an MLP, both with residual connections, no positions) and stand at
every second place of a stack with an embedding and a head.
"""

import sys
from collections.abc import Sequence
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from peer import VOCAB, NotOfferedError, Peer, RoutedLayer, Store, redraw
from torch import Tensor, nn


WIDTH = 48
IN_STACK = (
    "at every second place of a stack written here; it generates nothing itself, so evaluation mode stands for that"
)


class Block(nn.Module):
    """Pre-norm decoder block; position is known to it only through the causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attention_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attention_out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Stack(nn.Module):
    """Embedding, layers, norm and head."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class SingleLayer(Peer):
    """The stack around a peer's layer."""

    router_name = "router"

    def wrap(self, block: nn.Module, capacity: float) -> nn.Module:
        """The peer's layer around a block."""
        raise NotImplementedError

    def build(self, layers: int = 4, capacity: float = 0.125) -> None:
        self.built_with = {"layers": layers, "capacity": capacity}
        self.model = Stack([self.wrap(Block(), capacity) if i % 2 else Block() for i in range(layers)]).eval()
        redraw(self.model)
        self.routed = [
            RoutedLayer(
                layer=layer,
                router=getattr(layer, self.router_name),
                entry=layer.transformer_block,
                parts=[layer.transformer_block],
                whole=True,
                silence=[layer.transformer_block.attention_out, layer.transformer_block.down],
            )
            for layer in self.model.layers
            if not isinstance(layer, Block)
        ]

    def call(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            raise NotOfferedError("takes no attention mask")
        return self.model(ids)

    def dense(self, ids: Tensor) -> Tensor:
        blocks = [layer if isinstance(layer, Block) else layer.transformer_block for layer in self.model.layers]
        base = Stack(blocks)
        base.emb, base.norm, base.head = self.model.emb, self.model.norm, self.model.head
        with torch.no_grad():
            return base(ids)

    def cached(self, ids: Tensor, prompt: int) -> Tensor:
        raise NotOfferedError("a layer without a cache")

    def store(self, ids: Tensor, prompt: int) -> list[Store]:
        raise NotOfferedError("a layer without a cache")

    def auto_outputs(self, folder: object, ids: Tensor) -> Tensor:
        raise NotOfferedError("a layer, not a model")


class Kyegomez(SingleLayer):
    title = "kyegomez"
    source = "the layer `mixture_of_depths.main.MoD`"
    gate = "softmax"
    notes = (
        IN_STACK,
        "zeta.nn is replaced by a stand-in: the layer uses nothing of it",
    )

    def wrap(self, block: nn.Module, capacity: float) -> nn.Module:
        sys.modules.setdefault("zeta", MagicMock())
        sys.modules.setdefault("zeta.nn", MagicMock())
        from mixture_of_depths.main import MoD

        return MoD(seq_len=self.seq, dim=WIDTH, capacity_factor=capacity, transformer_block=block, vocab_size=VOCAB)


class MixtureAI(SingleLayer):
    title = "Mixture-AI"
    source = "the layer `MoD.MoDTransformerBlock`"
    trains_to_route = True
    router_name = "router_mlp"
    notes = (IN_STACK,)

    def wrap(self, block: nn.Module, capacity: float) -> nn.Module:
        from MoD import MoDTransformerBlock

        return MoDTransformerBlock(block, hidden_size=WIDTH, capacity=capacity)
