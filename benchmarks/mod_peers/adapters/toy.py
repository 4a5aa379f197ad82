"""paulilioaica/Mixture-Of-Depths: a small decoder that routes half of the tokens in every layer."""

import sys
from unittest.mock import MagicMock

from peer import VOCAB, NotOfferedError, NotPossibleError, Peer, RoutedLayer, Store, redraw
from torch import Tensor


class Paulilioaica(Peer):
    title = "paulilioaica"
    source = "`src.mod_transformer.MixtureOfDepthsTransformer`"
    notes = ("half of the tokens are routed in every layer, whatever capacity a check asks for",)

    def build(self, layers: int = 4, capacity: float = 0.125) -> None:
        from src.mod_transformer import MixtureOfDepthsTransformer

        self.built_with = {"layers": layers, "capacity": capacity}
        self.model = MixtureOfDepthsTransformer(
            decoder_layers_num=layers,
            num_hidden=48,
            num_heads=2,
            seq_len=self.seq,
            vocab_size=VOCAB,
            embedding_dim=48,
        ).eval()
        redraw(self.model)
        self.routed = [
            RoutedLayer(
                layer=layer,
                router=layer.router.linear,
                entry=layer.multihead_attention_masked,
                parts=[layer.feed_forward, layer.layer_norm2],
                whole=True,
                leaves_at=layer.layer_norm3,
            )
            for layer in self.model.decoder.decoders
        ]

    def capacity_of(self, capacity: float, length: int) -> int:
        return length // 2

    def silence(self) -> None:
        raise NotPossibleError("post-norm: a block that writes nothing still normalises its tokens")

    def force_value(self) -> float:
        raise NotOfferedError("half of the tokens are routed, always")

    def call(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            raise NotOfferedError("takes no attention mask")
        return self.model(ids)

    def cached(self, ids: Tensor, prompt: int) -> Tensor:
        raise NotOfferedError("no cache")

    def store(self, ids: Tensor, prompt: int) -> list[Store]:
        raise NotOfferedError("no cache")

    def dense(self, ids: Tensor) -> Tensor:
        raise NotOfferedError("half of the tokens are routed, always")


class Codedestructor(Peer):
    title = "Codedestructor56"
    source = "`transformer.Transformer` with one layer, as its training script has it"
    notes = (
        "its outputs are a softmax over positions",
        "one layer, because its model keeps all layers in one module",
        "sentencepiece, datasets and transformers are replaced by stand-ins: only its tokenizer and data use them",
    )

    def build(self, layers: int = 4, capacity: float = 0.125) -> None:
        for name in ("sentencepiece", "datasets", "transformers"):
            sys.modules.setdefault(name, MagicMock())
        from transformer import Transformer
        from utils import ModelParams

        self.built_with = {"layers": layers, "capacity": capacity}
        params = ModelParams(
            emb_dim=48,
            use_cache=False,
            kv_num_heads=None,
            num_heads=4,
            device="cpu",
            max_seq_len=self.seq,
            max_batch_size=6,
            ffn_hidden_dim=96,
            theta=None,
            thresh=None,
            n_layers=1,
            vocab_size=VOCAB,
            div_batch=1,
            k_tokens=int(capacity * self.seq),
        )
        self.model = Transformer(params).eval()
        redraw(self.model)
        encoder = self.model.mod.encoders[0]
        self.routed = [
            RoutedLayer(
                layer=self.model.mod,
                router=self.model.mod.r_weight_layers[0],
                entry=encoder,
                parts=[encoder],
                whole=True,
                silence=[encoder.attention.wo, encoder.ffn.w3],
            )
        ]

    def call(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            raise NotOfferedError("takes no attention mask")
        return self.model(ids, None)

    def dense(self, ids: Tensor) -> Tensor:
        raise NotOfferedError("has no dense model")
