"""What the adapters of patched transformers models share: a tiny Llama, and decoding with a DynamicCache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peer import VOCAB, Peer, PeerError, Store, tensor_bytes, watch
from torch import Tensor


def llama(layers: int, **changes: Any) -> Any:
    """A tiny Llama of the installed transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        **changes,
    )
    return LlamaForCausalLM(config).eval()


class PatchedLlama(Peer):
    """A Llama of transformers 4.40 or 4.41 whose layers were wrapped or patched."""

    def call(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        return self.model(ids, attention_mask=attention_mask, position_ids=positions, use_cache=False).logits

    def cached(self, ids: Tensor, prompt: int) -> Tensor:
        return self.steps(ids, prompt, lambda cache: None)

    def steps(self, ids: Tensor, prompt: int, after_step: Callable[[Any], None]) -> Tensor:
        """Prefill and one token at a time, with the arguments that `generate` passes."""
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        outputs = []
        for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
            positions = torch.arange(start, stop)
            out = self.model(
                ids[:, start:stop],
                attention_mask=torch.ones(ids.shape[0], stop, dtype=torch.long),
                position_ids=positions[None].expand(ids.shape[0], -1),
                past_key_values=cache,
                use_cache=True,
                cache_position=positions,
            )
            outputs.append(out.logits)
            cache = out.past_key_values
            after_step(cache)
        return torch.cat(outputs, dim=1)

    def store(self, ids: Tensor, prompt: int) -> list[Store]:
        at = [index for index, layer in enumerate(self.model.model.layers) if self.is_routed(layer)]
        counts: list[list[tuple[int, int, int]]] = []

        def after_step(cache: Any) -> None:
            rows = []
            for record, index in zip(seen, at, strict=True):
                keys, values = cache[index]
                rows.append((self.routed_so_far(record), keys.shape[-2], tensor_bytes(keys, values)))
            counts.append(rows)
            dense.append(tensor_bytes(*cache[0]))

        dense: list[int] = []
        with watch(self.routed) as seen:
            self.steps(ids, prompt, after_step)
        return [
            Store(
                decoded=ids.shape[1] - prompt,
                decoded_routed=last[0] - first[0],
                decoded_stored=last[1] - first[1],
                size=last[2],
                dense_size=dense[-1],
            )
            for first, last in zip(counts[0], counts[-1], strict=True)
        ]

    def auto_outputs(self, folder: Path, ids: Tensor) -> Tensor:
        """Through the class that AutoModelForCausalLM picks, which must find all of its weights."""
        from transformers import AutoModelForCausalLM

        self.model.save_pretrained(folder)
        load: Any = AutoModelForCausalLM.from_pretrained
        loaded, info = load(folder, trust_remote_code=True, output_loading_info=True)
        missing = info["missing_keys"]
        if missing:
            raise PeerError(f"loads a Llama without routers, {len(missing)} of whose tensors are drawn anew")
        return loaded.eval()(ids, use_cache=False).logits

    def is_routed(self, layer: Any) -> bool:
        """Whether this layer of the model routes."""
        return hasattr(layer, "router")

    def routed_so_far(self, record: dict[str, list[Tensor]]) -> int:
        """Tokens that entered the watched layer."""
        return sum(entry.shape[1] for entry in record["entry"])
