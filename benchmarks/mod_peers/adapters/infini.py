"""dingo-actual/infini-transformer: a Mixture-of-Depths layer with compressive memory, per segment."""

from typing import Any

import torch
from peer import RoutedLayer, first_tensor, redraw
from torch import Tensor, nn

from adapters.single_layer import IN_STACK, WIDTH, Block, SingleLayer, Stack


class First(nn.Module):
    """The layer without the masks and scores that it returns, and with a copy of its input, which it overwrites."""

    inner: Any

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, x: Tensor) -> Tensor:
        return first_tensor(self.inner(x.clone()))


class Infini(SingleLayer):
    title = "infini-transformer"
    source = "the layer `infini_transformer.MoDInfiniTransformer`, one segment"
    trains_to_route = True
    notes = (IN_STACK,)

    def layer(self, kind: str, **changes: Any) -> nn.Module:
        import infini_transformer

        return getattr(infini_transformer, kind)(
            dim_input=WIDTH,
            dim_hidden=2 * WIDTH,
            dim_key=12,
            dim_value=12,
            num_heads=4,
            activation="relu",
            segment_len=self.seq,
            causal=True,
            **changes,
        )

    def build(self, layers: int = 4, capacity: float = 0.125) -> None:
        self.built_with = {"layers": layers, "capacity": capacity}
        factor = round(1 / capacity)
        stack = [
            First(self.layer("MoDInfiniTransformer", sampling_factor=factor)) if i % 2 else Block()
            for i in range(layers)
        ]
        self.model = Stack(stack).eval()
        redraw(self.model)
        self.routed = [
            RoutedLayer(
                layer=layer,
                router=layer.inner.proj_sampling,
                entry=layer.inner.attn,
                parts=[layer.inner.mlp],
                whole=False,
                silence=[layer.inner.mlp[3]],
            )
            for layer in self.model.layers
            if isinstance(layer, First)
        ]

    def dense(self, ids: Tensor) -> Tensor:
        layers: list[nn.Module] = []
        for layer in self.model.layers:
            if isinstance(layer, First):
                dense = self.layer("InfiniTransformer")
                weights = layer.inner.state_dict()
                dense.load_state_dict({name: weights[name] for name in dense.state_dict()})
                layer = dense
            layers.append(layer)
        base = Stack(layers)
        base.emb, base.norm, base.head = self.model.emb, self.model.norm, self.model.head
        with torch.no_grad():
            return base(ids)
