"""Shwai-He/Router-Tuning: the modelling code of its Llama checkpoints, which really skips attention.

One decision for a whole sequence is made at the prompt and kept for the tokens that follow.
"""

import importlib
import json
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import torch
from peer import VOCAB, NotOfferedError, Peer, PeerError, RoutedLayer, Store, Trace, redraw, tensor_bytes, watch
from torch import Tensor

from adapters.patched_llama import PatchedLlama, llama


CHECKPOINT = Path("ckpt") / "llama3-8b-instruct-mindskip"


def checkpoint_folder() -> Path:
    """The folder with the code, in the first entry of `sys.path` that has it."""
    return next(Path(entry) / CHECKPOINT for entry in sys.path if (Path(entry) / CHECKPOINT).is_dir())


def modeling() -> Any:
    """The modelling file as part of a package, for it has relative imports."""
    package = types.ModuleType("mindskip_checkpoint")
    package.__path__ = [str(checkpoint_folder())]
    sys.modules.setdefault("mindskip_checkpoint", package)
    return importlib.import_module("mindskip_checkpoint.modeling_llama_mindskip")


class MindSkip(PatchedLlama):
    title = "Router-Tuning (2024)"
    source = f"`LlamaMindSkipForCausalLM` of `{CHECKPOINT}`"
    gate = "sigmoid"
    notes = ("the first and the last layer are not routed; its training script leaves the last one alone",)

    def build(self, layers: int = 4, capacity: float = 0.125) -> None:
        code = modeling()
        config = code.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            is_mindskip=[0 < index < layers - 1 for index in range(layers)],
            granularity="attn_sequence",
            gradient_scale=0.0,
            threshold=0.5,
        )
        self.use(code.LlamaMindSkipForCausalLM(config))
        redraw(self.model, seed=2)  # one at which some sequences are skipped

    def use(self, model: Any) -> None:
        """Take a model."""
        self.model = model.eval()
        self.routed = [
            RoutedLayer(
                layer=layer,
                router=layer.router,
                entry=layer.self_attn,
                parts=[layer.self_attn],
                whole=False,
                silence=[layer.self_attn.o_proj],
                leaves_at=layer.post_attention_layernorm,
            )
            for layer in model.model.layers
            if layer.is_mindskip
        ]

    def capacity_of(self, capacity: float, length: int) -> int:
        raise NotOfferedError("one threshold decision for a whole sequence, no capacity")

    def traces(self, ids: Tensor) -> list[Trace]:
        """All tokens of a sequence or none are selected; attention gets them normalised."""
        with watch(self.routed) as seen:
            self.routing_outputs(ids)
        traces = []
        for record in seen:
            x, y = record["x"][0][0], record["y"][0][0]
            selected = torch.arange(len(x) if record["entry"] else 0)
            block = x + record["part0"][0][0] if record["entry"] else x[:0]
            traces.append(Trace(x, y, selected, block, record["router"][0].flatten()[:1].expand(len(x))))
        return traces

    def dense(self, ids: Tensor) -> Tensor:
        base = llama(len(self.model.model.layers))
        weights = self.model.state_dict()
        base.load_state_dict({name: weights[name] for name in base.state_dict()})
        with torch.no_grad():
            return base(ids).logits

    def store(self, ids: Tensor, prompt: int) -> list[Store]:
        """Skipped layers are absent from its cache: what routed layers hold is what dense ones do not."""
        dense_layers = len(self.model.model.layers) - len(self.routed)
        sizes: list[tuple[int, int, int]] = []

        def after_step(cache: Any) -> None:
            layers = [cache[index] for index in range(len(cache))]
            entries = sum(keys.shape[-2] for keys, _ in layers)
            calls = sum(entry.shape[1] for record in seen for entry in record["entry"])
            sizes.append((calls, entries, sum(tensor_bytes(*layer) for layer in layers)))
            dense.append(tensor_bytes(*layers[0]))

        dense: list[int] = []
        with watch(self.routed) as seen:
            self.steps(ids, prompt, after_step)
        steps = ids.shape[1] - prompt
        return [
            Store(
                decoded=steps * len(self.routed),
                decoded_routed=sizes[-1][0] - sizes[0][0],
                decoded_stored=sizes[-1][1] - sizes[0][1] - steps * dense_layers,
                size=sizes[-1][2] - dense_layers * dense[-1],
                dense_size=len(self.routed) * dense[-1],
            )
        ]

    def save_and_load(self, folder: Path) -> Peer:
        self.model.save_pretrained(folder)
        again = type(self)()
        again.use(type(self.model).from_pretrained(folder))
        return again

    def auto_outputs(self, folder: Path, ids: Tensor) -> Tensor:
        """With the files and the `auto_map` of its checkpoint folder, as it is to be uploaded."""
        from transformers import AutoModelForCausalLM

        self.model.save_pretrained(folder)
        source = checkpoint_folder()
        for file in source.glob("*.py"):
            shutil.copy(file, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        theirs = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config |= {"auto_map": theirs["auto_map"], "model_type": theirs["model_type"]}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        except (AttributeError, ImportError, ValueError) as error:
            message = re.sub(r"transformers_modules\.\w+\.", "", str(error).splitlines()[0])
            raise PeerError(f"raises {type(error).__name__}: {message[:140]}") from error
        return loaded.eval()(ids, use_cache=False).logits
