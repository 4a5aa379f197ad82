"""Back to a vanilla checkpoint of the backbone family, where that computes the same function."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..configuration.backbone_config import family_fields
from ..configuration.configuration_mor import MoRConfig
from ..model_cards.card import write_unrolled_card
from .checkpoint_writer import TargetTensor, check_output, new_folder, write_weights
from .companion_files import copy_companions
from .errors import ConversionError
from .mor_tensors import routers_are_open
from .recipe import Recipe
from .source_checkpoint import check_tensors, open_source
from .tensor_source import TensorSource
from .vanilla_to_mor import LAYER_NAME, common_dtype, copy_of


def unroll(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    quiet: bool = False,
) -> PreTrainedConfig:
    """Writes every repetition of a shared layer as a layer of its own.

    That is exact where every token runs every recursion: without routing, or while the routers still let everything
    through as conversion left them (zero weights, a gate of exactly 1).

    Args:
        source (`str` or `Path`): folder or Hub id of a MoR.
        output (`str` or `Path`): folder to make; it appears only when it is complete.
        revision (`str`, *optional*): of a Hub source.
        max_shard_size (`str`): largest weight file.
        overwrite (`bool`): replace a checkpoint that is in `output`.
        quiet (`bool`): no progress on stderr.

    Returns:
        `PreTrainedConfig`: the vanilla configuration.

    Raises:
        ConversionError: if unrolling would change what the model computes, or the source or the output is unfit.
    """
    target = Path(output)
    limit = Recipe(max_shard_size=max_shard_size).max_shard_bytes
    check_output(target, Path(source) if Path(source).exists() else None, overwrite=overwrite)
    checkpoint = open_source(source, revision=revision, allowed=("mor",))
    config: Any = checkpoint.config
    weights = checkpoint.weights
    refuse_inexact(config, weights)
    vanilla = vanilla_config(config)
    vanilla.dtype = common_dtype(weights)
    targets = _repeated(config, weights)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(vanilla)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if vanilla.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
        targets = [tensor for tensor in targets if tensor.name != "lm_head.weight"]
    check_tensors(TensorSource({t.name: torch.empty(t.shape, device="meta") for t in targets}), expected)
    vanilla.architectures = [type(model).__name__]
    with new_folder(target, sum(tensor.nbytes for tensor in targets), overwrite=overwrite) as folder:
        write_weights(folder, targets, limit, quiet=quiet)
        vanilla.save_pretrained(folder)
        copy_companions(checkpoint, folder)
        write_unrolled_card(folder, checkpoint, vanilla)
    return vanilla


def refuse_inexact(config: MoRConfig, weights: TensorSource) -> None:
    """Refuses a model that does not send every token through every recursion.

    Raises:
        ConversionError: with the reason.
    """
    if config.kv_mode == "shared" and config.num_recursions > 1:
        raise ConversionError(
            "The model cannot be unrolled: with kv_mode='shared' deeper recursions read the keys and values of the "
            "first one, which no vanilla model does."
        )
    if config.routing == "none":
        return
    if config.gating != "interpolate":
        raise ConversionError(
            f"The model cannot be unrolled: its gate is {config.gating!r}, and only routing='none' or a gate of "
            "'interpolate' at exactly 1 computes what a vanilla model does."
        )
    if config.inference_rule == "topk" and min(config.capacities or [1.0]) < 1:
        raise ConversionError("The model cannot be unrolled: with inference_rule='topk' tokens leave by their rank.")
    balancing = weights.read("model.balancing_bias") if "model.balancing_bias" in weights.infos else None
    groups = ["routers"] + (["predictors"] if config.inference_rule == "predictor" else [])
    for group in groups:
        names = (f"model.{group}.weight", f"model.{group}.bias")
        if names[0] not in weights.infos:
            raise ConversionError(f"The weights lack {names[0]}; the checkpoint is incomplete.")
        bias = weights.read(names[1]) if names[1] in weights.infos else None
        if not routers_are_open(config, weights.read(names[0]), bias, balancing):
            raise ConversionError(
                "The model cannot be unrolled: its routers have learned to treat tokens differently, and a vanilla "
                "model treats all alike."
            )


def vanilla_config(config: MoRConfig) -> PreTrainedConfig:
    """The family's configuration of the unrolled depth; every repetition has the attention type of its layer."""
    metadata = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    values = config.to_dict()
    names = family_fields(config.backbone) | set(metadata)
    fields = {key: value for key, value in values.items() if key in names}
    return CONFIG_MAPPING[config.backbone](**{**fields, "num_hidden_layers": config.num_hidden_layers})


def _repeated(config: MoRConfig, weights: TensorSource) -> list[TargetTensor]:
    parts: dict[int, list[str]] = {}
    outer = []
    for name in weights.infos:
        if match := LAYER_NAME.match(name):
            parts.setdefault(int(match[1]), []).append(match[2])
        elif not name.startswith(
            ("model.routers.", "model.predictors.", "model.balancing_bias", "model.routing_step")
        ):
            outer.append(name)
    targets = [copy_of(weights, name, name, None) for name in outer if "embed" in name]
    for layer, physical in enumerate(config.physical_layers):
        targets += [
            copy_of(weights, f"model.layers.{layer}.{part}", f"model.layers.{physical}.{part}", None)
            for part in parts.get(physical, [])
        ]
    return targets + [copy_of(weights, name, name, None) for name in outer if "embed" not in name]
