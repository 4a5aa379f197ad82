"""Checkpoints of the official code of JRT-RNN and of Based, its causal baseline.

Their config.json is that of a GPT-2 with the mixers as entries of its own, and their weights carry the prefix of the
training loop and its counters. The mixer of each layer, its feature size and its taps are read off names and shapes.
What no weight tells (heads, window, prefix, epsilon) is what config.json says, or else as in the released models.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..configuration.configuration_jrt import JRTConfig
from ..modeling.modeling_jrt import JRTForCausalLM
from .blueprint import Blueprint, empty_model, make_config
from .body_tensors import common_dtype, copy_of
from .checkpoint_writer import TargetTensor
from .errors import ConversionError
from .plan import ConversionPlan, PlannedLayer, spans
from .planned_cost import recurrent_cost
from .recipe import DTYPES, Recipe
from .source_checkpoint import DERIVED, SourceCheckpoint, and_more, check_tensors
from .tensor_source import TensorSource


_EMBEDDING = "transformer.embeddings.word_embeddings.weight"
_HEAD = "lm_head.weight"
_MIXER = re.compile(r"^transformer\.layers\.(\d+)\.mixer\.(\w+)\.")
# projections that tell a mixer from the others
_KINDS = {"proj_q": "linear_attention", "Wqkv": "sliding_attention", "in_proj": "conv"}
_ENTRIES = ("alt_mixer", "alt_mixer_2", "mixer")
_RELEASED = {"heads": 16, "feature_dim": 16, "taps": 3, "enc_length": 1024, "window_size": 256}
# by what the official code rounds sizes up
_VOCABULARY_MULTIPLE, _WIDTH_MULTIPLE = 8, 256
# settings that change the function and leave no trace in the weights, with the value that this package computes
_FIXED: dict[str, Any] = {
    "activation_function": "swiglu",
    "rms_norm": True,
    "prenorm": True,
    "parallel_block": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "rotary_emb_fraction": 1,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
}


_OUTER = {"model.embed_tokens.weight": _EMBEDDING, "model.norm.weight": "transformer.ln_f.weight"}
# what the parts of a layer are called there; those of one tensor in the order of their rows
_LAYER_PARTS = {
    "input_layernorm.weight": "norm1.weight",
    "post_attention_layernorm.weight": "norm2.weight",
    "mlp.up_proj.weight": "mlp.fc1.weight",
    "mlp.gate_proj.weight": "mlp.fc1.weight",
    "mlp.down_proj.weight": "mlp.fc2.weight",
    "linear_attn.q_proj.weight": "mixer.proj_q.weight",
    "linear_attn.k_proj.weight": "mixer.proj_k.weight",
    "linear_attn.v_proj.weight": "mixer.proj_v.weight",
    "linear_attn.prefix_k_proj.weight": "mixer.proj_k_enc.weight",
    "linear_attn.prefix_v_proj.weight": "mixer.proj_v_enc.weight",
    "linear_attn.o_proj.weight": "mixer.out_proj.weight",
    "self_attn.q_proj.weight": "mixer.Wqkv.weight",
    "self_attn.k_proj.weight": "mixer.Wqkv.weight",
    "self_attn.v_proj.weight": "mixer.Wqkv.weight",
    "self_attn.o_proj.weight": "mixer.out_proj.weight",
    "conv.in_proj.weight": "mixer.in_proj.weight",
    "conv.in_proj.bias": "mixer.in_proj.bias",
    "conv.conv.weight": "mixer.conv.conv.weight",
    "conv.out_proj.weight": "mixer.out_proj.weight",
    "conv.out_proj.bias": "mixer.out_proj.bias",
}


def jrt_blueprint(source: SourceCheckpoint, recipe: Recipe) -> Blueprint:
    """Plans the conversion of an official checkpoint of JRT-RNN or Based; the function it computes stays the same.

    Args:
        source (`SourceCheckpoint`): for which `is_official_jrt` holds.
        recipe (`Recipe`): fields that go before what config.json says.

    Raises:
        ConversionError: if a tensor is missing, unknown or of another shape than the configuration says, the head
            differs from the embedding, or config.json describes another function.
    """
    weights, left_out = _plain_names(source.weights)
    mixers = _mixers(weights, source.config.n_layer)
    fields = _fields(source, weights, mixers, recipe)
    config = make_config(lambda: JRTConfig(**{**fields, **recipe.fields}))
    written = DTYPES[recipe.dtype] if recipe.dtype else None
    config.dtype = written or common_dtype(weights)
    model = empty_model(JRTForCausalLM, config)
    targets = _targets(weights, model, written)
    _check_settings(source.raw_config, config, recipe)
    cost = recurrent_cost(config, config.dtype.itemsize)
    read = {name: getattr(config, name) for name in ("prefix_length", "short_prompt", "sliding_window")}
    plan = ConversionPlan(
        source=source.name,
        backbone=f"official {_model_name(config)}",
        source_depth=config.num_hidden_layers,
        recipe=recipe.to_dict() | read,
        layers=tuple(
            PlannedLayer(layer, mixer, (f"transformer.layers.{layer}",), (layer,))
            for layer, mixer in enumerate(mixers)
        ),
        dropped=(),
        unused=(),
        new={},
        before=cost,
        full=cost,
        expected=cost,
        bytes_per_value=config.dtype.itemsize,
        notes=tuple(_notes(source, config, left_out)),
    )
    return Blueprint(model, plan, recipe, targets)


def _plain_names(weights: TensorSource) -> tuple[TensorSource, list[str]]:
    """The weights as the model itself names them, the tied matrix once, and the names of what is no weight."""
    names: dict[str, str] = {}  # new name -> name in the file
    left_out = []
    for name in weights.infos:
        plain = name.removeprefix("model.").replace(".conv1.", ".conv.")
        if "metrics" in plain or DERIVED.search(plain):
            left_out.append(name)
        elif plain in names:
            raise ConversionError(
                f"The tensors {names[plain]} and {name} are the same one, and which counts is unclear; remove the "
                "stale one."
            )
        else:
            names[plain] = name
    if _HEAD in names:
        head = names.pop(_HEAD)
        if not weights.equal(head, names.setdefault(_EMBEDDING, head)):
            raise ConversionError(
                f"The tensors {head} and {names[_EMBEDDING]} differ, but the head of an official checkpoint is its "
                "embedding; the checkpoint is damaged or is none."
            )
    return weights.view(names), left_out


def _mixers(weights: TensorSource, depth: int) -> list[str]:
    """The kind of each layer's mixer."""
    kinds: dict[int, str] = {}
    for match in filter(None, map(_MIXER.match, weights.infos)):
        if match[2] in _KINDS:
            kinds[int(match[1])] = _KINDS[match[2]]
    missing = [layer for layer in range(depth) if layer not in kinds]
    if missing:
        raise ConversionError(
            f"config.json says {depth} layers (`n_layer`), but the weights hold no known mixer (a tensor "
            f"{', '.join(_KINDS)}) of layer {spans(missing)}; the checkpoint is incomplete or of another architecture."
        )
    return [kinds[layer] for layer in range(depth)]


