"""`varidepth env`: versions and hardware for bug reports; nothing personal."""

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any


PACKAGES = (
    "varidepth",
    "torch",
    "transformers",
    "huggingface_hub",
    "safetensors",
    "tokenizers",
    "accelerate",
    "peft",
    "datasets",
    "trl",
    "gguf",
    "numpy",
)
VARIABLES = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "CUDA_VISIBLE_DEVICES")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Only the format."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Prints the bundle."""
    bundle = collect()
    if args.json:
        print(json.dumps(bundle, indent=2))
        return
    width = max(len(key) for key in bundle)
    for key, value in bundle.items():
        print(f"{key.ljust(width)}  {value}")


def collect() -> dict[str, Any]:
    """Versions of Python and the packages that matter, accelerators, threads, and variables that change them."""
    import torch

    bundle: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for package in PACKAGES:
        try:
            bundle[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            bundle[package] = "not installed"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    bundle["accelerators"] = ", ".join(devices) or "none"
    bundle["cores"] = os.cpu_count()
    bundle["torch threads"] = torch.get_num_threads()
    for variable in VARIABLES:
        if variable in os.environ:
            bundle[variable] = os.environ[variable]
    return bundle
