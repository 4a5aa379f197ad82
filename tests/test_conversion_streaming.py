"""Conversion holds a few tensors at a time: peak memory stays below 1.3 shards plus one group of layers."""

import json
import os
import subprocess
import sys

import pytest


# Converts a checkpoint of about 225 MB in shards of 50 MB and prints the rise of the resident set over its start.
# Two pico conversions before it load every module.
SCRIPT = """
import json, sys
from pathlib import Path

import torch
from pico_checkpoints import pico_config, save_pico
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from varidepth.conversion.convert import convert


def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


folder, kind = Path(sys.argv[1]), sys.argv[2]
save_pico(folder / "pico")
for name in ("a", "b"):
    convert(folder / "pico", folder / name, num_recursions=2, init="average", quiet=True)

config = pico_config("llama", 16, vocab_size=8192, hidden_size=512, intermediate_size=2048)
with torch.device("meta"):
    shapes = {name: t.shape for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
shapes.pop("lm_head.weight")
shards, size = [{}], 0
for name, shape in shapes.items():
    if size + shape.numel() * 4 > 50e6:
        shards.append({})
        size = 0
    shards[-1][name] = shape
    size += shape.numel() * 4
source = folder / "source"
config.save_pretrained(source)
weight_map = {}
largest = 0
for i, shard in enumerate(shards):
    tensors = {name: torch.full(shape, 0.01) for name, shape in shard.items()}
    ending = "safetensors" if kind == "safetensors" else "bin"
    stem = "model" if kind == "safetensors" else "pytorch_model"
    file = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.{ending}"
    save_file(tensors, source / file) if kind == "safetensors" else torch.save(tensors, source / file)
    largest = max(largest, (source / file).stat().st_size)
    weight_map |= {name: file for name in shard}
(source / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
del tensors

start = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present value
convert(source, folder / "out", num_recursions=2, init="average", max_shard_size="50MB", quiet=True)
peak = resident("VmHWM") - start
layer = sum(s.numel() * 4 for name, s in shapes.items() if name.startswith("model.layers.0."))
total = sum(s.numel() * 4 for s in shapes.values())
print(json.dumps({"peak": peak, "largest": largest, "group": 2 * layer, "total": total}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of the resident set is read from /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_peak_memory(kind, tmp_path, request):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), kind],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(request.path.parent), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    bound = 1.3 * measured["largest"] + measured["group"]
    assert measured["total"] > 2 * bound, "the test would not notice a source that is loaded whole"
    assert measured["peak"] <= bound, measured
    print(measured)
