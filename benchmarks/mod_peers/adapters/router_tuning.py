"""CASE-Lab-UMD/Router-Tuning-Mixture-of-Depths: patches layers of a frozen model with a 0/1 gate.

`RouterTuning` is the granularity of its script (attention, one decision for a sequence); `RouterTuningToken` is the
one closest to Mixture-of-Depths (the block, a decision for each token).
"""

from pathlib import Path
from typing import Any

import torch
from peer import NotOfferedError, Peer, PeerError, RoutedLayer, Trace, redraw
from torch import Tensor

from adapters.patched_llama import PatchedLlama, llama


class RouterTuning(PatchedLlama):
    title = "Router-Tuning (attn, sequence)"
    source = "`utils.model.apply_router_tuning_patch` on a Llama, `granularity='attn_sequence'`"
    granularity = "attn_sequence"
    gate = "sigmoid"

    def build(self, layers: int = 4, capacity: float = 0.125) -> None:
        from utils.model import apply_router_tuning_patch

        base = llama(layers)
        base.config.is_mod = [index % 2 == 1 for index in range(layers)]
        base.config.granularity = self.granularity
        self.use(apply_router_tuning_patch(base))
        redraw(self.model)

    def use(self, model: Any) -> None:
        """Take a patched model."""
        self.model = model.eval()
        whole_block = "block" in self.granularity
        self.routed = [
            RoutedLayer(
                layer=layer,
                router=layer.router,
                entry=layer,
                parts=[layer.self_attn, layer.mlp] if whole_block else [layer.self_attn],
                whole=False,
                silence=[layer.self_attn.o_proj, layer.mlp.down_proj],
                leaves_at=None if whole_block else layer.post_attention_layernorm,
            )
            for layer in model.model.layers
            if self.is_routed(layer)
        ]

    def capacity_of(self, capacity: float, length: int) -> int:
        raise NotOfferedError("a threshold on every router output, no capacity")

    def traces(self, ids: Tensor) -> list[Trace]:
        """The update of every token is computed and masked afterwards: the router's outputs say which count."""
        traces = []
        for trace, routed in zip(super().traces(ids), self.routed, strict=True):
            router = trace.router.expand(len(trace.x))
            selected = (router.sigmoid() >= routed.layer.threshold).nonzero().flatten()
            traces.append(Trace(trace.x, trace.y, selected, trace.block[selected], router))
        return traces

    def routed_so_far(self, record: dict[str, list[Tensor]]) -> int:
        return sum(int((output.sigmoid() >= 0.5).sum()) for output in record["router"])

    def base_model(self) -> Any:
        """The unpatched model with the same weights."""
        base = llama(len(self.model.model.layers))
        weights = self.model.state_dict()
        base.load_state_dict({name: weights[name] for name in base.state_dict()})
        return base

    def dense(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.base_model()(ids).logits

    def save_and_load(self, folder: Path) -> Peer:
        """As its training script: routers alone are saved, and loaded into a model that was patched again."""
        from safetensors.torch import load_file
        from utils.model import apply_router_tuning_patch

        routers = {name: value for name, value in self.model.named_parameters() if "router" in name}
        self.model.save_pretrained(folder, state_dict=routers)
        base = self.base_model()
        base.config.is_mod, base.config.granularity = self.model.config.is_mod, self.granularity
        again = type(self)()
        again.use(apply_router_tuning_patch(base))
        again.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        return again

    def auto_outputs(self, folder: Path, ids: Tensor) -> Tensor:
        try:
            return super().auto_outputs(folder, ids)
        except RuntimeError as error:
            raise PeerError("save_pretrained refuses the patched model, whose layers are registered twice") from error


class RouterTuningToken(RouterTuning):
    title = "Router-Tuning (block, token)"
    source = "the same with `granularity='block_token'`"
    granularity = "block_token"