def _fields(source: SourceCheckpoint, weights: TensorSource, mixers: list[str], recipe: Recipe) -> dict[str, Any]:
    """The configuration as config.json and the weights tell it."""
    raw, said = source.raw_config, source.config
    heads = recipe.fields.get("num_attention_heads") or _heads(raw, mixers)
    first = {mixer: f"transformer.layers.{mixers.index(mixer)}.mixer" for mixer in mixers}
    query_rows = _size(weights, f"{first.get('linear_attention')}.proj_q.weight", 0)
    taps = _size(weights, f"{first.get('conv')}.conv.conv.weight", 2)
    width = _size(weights, "transformer.layers.0.mlp.fc2.weight", 1)
    reads_prefix = any("_enc." in name for name in weights.infos)
    return {
        "vocab_size": _rounded_up(said.vocab_size, _size(weights, _EMBEDDING, 0), _VOCABULARY_MULTIPLE),
        "hidden_size": said.n_embd,
        "intermediate_size": _rounded_up(said.n_inner or width or 0, width, _WIDTH_MULTIPLE),
        "num_hidden_layers": said.n_layer,
        "num_attention_heads": heads,
        "num_key_value_heads": raw.get("n_head_kv"),
        "layer_types": mixers,
        "feature_dim": _number(raw, "feature_dim") or (query_rows or 0) // heads or _RELEASED["feature_dim"],
        "prefix_length": _number(raw, "enc_length") or (_RELEASED["enc_length"] if reads_prefix else 0),
        "sliding_window": (_number(raw, "window_size") or _RELEASED["window_size"]) // 2 + 1,
        "conv_kernel_size": taps or _RELEASED["taps"],
        "residual_in_fp32": bool(raw.get("residual_in_fp32", True)),
        "rms_norm_eps": said.layer_norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": raw.get("rotary_emb_base") or 10000.0},
        "initializer_range": said.initializer_range,
        "bos_token_id": said.bos_token_id,
        "eos_token_id": said.eos_token_id,
        "pad_token_id": said.pad_token_id,
    }


def _number(raw: Mapping[str, Any], name: str) -> int | None:
    """A number in the entry of a mixer; None if none has it."""
    entries = [raw[key] for key in _ENTRIES if isinstance(raw.get(key), dict)]
    value = next((entry[name] for entry in entries if entry.get(name) is not None), None)
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ConversionError(f"`{name}` of a mixer in config.json is {value!r}, but must be a positive number.")
    return value


