"""astramind-ai/Mixture-of-depths, on PyPI as mixture-of-depth: wraps every second layer of a transformers model."""

from pathlib import Path
from typing import Any

import torch
from peer import Peer, RoutedLayer, redraw
from torch import Tensor

from adapters.patched_llama import PatchedLlama, llama


class Astramind(PatchedLlama):
    title = "astramind"
    source = "`MoD.apply_mod_to_hf` on a Llama, as in its README"
    notes = (
        "`position_ids` are always passed, as `generate` passes them",
        "the capacity is set on the layers, for want of an argument; its schedule in training mode is not run",
    )

    def build(self, layers: int = 4, capacity: float = 0.125) -> None:
        from MoD import apply_mod_to_hf

        base = llama(layers, architectures=["LlamaForCausalLM"])
        type(base).__name__ = "LlamaForCausalLM"  # conversion renames the class for the whole process
        self.use(apply_mod_to_hf(base))
        redraw(self.model)
        for routed in self.routed:
            routed.layer.capacity = capacity

    def use(self, model: Any) -> None:
        """Take a model whose layers are wrapped."""
        self.model = model.eval()
        self.routed = [
            RoutedLayer(
                layer=layer,
                router=layer.router,
                entry=layer.block,
                parts=[layer.block],
                whole=True,
                silence=[layer.block.self_attn.o_proj, layer.block.mlp.down_proj],
            )
            for layer in model.model.layers
            if self.is_routed(layer)
        ]

    def dense(self, ids: Tensor) -> Tensor:
        base = llama(len(self.model.model.layers))
        weights = {name.replace(".block.", "."): value for name, value in self.model.state_dict().items()}
        base.load_state_dict({name: value for name, value in weights.items() if ".router." not in name})
        with torch.no_grad():
            return base(ids).logits

    def save_and_load(self, folder: Path) -> Peer:
        from MoD import AutoMoDModelForCausalLM

        self.model.save_pretrained(folder)
        again = type(self)()
        again.use(AutoMoDModelForCausalLM.from_pretrained(str(folder)))
        for routed, old in zip(again.routed, self.routed, strict=True):
            routed.layer.capacity = old.layer.capacity
        return again
