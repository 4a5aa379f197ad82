"""NijatZeynalov/mixture-of-depths-routers-llama: every layer's output is mixed with its input by a soft gate."""

from pathlib import Path
from typing import Any

import torch
from peer import NotOfferedError, Peer, RoutedLayer, redraw
from torch import Tensor

from adapters.patched_llama import PatchedLlama, llama


class SoftRouters(PatchedLlama):
    title = "NijatZeynalov"
    source = (
        "`mod_router.attach_mod_routers` on a Llama, `pattern='every_other'`, `hard_threshold=0.5` as in its README"
    )
    gate = "sigmoid"
    notes = (
        "forwards use the cache, as `generate` does; without it a whole layer is skipped where the mean gate is low",
    )

    def build(self, layers: int = 4, capacity: float = 0.125) -> None:
        from mod_router import RouterConfig, attach_mod_routers

        config = RouterConfig(router_hidden_size=24, pattern="every_other", hard_threshold=0.5)
        self.use(attach_mod_routers(llama(layers), config))
        redraw(self.model)

    def use(self, model: Any) -> None:
        """Take a model whose layers are wrapped."""
        self.model = model.eval()
        self.routed = [
            RoutedLayer(
                layer=layer,
                router=layer.router.net,
                entry=layer.base_layer,
                parts=[layer.base_layer],
                whole=True,
                silence=[layer.base_layer.self_attn.o_proj, layer.base_layer.mlp.down_proj],
            )
            for layer in model.model.layers
            if self.is_routed(layer)
        ]

    def capacity_of(self, capacity: float, length: int) -> int:
        raise NotOfferedError("a soft gate on every token, no capacity")

    def call(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        return self.model(ids, attention_mask=attention_mask, position_ids=positions, use_cache=True).logits

    def dense(self, ids: Tensor) -> Tensor:
        base = llama(len(self.model.model.layers))
        weights = {name.replace(".base_layer.", "."): value for name, value in self.model.state_dict().items()}
        base.load_state_dict({name: weights[name] for name in base.state_dict()})
        with torch.no_grad():
            return base(ids).logits

    def save_and_load(self, folder: Path) -> Peer:
        """As its training script saves and its README loads."""
        from mod_router import load_with_routers

        self.model.save_pretrained(folder)
        self.model.router_config.save_json(str(folder / "router_config.json"))
        again = type(self)()
        again.use(load_with_routers(str(folder), hard_threshold=0.5))
        return again