def _heads(raw: Mapping[str, Any], mixers: list[str]) -> int:
    """The official code reads the heads of sliding windows from `n_head`, those of linear attention from its entry."""
    general = raw.get("n_head") or _RELEASED["heads"]
    linear = _number(raw, "num_heads") or general
    heads = {"linear_attention": linear, "sliding_attention": general}
    found = {heads[mixer] for mixer in mixers if mixer in heads} or {general}
    if len(found) > 1:
        raise ConversionError(
            f"config.json says {linear} heads for linear attention (`num_heads`) and {general} for sliding windows "
            "(`n_head`), but a JRT-RNN of this package has as many for both; give `--num-attention-heads` if one of "
            "them is wrong."
        )
    return found.pop()


def _size(weights: TensorSource, name: str, dimension: int) -> int | None:
    """A size of a tensor; None if there is no such tensor, or dimension."""
    info = weights.infos.get(name)
    return info.shape[dimension] if info is not None and len(info.shape) > dimension else None


def _rounded_up(said: int, stored: int | None, multiple: int) -> int:
    """The stored size if it is what config.json says, rounded up; else what it says, for the shapes to be compared."""
    return stored if stored is not None and 0 <= stored - said < multiple else said


def _targets(weights: TensorSource, model: JRTForCausalLM, dtype: torch.dtype | None) -> list[TargetTensor]:
    """The tensors of the new model, in its order, which are those of the official one and no more.

    Raises:
        ConversionError: for a tensor that is missing, unknown or of another shape.
    """
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if name != _HEAD}
    origins = dict(_OUTER)
    for layer in range(model.config.num_hidden_layers):
        for part, official in _LAYER_PARTS.items():
            origins[f"model.layers.{layer}.{part}"] = f"transformer.layers.{layer}.{official}"
    rows: dict[str, range] = {}
    ends: Counter[str] = Counter()
    for name, origin in origins.items():
        if name in shapes:
            rows[name] = range(ends[origin], ends[origin] + shapes[name][0])
            ends[origin] = rows[name].stop
    expected = {origins[name]: (ends[origins[name]], *shape[1:]) for name, shape in shapes.items()}
    remedy = "only plain JRT-RNN and Based checkpoints, without decay or other additions, can be converted"
    check_tensors(weights, expected, remedy)
    return [copy_of(weights, name, origins[name], dtype, rows[name]) for name in shapes]


def _check_settings(raw: Mapping[str, Any], config: JRTConfig, recipe: Recipe) -> None:
    """Refuses settings under which the same weights compute something else."""
    for name, needed in _FIXED.items():
        if raw.get(name, needed) != needed:
            raise ConversionError(
                f"`{name}` is {raw[name]!r} in config.json, but a JRT-RNN of this package computes what {needed!r} "
                "means; the checkpoint cannot be converted."
            )
    entries = [raw[key] for key in _ENTRIES if isinstance(raw.get(key), dict)]
    for entry in entries:
        feature_map = entry.get("feature_name") or entry.get("feature_map") or "taylor_exp"
        if isinstance(feature_map, dict):
            feature_map = feature_map.get("_target_")
        if str(feature_map).rpartition(".")[2] not in ("taylor_exp", "TaylorExp") or entry.get("scale_dim"):
            raise ConversionError(
                f"Linear attention has the feature map {feature_map!r} (`scale_dim` {entry.get('scale_dim')}) in "
                "config.json, but only the Taylor expansion of the official code can be converted."
            )
    windows = any("window_size" in entry or "slid" in str(entry.get("_target_")) for entry in entries)
    full = [layer for layer, mixer in enumerate(config.layer_types or ()) if mixer == "sliding_attention"]
    if full and not windows and "sliding_window" not in recipe.fields:
        raise ConversionError(
            f"Layer {spans(full)} is attention, and config.json names no sliding window, without which the official "
            "code attends to everything; give `--sliding-window` if there was one."
        )


def _model_name(config: JRTConfig) -> str:
    return "JRT-RNN" if config.prefix_length else "Based"


def _notes(source: SourceCheckpoint, config: JRTConfig, left_out: Sequence[str]) -> list[str]:
    notes = [f"an official {_model_name(config)} checkpoint: all of its weights are kept, under other names."]
    if left_out:
        notes.append(f"left out: {left_out[0]}{and_more(left_out)}, which are no weights.")
    if config.prefix_length and config.short_prompt == "exact":
        notes.append(
            f"short_prompt is 'exact': a prompt of fewer than {config.prefix_length} tokens is read as it is. The "
            "published numbers pad it: load with short_prompt='left_pad' to reproduce them ('read_twice' for the "
            "512-token ones), or convert with `--short-prompt`."
        )
    if not source.companions:
        notes.append(
            "the source has no tokenizer, and so has the result: it was trained with GPT-2's, so save that to it, "
            "with AutoTokenizer.from_pretrained('openai-community/gpt2').save_pretrained(...)."
        )
    return notes
