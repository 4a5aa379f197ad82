"""sramshetty/mixture-of-depths: Llama 2 with fairscale layers, one class for training and one for inference.

Its second folder is a checkout of meta-llama/llama, whose layers it imports.
"""

import os
import tempfile
from typing import Any

import torch
from peer import VOCAB, NotOfferedError, Peer, RoutedLayer, Store, redraw, tensor_bytes, watch
from torch import Tensor


ROWS = 6


class Sramshetty(Peer):
    title = "sramshetty"
    source = "`routing_transformer.MoDTransformer` to route by capacity, `inference.MoDTransformer` to generate"
    gate = "sigmoid"
    trains_to_route = True
    notes = (
        "`Tensor.cuda` is made to do nothing, for its caches are put on a GPU unconditionally",
        "the auxiliary-loss variant, whose decoding rule is sigmoid > 0.5",
        "its inference code marks batches as still to do",
        "caches are set to zero before every sequence",
    )

    def build(self, layers: int = 4, capacity: float = 0.125) -> None:
        torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign]
        start_model_parallel()
        from mixture_of_depths import inference, routing_transformer

        self.built_with = {"layers": layers, "capacity": capacity}
        sizes: dict[str, Any] = {
            "dim": 48,
            "n_layers": layers,
            "n_heads": 4,
            "vocab_size": VOCAB,
            "multiple_of": 16,
            "max_batch_size": ROWS,
            "max_seq_len": self.seq,
            "capacity": int(capacity * self.seq),
        }
        self.model = routing_transformer.MoDTransformer(routing_transformer.ModelArgs(**sizes))
        self.dense_model = routing_transformer.MoDTransformer(routing_transformer.ModelArgs(**sizes, routing=False))
        self.inference = inference.MoDTransformer(inference.ModelArgs(**sizes)).eval()
        redraw(self.model)
        self.routed = self.routed_layers(self.model)

    def routed_layers(self, model: Any) -> list[RoutedLayer]:
        """Every second layer; all share one router."""
        return [
            RoutedLayer(
                layer=layer,
                router=layer.router,
                entry=layer.attention_norm,
                parts=[layer.attention, layer.feed_forward],
                whole=False,
                silence=[layer.attention.wo, layer.feed_forward.w2],
                router_call=call,
            )
            for call, layer in enumerate(model.layers[1::2])
        ]

    def call(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Training class where it routes by capacity, inference class with an empty cache otherwise."""
        if attention_mask is not None:
            raise NotOfferedError("takes no attention mask; its generate pads to the right")
        if self.model.training:
            return self.model(ids, 0)["output"]
        self.inference.load_state_dict(self.model.state_dict())
        self.clear()
        return self.inference(ids, 0)["output"].clone()

    def clear(self) -> None:
        """Empty the caches."""
        for layer in self.inference.layers:
            layer.attention.cache_k = torch.zeros_like(layer.attention.cache_k)
            layer.attention.cache_v = torch.zeros_like(layer.attention.cache_v)

    def dense(self, ids: Tensor) -> Tensor:
        self.dense_model.load_state_dict(self.model.state_dict(), strict=False)
        with torch.no_grad():
            return self.dense_model(ids, 0)["output"]

    def cached(self, ids: Tensor, prompt: int) -> Tensor:
        outputs = [self.call(ids[:, :prompt])]
        for i in range(prompt, ids.shape[1]):
            outputs.append(self.inference(ids[:, i : i + 1], i)["output"].clone())
        return torch.cat(outputs, dim=1)

    def store(self, ids: Tensor, prompt: int) -> list[Store]:
        routed = self.routed_layers(self.inference)
        with watch(routed) as seen:
            self.cached(ids, prompt)
        stores = []
        for layer, record in zip(routed, seen, strict=True):
            cache, dense = layer.layer.attention, self.inference.layers[0].attention
            stores.append(
                Store(
                    decoded=ids.shape[1] - prompt,
                    decoded_routed=sum(entry.shape[1] for entry in record["entry"][1:]),
                    decoded_stored=int(cache.cache_k[0, prompt:].flatten(1).any(-1).sum()),
                    size=tensor_bytes(cache.cache_k, cache.cache_v),
                    dense_size=tensor_bytes(dense.cache_k, dense.cache_v),
                )
            )
        return stores


def start_model_parallel() -> None:
    """fairscale's layers want a process group, here of this process alone."""
    import fairscale.nn.model_parallel.initialize as model_parallel

    if model_parallel.model_parallel_is_initialized():
        return
    store = os.path.join(tempfile.mkdtemp(), "store")
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    model_parallel.initialize_model_parallel(1)
