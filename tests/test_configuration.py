"""MoRConfig and MoDConfig: typed, flat, round trips, and one clear sentence for every field that does not fit."""

import json

import pytest
from tiny_families import FAMILY_FIELDS, MOD_BACKBONES, SIZES
from transformers import AutoConfig, Gemma2Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from varidepth import MoDConfig, MoRConfig
from varidepth.configuration.backbone_config import BACKBONES, family_fields


def make(**fields) -> MoRConfig:
    return MoRConfig(**{"num_hidden_layers": 8, "num_recursions": 3, **SIZES, **fields})


def make_mod(**fields) -> MoDConfig:
    return MoDConfig(**{"num_hidden_layers": 8, **SIZES, **fields})


EACH_BACKBONE = [(make, name) for name in BACKBONES] + [(make_mod, name) for name in MOD_BACKBONES]


@pytest.mark.parametrize(("make", "backbone"), EACH_BACKBONE, ids=[f"{m.__name__}-{b}" for m, b in EACH_BACKBONE])
def test_round_trip(make, backbone, tmp_path):
    config = make(backbone=backbone, **FAMILY_FIELDS.get(backbone, {}))
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    ignored = {"_name_or_path"}
    assert type(loaded) is type(config)
    assert {k: v for k, v in loaded.to_dict().items() if k not in ignored} == {
        k: v for k, v in config.to_dict().items() if k not in ignored
    }
    assert "layer_types" not in json.loads((tmp_path / "config.json").read_text()) or len(config.layer_types) == 8


@pytest.mark.parametrize("backbone", MOD_BACKBONES)
def test_from_backbone_takes_the_familys_own_fields(backbone):
    """`head_dim` too, which some families read although their configuration does not declare it."""
    fields = {**SIZES, **FAMILY_FIELDS.get(backbone, {}), "head_dim": 16}
    source = CONFIG_MAPPING[backbone](num_hidden_layers=8, **fields)
    configs = [MoDConfig.from_backbone(source)]
    if backbone in BACKBONES:
        configs.append(MoRConfig.from_backbone(source, num_recursions=2))
    for config in configs:
        for name in family_fields(backbone) - {"layer_types", "no_rope_layers"}:
            assert getattr(config, name) == getattr(source, name), name
        assert config.base_model_tp_plan == source.base_model_tp_plan
    for name in {"layer_types", "no_rope_layers"} & family_fields(backbone):
        assert getattr(configs[0], name) == getattr(source, name), name


@pytest.mark.parametrize(
    ("sharing", "depth", "expected"),
    [
        ("cycle", 9, [0, 1, 2] * 3),
        ("sequence", 9, [0, 0, 0, 1, 1, 1, 2, 2, 2]),
        ("middle_cycle", 8, [0, 1, 2, 1, 2, 1, 2, 3]),
        ("middle_sequence", 8, [0, 1, 1, 1, 2, 2, 2, 3]),
    ],
)
def test_sharing_follows_table_1(sharing, depth, expected):
    config = make(sharing=sharing, num_hidden_layers=depth)
    assert config.physical_layers == expected
    slots = [
        b.start + r * len(b.layers) + j
        for b in config.recursive_blocks
        for r in range(3)
        for j in range(len(b.layers))
    ]
    assert sorted(slots) == [i for i, layer in enumerate(expected) if expected.count(layer) > 1]


def test_repeats_carry_the_attention_type_of_their_layer():
    source = Gemma2Config(num_hidden_layers=8, **SIZES)
    config = MoRConfig.from_backbone(source, num_recursions=3, source_layers=[0, 1, 2, 7])
    assert [kind[0] for kind in config.layer_types] == list("sfsfsfsf")
    shifted = MoRConfig.from_backbone(source, num_recursions=3, source_layers=[0, 2, 3, 7])
    assert [kind[0] for kind in shifted.layer_types] == list("ssfsfsff")


def test_default_capacities_and_router_settings():
    config = make()
    assert config.capacities == pytest.approx([1, 2 / 3, 1 / 3])
    assert (config.router_activation, config.router_alpha, config.router_thresholds) == ("sigmoid", 0.1, [0.5] * 3)
    token = make(routing="token_choice")
    assert (token.router_activation, token.router_alpha, token.capacities) == ("softmax", 1.0, None)


