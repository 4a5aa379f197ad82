"""A tiny random MoR or MoD over any supported family, and the vanilla model of the same layers."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from varidepth import MoDConfig, MoDForCausalLM, MoRConfig, MoRForCausalLM
from varidepth.configuration.backbone_config import BACKBONES, MOE_BACKBONES, family_fields
from varidepth.modeling.decoder_backbone import FAMILIES, has_experts


VOCABULARY = 61
WINDOW = 5
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# windows shorter than the test sequences, in every family that has them
FAMILY_FIELDS = {
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "starcoder2": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2, "head_dim": 8},
    "smollm3": {"use_sliding_window": True, "sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "head_dim": 8},
    "gemma3_text": {"sliding_window": WINDOW, "head_dim": 8},
    "exaone4": {"sliding_window": WINDOW},
    "cohere2": {"sliding_window": WINDOW},
    "glm4": {"head_dim": 8},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
}
MOD_BACKBONES = BACKBONES + MOE_BACKBONES
NO_SDPA = {name for name in BACKBONES if FAMILIES[name].softcaps_attention}
# routed layers with a router that lets every token in, and the gate that a conversion chooses
OPEN_MOD = {"gate": "straight_through", "capacity": 0.5}


def tiny_mor(backbone: str = "llama", *, attention: str | None = None, seed: int = 0, **fields) -> MoRForCausalLM:
    """In eval mode; norms are not at one and the routers spread the tokens over the depths."""
    fields = {"num_hidden_layers": 8, "num_recursions": 3, **fields}
    return _tiny(MoRForCausalLM, MoRConfig, backbone, attention, seed, 1.0, fields)


def tiny_mod(backbone: str = "llama", *, attention: str | None = None, seed: int = 0, **fields) -> MoDForCausalLM:
    """In eval mode; by default layers 1 and 3 of 4 are routed, at half of the capacity."""
    fields = {"num_hidden_layers": 4, "capacity": 0.5, **fields}
    # the paper's gate is the router's logit itself, which must not blow up the stream
    return _tiny(MoDForCausalLM, MoDConfig, backbone, attention, seed, 0.3, fields)


def _tiny(
    model_class: Any, config_class: Any, backbone: str, attention: str | None, seed: int, spread: float, fields: dict
) -> Any:
    config = config_class(backbone=backbone, **SIZES, **{**FAMILY_FIELDS.get(backbone, {}), **fields})
    attention = attention or ("eager" if backbone in NO_SDPA else "sdpa")
    torch.manual_seed(seed)
    model = model_class._from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "recursion_adapter" in name:
                parameter.add_(0.1 * noise)
            elif "routers" in name or "predictors" in name:
                parameter.copy_(spread * noise)
        if hasattr(model.model, "threshold_ema"):
            model.model.threshold_ema.copy_(0.2 * torch.randn(config.num_routers, generator=generator))
    return model


def switch_on(model: PreTrainedModel) -> None:
    """Sets the routers to what a conversion writes: logit 0, or sigmoid(20), which is 1.0 in fp32."""
    with torch.no_grad():
        model.model.routers.weight.zero_()
        if model.model.routers.bias is not None:
            model.model.routers.bias.fill_(20.0)


def vanilla_of(model: PreTrainedModel) -> PreTrainedModel:
    """The family's own model of the unrolled depth, with the shared layers' weights repeated."""
    config = model.config
    fields = {key: value for key, value in config.to_dict().items() if key in family_fields(config.backbone)}
    if "use_sliding_window" in fields and config.sliding_window is None:
        fields.pop("sliding_window")
    vanilla_config = CONFIG_MAPPING[config.backbone](**fields)
    vanilla = (
        FAMILIES[config.backbone]
        .find("ForCausalLM")
        ._from_config(vanilla_config, attn_implementation=config._attn_implementation)
    )
    physical = getattr(config, "physical_layers", range(config.num_hidden_layers))
    state, repeated = model.state_dict(), {}
    for name in vanilla.state_dict():
        source = name
        if name.startswith("model.layers."):
            unrolled, rest = name.removeprefix("model.layers.").split(".", 1)
            source = f"model.layers.{physical[int(unrolled)]}.{rest}"
        repeated[name] = state[source]
    vanilla.load_state_dict(repeated)
    return vanilla.eval()


def run_with_margin(model: PreTrainedModel, *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """The outputs, and the smallest distance of a deciding score to where its decision flips.

    The law holds from 1e-4 (DESIGN). Deciding are the scores of the routers, under `inference_rule="predictor"` those
    of the predictors, and those of the experts' routers; what no decision hangs on is left out.
    """
    config, base = model.config, model.model
    margins = [1.0]

    def note(bank: torch.nn.Module, args: tuple, logits: torch.Tensor) -> None:
        router, logits = args[1], logits.detach()
        if config.routing == "token_choice":
            scores = logits.softmax(-1) if config.router_activation == "softmax" else logits.sigmoid()
            if config.balancing == "loss_free":
                scores = scores + base.balancing_bias[router]
            best, second = scores.topk(2, dim=-1).values.unbind(-1)
            margins.append(float((best - second).min()))
        elif not config.routed_passes[router].always:
            by_mean = config.inference_rule == "ema_threshold"
            threshold = base.threshold_ema[router].sigmoid() if by_mean else config.current_thresholds[router]
            margins.append(float((logits.sigmoid() - threshold).abs().min()))

    def note_experts(gate: torch.nn.Module, args: tuple, output: tuple) -> None:
        scores = output[0].detach().softmax(-1).sort(dim=-1, descending=True).values
        margins.append(float((scores[:, gate.top_k - 1] - scores[:, gate.top_k]).min()))

    bank = (
        base.predictors if getattr(config, "inference_rule", None) == "predictor" else getattr(base, "routers", None)
    )
    hooks = [] if bank is None else [bank.register_forward_hook(note)]
    hooks += [layer.mlp.gate.register_forward_hook(note_experts) for layer in base.layers if has_experts(layer)]
    try:
        return model(*args, **kwargs), min(margins)
    finally:
        for hook in hooks:
            hook.remove()
