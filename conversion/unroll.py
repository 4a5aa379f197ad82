"""Back to a vanilla checkpoint of the backbone family, where that computes the same function."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..configuration.backbone_config import family_fields
from ..configuration.routed_config import RoutedConfig
from ..model_cards.card import write_unrolled_card
from .body_tensors import LAYER_NAME, common_dtype, copy_of
from .checkpoint_writer import check_output, new_folder, write_weights
from .companion_files import copy_companions
from .errors import ConversionError
from .expert_layout import split_experts
from .recipe import Recipe
from .recipe_fields import ROUTED
from .recursion_tensors import MergedRecursions, is_recursions_own
from .router_tensors import ROUTING_PREFIXES, routers_are_open
from .source_checkpoint import check_tensors, open_source
from .tensor_source import TensorSource


def unroll(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    quiet: bool = False,
) -> PreTrainedConfig:
    """Writes every layer, and every repetition of a shared one, as a layer of its own.

    That is exact where every token runs everything: without routing, at a capacity of 1, or while the routers still
    let everything through as conversion left them (zero weights, a gate of exactly 1).

    Args:
        source (`str` or `Path`): folder or Hub id of a MoR or MoD.
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
    checkpoint = open_source(source, revision=revision, allowed=tuple(ROUTED))
    config: Any = checkpoint.config
    weights = checkpoint.weights
    refuse_inexact(config, weights)
    vanilla = vanilla_config(config)
    vanilla.dtype = common_dtype(weights)
    names = _vanilla_names(config, weights)
    if getattr(config, "varies_by_recursion", False):
        physical = config.physical_layers
        weights = MergedRecursions(weights, names, [physical[:i].count(layer) for i, layer in enumerate(physical)])
    else:
        weights = weights.view(names)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(vanilla)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if vanilla.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
        weights = weights.rename({name: name for name in weights.infos if name != "lm_head.weight"})
    check_tensors(weights, expected)
    weights = split_experts(weights, config.backbone)
    targets = [copy_of(weights, name, name, None) for name in weights.infos]
    vanilla.architectures = [type(model).__name__]
    with new_folder(target, sum(tensor.nbytes for tensor in targets), overwrite=overwrite) as folder:
        write_weights(folder, targets, limit, quiet=quiet)
        vanilla.save_pretrained(folder)
        copy_companions(checkpoint, folder)
        write_unrolled_card(folder, checkpoint, vanilla)
    return vanilla


def refuse_inexact(config: Any, weights: TensorSource) -> None:
    """Refuses a model that does not send every token through everything.

    Raises:
        ConversionError: with the reason.
    """
    reason = None
    if getattr(config, "kv_mode", None) == "shared" and config.num_recursions > 1:
        reason = (
            "with kv_mode='shared' deeper recursions read the keys and values of the first one, which no vanilla "
            "model does"
        )
    elif getattr(config, "num_noop_experts", 0):
        reason = "it has experts without effect (`num_noop_experts`), which no vanilla model has"
    elif not routers_are_open(config, weights):
        reason = _why_not_open(config)
    if reason is not None:
        raise ConversionError(f"The model cannot be unrolled: {reason}.")


def _why_not_open(config: Any) -> str:
    if not config.num_routers:
        return f"with routing={config.routing!r} tokens leave at random"
    # of a MoR and of a MoD
    gate, exact = (
        (config.gating, ("interpolate",))
        if config.model_type == "mor"
        else (config.gate, ("straight_through", "one_plus_tanh"))
    )
    if gate not in exact:
        allowed = " or ".join(map(repr, exact))
        return f"its gate is {gate!r}, and only one that is exactly 1 ({allowed}) changes nothing"
    if config.inference_rule == "topk" and not all(routed_pass.always for routed_pass in config.routed_passes):
        return "with inference_rule='topk' tokens leave by their rank"
    return "its routers have learned to treat tokens differently, and a vanilla model treats all alike"


def vanilla_config(config: RoutedConfig) -> PreTrainedConfig:
    """The family's configuration of the unrolled depth; every repetition has the attention type of its layer."""
    metadata = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    values = config.to_dict()
    names = family_fields(config.backbone) | set(metadata)
    fields = {key: value for key, value in values.items() if key in names}
    return CONFIG_MAPPING[config.backbone](**{**fields, "num_hidden_layers": config.num_hidden_layers})


def _vanilla_names(config: Any, weights: TensorSource) -> dict[str, str]:
    """New name -> name in the checkpoint, for all but the tensors of routing and recursions, in the model's order."""
    physical_layers = getattr(config, "physical_layers", range(config.num_hidden_layers))
    parts: dict[int, list[str]] = {}
    outer = []
    for name in weights.infos:
        if is_recursions_own(name):
            continue
        if match := LAYER_NAME.match(name):
            parts.setdefault(int(match[1]), []).append(match[2])
        elif not name.startswith(ROUTING_PREFIXES):
            outer.append(name)
    names = {name: name for name in outer if "embed" in name}
    for layer, physical in enumerate(physical_layers):
        for part in parts.get(physical, []):
            names[f"model.layers.{layer}.{part}"] = f"model.layers.{physical}.{part}"
    return names | {name: name for name in outer}