BAD = [
    ({"hidden_sizee": 3}, "`hidden_sizee` is neither a field of MoRConfig.*did you mean `hidden_size`"),
    ({"layer_types": ["full_attention"]}, "`layer_types` is neither a field"),
    ({"backbone": "gpt2"}, "`backbone` is 'gpt2', but must be one of 'llama'"),
    ({"sharing": "middle_cyle"}, "`sharing` is 'middle_cyle'.*did you mean 'middle_cycle'"),
    ({"sharing": "middle_cycle", "prelude_layers": 0, "coda_layers": 0}, "use 'cycle' or give `prelude_layers`"),
    ({"num_recursions": 4}, "`num_hidden_layers` is 8, of which 1 prelude and 1 coda.*use num_hidden_layers=6"),
    ({"num_recursions": 0}, "`num_recursions` is 0, but must be at least 1"),
    ({"prelude_layers": -1}, "`prelude_layers` is -1, but must be at least 0"),
    ({"routing": "both"}, "`routing` is 'both', but must be one of"),
    ({"capacities": [1.0, 0.5]}, "`capacities` has 2 entries, but must have one per recursion"),
    ({"capacities": [0.5, 1.0, 1.0]}, "`capacities` is .*non-increasing"),
    ({"capacities": [1.0, 0.5, 0.0]}, "`capacities` is .*above 0 and at most 1"),
    ({"router_thresholds": [0.5, 0.5, 2.0]}, "`router_thresholds` is .*between 0 and 1"),
    ({"router_thresholds": [0.5]}, "`router_thresholds` has 1 entries"),
    ({"capacity_warmup_steps": -1}, "`capacity_warmup_steps` is -1"),
    ({"router_type": "deep"}, "`router_type` is 'deep'"),
    ({"router_activation": "softmax"}, "`router_activation` is 'softmax', but must be one of 'sigmoid', 'tanh'"),
    ({"router_alpha": 0.0}, "`router_alpha` is 0.0, but must be positive"),
    ({"gating": "lerp"}, "`gating` is 'lerp'"),
    ({"inference_rule": "top_k"}, "`inference_rule` is 'top_k'.*did you mean 'topk'"),
    ({"balancing": "bias"}, "`balancing` is 'bias'"),
    ({"aux_loss_coef": -0.1}, "`aux_loss_coef` is -0.1, but must be zero or positive"),
    ({"kv_mode": "share"}, "`kv_mode` is 'share'.*did you mean 'shared'"),
    ({"kv_mode": "shared", "capacities": [0.9, 0.5, 0.3]}, "`kv_mode` is 'shared' and `capacities` starts with 0.9"),
    ({"kv_mode": "shared", "backbone": "phi3"}, "phi3 computes queries, keys and values in one product"),
    ({"routing": "none", "capacities": [1.0, 1.0, 1.0]}, "only routing='expert_choice' uses it"),
    ({"routing": "none", "gating": "additive"}, "`gating` is 'additive', but only routing='expert_choice' or"),
    ({"routing": "token_choice", "aux_loss_coef": 1.0}, "`aux_loss_coef` is 1.0, but only routing='expert_choice'"),
    ({"balancing": "loss_free"}, "`balancing` is 'loss_free', but only routing='token_choice' uses it"),
    ({"backbone": "gemma3_text", "use_bidirectional_attention": True}, "routed models are causal"),
    ({"routing": "token_choice", "inference_rule": "predictor"}, "only routing='expert_choice' uses it"),
    ({"routing": "none", "router_alpha": 1.0}, "`router_alpha` is 1.0, but only routing="),
]  # fmt: skip


BAD_MOD = [
    ({"backbone": "gpt2"}, "`backbone` is 'gpt2', but must be one of 'llama'.*'qwen3_moe'"),
    ({"routed_layers": [1, 8]}, "`routed_layers` is .*ascending layers from 0 to 7"),
    ({"routed_layers": [3, 1]}, "`routed_layers` is .*ascending"),
    ({"capacity": 0.0}, "`capacity` is .*above 0 and at most 1"),
    ({"capacity": [0.5, 0.5]}, "`capacity` has 2 entries, but must be one number or have one for each of the 4"),
    ({"capacity_multiple": 0}, "`capacity_multiple` is 0, but must be at least 1"),
    ({"routing": "none"}, "`routing` is 'none', but must be one of 'expert_choice', 'stochastic'"),
    ({"routing_unit": "layer"}, "`routing_unit` is 'layer', but must be one of"),
    ({"gate": "softmax"}, "`gate` is 'softmax', but must be one of 'raw'"),
    ({"gate": "straight_through", "router_alpha": 0.5}, "`router_alpha` is 0.5, but gate='straight_through' is"),
    ({"router_alpha": -1.0}, "`router_alpha` is -1.0, but must be positive"),
    ({"router_thresholds": [0.5]}, "`router_thresholds` has 1 entries, but must have one for each of the 4"),
    ({"inference_rule": "ema"}, "`inference_rule` is 'ema'"),
    ({"predictor_hidden_size": 8}, "only inference_rule='predictor' has predictors"),
    ({"inference_rule": "predictor", "predictor_hidden_size": 0}, "`predictor_hidden_size` is 0"),
    ({"ema_decay": 1.0}, "`ema_decay` is 1.0, but must be at least 0 and below 1"),
    ({"always_route_first": -1}, "`always_route_first` is -1, but must be at least 0"),
    ({"num_noop_experts": 2}, "`num_noop_experts` is 2, but llama has no experts; use a backbone of 'mixtral'"),
    ({"routing": "stochastic", "gate": "sigmoid"}, "`gate` is 'sigmoid', but routing='stochastic' has no router"),
    ({"routing": "stochastic", "inference_rule": "topk"}, "`inference_rule` is 'topk', but routing='stochastic'"),
    ({"routed_layer": [1]}, "`routed_layer` is neither a field of MoDConfig.*did you mean `routed_layers`"),
]  # fmt: skip
BAD_FIELDS = [(make, *bad) for bad in BAD] + [(make_mod, *bad) for bad in BAD_MOD]
BAD_NAMES = [f"{make.__name__} " + " ".join(f"{k}={v}" for k, v in fields.items()) for make, fields, _ in BAD_FIELDS]


@pytest.mark.parametrize(("make", "fields", "message"), BAD_FIELDS, ids=BAD_NAMES)
def test_bad_fields_are_refused_in_one_sentence(make, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**fields)
    assert "\n" not in str(error.value)


def test_every_other_layer_is_routed_and_the_first_is_dense():
    config = make_mod()
    assert (config.routed_layers, config.capacities) == ([1, 3, 5, 7], [0.125] * 4)
    assert (config.gate, config.router_alpha, config.router_thresholds) == ("raw", 1.0, [0.5] * 4)
    assert make_mod(gate="one_plus_tanh").router_alpha == 0.2


def test_wrong_types_are_refused():
    with pytest.raises(Exception, match="Field 'num_recursions' expected int, got str"):
        make(num_recursions="two")


def test_per_layer_lists_must_cover_the_unrolled_depth():
    with pytest.raises(Exception, match="layer_types"):
        make(backbone="gemma2", layer_types=["full_attention"] * 4)
