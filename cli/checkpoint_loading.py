"""Loads a checkpoint for the commands that run it."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..configuration.backbone_config import BACKBONES
from ..conversion.source_checkpoint import open_source


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_checkpoint(source: str, *, revision: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """The causal language model of a MoR or vanilla checkpoint, in eval mode, and its tokenizer.

    Args:
        source (`str`): folder or Hub id.
        revision (`str`, *optional*): branch, tag or commit of a Hub source.
        dtype (`str`, *optional*): a key of `DTYPES`; by default float32 on a CPU, else as stored.

    Raises:
        ValueError: if it cannot be found or read, is of another family, or has no tokenizer.
    """
    checkpoint = open_source(Path(source) if Path(source).exists() else source, revision=revision, allowed=_ALLOWED)
    if checkpoint.gguf is not None:
        raise ValueError(f"{source} is a GGUF file, which cannot be run here; run `varidepth convert` on it first.")
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
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=kind)
    return model.to("cpu" if on_cpu else "cuda").eval(), tokenizer


_ALLOWED = ("mor", *BACKBONES)
