"""Loads a checkpoint for the commands that run it."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..configuration.backbone_config import BACKBONES, MOE_BACKBONES
from ..configuration.routed_config import RoutedConfig
from ..conversion.complete_loading import load_complete
from ..conversion.recipe_fields import ARCHITECTURES
from ..conversion.source_checkpoint import open_source, vanilla_weights


COMPUTE_HELP = "operating point of a calibrated model: share of the FLOPs of all tokens in all layers"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_checkpoint(
    source: str, *, revision: str | None = None, dtype: str | None = None, compute: float | None = None
) -> tuple[Any, Any]:
    """The causal language model of a routed or vanilla checkpoint, in eval mode, and its tokenizer.

    Args:
        source (`str`): folder or Hub id.
        revision (`str`, *optional*): branch, tag or commit of a Hub source.
        dtype (`str`, *optional*): a key of `DTYPES`; by default float32 on a CPU, else as stored.
        compute (`float`, *optional*): operating point of a calibrated model; by default what its configuration says.

    Raises:
        ValueError: if it cannot be found or read, is of another family, has no tokenizer, its weights are not those
            of its configuration, or it has no such operating point.
    """
    checkpoint = open_source(Path(source) if Path(source).exists() else source, revision=revision, allowed=_ALLOWED)
    if checkpoint.gguf is not None:
        raise ValueError(f"{source} is a GGUF file, which cannot be run here; run `varidepth convert` on it first.")
    operating_point = {}
    if compute is not None:
        _require_operating_point(checkpoint.name, checkpoint.config, compute)
        operating_point["compute"] = compute
    on_cpu = not torch.cuda.is_available()
    kind = DTYPES[dtype] if dtype else torch.float32 if on_cpu else "auto"
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    except Exception as error:
        raise ValueError(
            f"The checkpoint {checkpoint.name} has no tokenizer that can be read; put tokenizer.json or the other "
            "tokenizer files of its base model into the folder."
        ) from error
    transformers.logging.disable_progress_bar()
    model = load_complete(checkpoint.folder, checkpoint.name, dtype=kind, **operating_point)
    return model.to("cpu" if on_cpu else "cuda").eval(), tokenizer


def load_teacher(source: str | Path, *, revision: str | None = None) -> Any:
    """The vanilla model that a checkpoint was made of, in eval mode: of a folder, a Hub id or a GGUF file.

    Raises:
        ValueError: if it cannot be found or read, or is of another family.
    """
    checkpoint = open_source(Path(source) if Path(source).exists() else source, revision=revision, allowed=_VANILLA)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers.logging.disable_progress_bar()
    if checkpoint.gguf is None:
        kind = torch.float32 if device == "cpu" else "auto"
        return load_complete(checkpoint.folder, checkpoint.name, dtype=kind).to(device).eval()
    weights = vanilla_weights(checkpoint)
    model: Any = AutoModelForCausalLM.from_config(checkpoint.config, dtype=torch.float32)
    # strict but for a tied head, which is no tensor of its own
    model.load_state_dict({name: weights.read(name) for name in weights.infos}, strict=False)
    return model.to(device).eval()


def _require_operating_point(name: str, config: Any, compute: float) -> None:
    if not isinstance(config, RoutedConfig):
        raise ValueError(
            f"`compute` is {compute}, but {name} is a {config.model_type!r} model, whose tokens all run every layer; "
            "leave it out."
        )
    config.thresholds_at(compute)


_VANILLA = (*BACKBONES, *MOE_BACKBONES)
_ALLOWED = (*ARCHITECTURES, *_VANILLA)
