"""varidepth's own Mixture-of-Depths."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peer import VOCAB, Peer, PeerError, RoutedLayer, Store, redraw, tensor_bytes, watch
from torch import Tensor


# loads a checkpoint through its own code in a process that cannot import varidepth
LOAD_REMOTE = """
import sys
sys.modules["varidepth"] = None
import torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(torch.load(folder + "/ids.pt")).logits, folder + "/logits.pt")
"""


class Varidepth(Peer):
    title = "varidepth"
    source = "`MoDForCausalLM`, Llama layers, gate `raw`, rule `threshold`"
    trains_to_route = True
    notes = ("AutoModel runs in a process that cannot import varidepth, with `trust_remote_code=True`",)

    def build(self, layers: int = 4, capacity: float = 0.125) -> None:
        from varidepth import MoDConfig, MoDForCausalLM

        config = MoDConfig(
            backbone="llama",
            vocab_size=VOCAB,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            capacity=capacity,
            routed_layers=list(range(1, layers, 2)),
            routing_unit="block",
            gate="raw",
            inference_rule="threshold",
        )
        self.use(MoDForCausalLM(config))
        redraw(self.model)

    def use(self, model: Any) -> None:
        """Take a model; no module sees a routed layer's whole input and output, so its neighbours are watched."""
        self.model = model.eval()
        stack = model.model
        after = [*stack.layers[1:], stack.norm]
        self.at = list(model.config.routed_layers)
        self.routed = [
            RoutedLayer(
                layer=stack.routers,
                router=stack.routers,
                entry=stack.layers[index],
                parts=[stack.layers[index]],
                whole=True,
                silence=[stack.layers[index].self_attn.o_proj, stack.layers[index].mlp.down_proj],
                leaves_at=after[index],
                router_call=call,
            )
            for call, index in enumerate(self.at)
        ]

    def call(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        return self.model(ids, attention_mask=attention_mask, position_ids=positions, use_cache=False).logits

    def dense(self, ids: Tensor) -> Tensor:
        from transformers import LlamaConfig, LlamaForCausalLM

        own = self.model.config
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        shape = {
            name: getattr(own, name) for name in (*names, "num_key_value_heads", "rms_norm_eps", "rope_parameters")
        }
        base = LlamaForCausalLM(LlamaConfig(**shape)).eval()
        weights = self.model.state_dict()
        base.load_state_dict({name: weights[name] for name in base.state_dict()})
        with torch.no_grad():
            return base(ids).logits

    def steps(self, ids: Tensor, prompt: int) -> list[Any]:
        """Outputs of the prefill and of every step, with the arguments that `generate` passes."""
        outputs: list[Any] = []
        for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
            outputs.append(
                self.model(
                    ids[:, start:stop],
                    attention_mask=torch.ones(ids.shape[0], stop, dtype=torch.long),
                    position_ids=torch.arange(start, stop)[None].expand(ids.shape[0], -1),
                    cache=outputs[-1].cache if outputs else None,
                    use_cache=True,
                )
            )
        return outputs

    def cached(self, ids: Tensor, prompt: int) -> Tensor:
        return torch.cat([output.logits for output in self.steps(ids, prompt)], dim=1)

    def store(self, ids: Tensor, prompt: int) -> list[Store]:
        """Routed tokens are those that the layer was called with, bytes those of its buffers with room to grow."""
        counts = []
        for length in (prompt, ids.shape[1]):
            with watch(self.routed) as seen:
                cache = self.steps(ids[:, :length], prompt)[-1].cache
            routed = [sum(entry.shape[1] for entry in record["entry"]) for record in seen]
            counts.append((routed, [sum(cache.layers[index].index.lengths) for index in self.at]))
        (routed_before, stored_before), (routed_after, stored_after) = counts
        dense = tensor_bytes(cache.layers[0].keys, cache.layers[0].values)
        return [
            Store(
                decoded=ids.shape[1] - prompt,
                decoded_routed=routed_after[i] - routed_before[i],
                decoded_stored=stored_after[i] - stored_before[i],
                size=tensor_bytes(cache.layers[index].keys, cache.layers[index].values),
                dense_size=dense,
            )
            for i, index in enumerate(self.at)
        ]

    def save_and_load(self, folder: Path) -> Peer:
        self.model.save_pretrained(folder)
        again = type(self)()
        again.use(type(self.model).from_pretrained(folder))
        return again

    def auto_outputs(self, folder: Path, ids: Tensor) -> Tensor:
        self.model.save_pretrained(folder)
        torch.save(ids, folder / "ids.pt")
        environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", LOAD_REMOTE, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise PeerError(f"the fresh process ends with {done.stderr.strip().splitlines()[-1][:140]}")
        return torch.load(folder / "logits.pt")
