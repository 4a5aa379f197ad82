"""A tiny random MoR over any supported family, and the vanilla model with its layers repeated."""

import torch
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from varidepth import MoRConfig, MoRForCausalLM
from varidepth.configuration.backbone_config import BACKBONES, family_fields
from varidepth.modeling.decoder_backbone import FAMILIES


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
}
NO_SDPA = {name for name in BACKBONES if FAMILIES[name].softcaps_attention}


def tiny_mor(backbone: str = "llama", *, attention: str | None = None, seed: int = 0, **fields) -> MoRForCausalLM:
    """In eval mode; norms are not at one and the routers spread the tokens over the depths."""
    fields = {"num_hidden_layers": 8, "num_recursions": 3, **fields}
    config = MoRConfig(backbone=backbone, **SIZES, **FAMILY_FIELDS.get(backbone, {}), **fields)
    attention = attention or ("eager" if backbone in NO_SDPA else "sdpa")
    torch.manual_seed(seed)
    model = MoRForCausalLM._from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(0.1 * noise)
            elif "routers" in name or "predictors" in name:
                parameter.copy_(noise)
    return model


def switch_on(model: MoRForCausalLM) -> None:
    """Sets the routers to what a conversion writes: sigmoid(20) is 1.0 in fp32."""
    with torch.no_grad():
        model.model.routers.weight.zero_()
        model.model.routers.bias.fill_(20.0)


def vanilla_of(model: MoRForCausalLM) -> PreTrainedModel:
    """The family's own model of the unrolled depth, with the shared layers' weights repeated."""
    config = model.config
    fields = {key: value for key, value in config.to_dict().items() if key in family_fields(config.backbone)}
    vanilla_config = CONFIG_MAPPING[config.backbone](**fields)
    vanilla = (
        FAMILIES[config.backbone]
        .find("ForCausalLM")
        ._from_config(vanilla_config, attn_implementation=config._attn_implementation)
    )
    state, repeated = model.state_dict(), {}
    for name in vanilla.state_dict():
        source = name
        if name.startswith("model.layers."):
            unrolled, rest = name.removeprefix("model.layers.").split(".", 1)
            source = f"model.layers.{config.physical_layers[int(unrolled)]}.{rest}"
        repeated[name] = state[source]
    vanilla.load_state_dict(repeated)
    return vanilla.eval()


def decision_margin(model: MoRForCausalLM, outputs) -> float:
    """Smallest distance of a router's score to where its decision flips (DESIGN: the law holds from 1e-4)."""
    config, logits = model.config, outputs.router_logits
    if config.routing == "none" or logits is None:
        return 1.0
    if config.routing == "token_choice":
        blocks = logits.unflatten(-1, (-1, config.num_recursions))
        best = blocks.softmax(-1) if config.router_activation == "softmax" else blocks.sigmoid()
        if config.balancing == "loss_free":
            best = best + model.model.balancing_bias
        top = best.topk(2, dim=-1).values
        margin = top[..., 0] - top[..., 1]
    else:
        margin = (logits.sigmoid() - 0.5).abs()
    margin = margin[~margin.isnan()]
    return float(margin.min()) if margin.numel() else 1.0
