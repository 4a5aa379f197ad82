"""What recursions have of their own: low-rank differences and norms (relaxed recursion)."""

import copy
import pickle
import re

import pytest
import torch
from matrix_products import MatrixProducts
from pico_checkpoints import save_pico, some_ids
from safetensors.torch import load_file
from test_measured_cost import check, family_fields, make
from tiny_families import VOCABULARY, switch_on, tiny_mor, vanilla_of
from transformers import AutoModelForCausalLM

from varidepth import MoRConfig, MoRForCausalLM, convert
from varidepth.analysis.cost import count_parameters, forward_flops, full_routing
from varidepth.cli.main import main
from varidepth.configuration.backbone_config import BACKBONES
from varidepth.conversion.errors import ConversionError
from varidepth.conversion.inspection import describe, report
from varidepth.conversion.unroll import unroll
from varidepth.modeling.module_mixins import mix_in
from varidepth.modeling.recursion_parameters import RecursionAdapter


FULL_RANK = 64  # above every width of a pico model, and so capped
RELAXED = {"recursion_rank": 4, "recursion_norms": True}
# families whose layers attend alike, or in a period of the shared block
ALIKE = ["llama", "qwen2", "qwen3", "olmo2", "phi3", "gemma2", "glm4", "starcoder2"]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def difference(first, second) -> float:
    expected = first(some_ids()).logits
    return float((second(some_ids()).logits - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", ALIKE)
def test_at_full_rank_the_conversion_is_its_source(tmp_path, family):
    """Biases, fused matrices and four norms per layer included; unrolled it is the source again."""
    source = save_pico(tmp_path / "source", family, 8, tokenizer=False)
    fields = {"num_recursions": 3, "init": "average", "recursion_rank": FULL_RANK, "recursion_norms": True}
    convert(source, tmp_path / "mor", quiet=True, **fields)
    unroll(tmp_path / "mor", tmp_path / "unrolled", quiet=True)
    model = load(tmp_path / "mor")
    assert difference(load(source), model) < 1e-5
    assert difference(model, load(tmp_path / "unrolled")) < 1e-5
    shared = {**fields, "recursion_norms": False}
    convert(source, tmp_path / "shared-norms", quiet=True, **shared)
    assert difference(load(source), load(tmp_path / "shared-norms")) > 1e-3


@pytest.mark.parametrize(
    "fields",
    [
        {"init": "stepwise"},
        {"init": "upper", "sharing": "middle_sequence"},
        {"init": "random", "sharing": "cycle"},
        {"init": "lower", "prelude_layers": 0, "coda_layers": 2},
    ],
    ids=lambda fields: fields["init"],
)
def test_each_recursion_starts_as_the_layer_in_whose_place_it_is(tmp_path, fields):
    source = save_pico(tmp_path / "source", layers=9, tokenizer=False)
    convert(source, tmp_path / "mor", num_recursions=2, **fields, recursion_rank=64, recursion_norms=True, quiet=True)
    assert difference(load(source), load(tmp_path / "mor")) < 1e-5


def test_a_recursion_without_a_difference_can_learn_one(tmp_path):
    """The layer that became the shared one differs from it in nothing; its factors must not both be 0."""
    source = save_pico(tmp_path / "source", tokenizer=False)
    convert(source, tmp_path / "mor", num_recursions=2, init="upper", recursion_rank=2, routing="none", quiet=True)
    model = load(tmp_path / "mor")
    model(some_ids(), labels=some_ids()).loss.backward()
    adapters = {name: p for name, p in model.named_parameters() if "recursion_adapter" in name}
    for name, parameter in adapters.items():
        if name.endswith("_up"):
            same = [not p.any() for p in parameter]
            assert sum(same) == 1 and all(bool(p.any()) for p in parameter.grad), name
            down = adapters[name.removesuffix("up") + "down"]
            assert float(down[same.index(True)].std()) == pytest.approx(model.config.initializer_range, rel=0.5)


def test_dropped_layers_are_approximated_by_nothing(tmp_path):
    source = save_pico(tmp_path / "source", layers=9, tokenizer=False)
    fields = {"num_recursions": 2, "drop_layers": True, "recursion_rank": 64, "recursion_norms": True}
    plan = convert(source, tmp_path / "mor", quiet=True, **fields).plan
    vanilla = load(source)
    kept = [layer for i, layer in enumerate(vanilla.model.layers) if i not in plan.dropped]
    vanilla.model.layers = torch.nn.ModuleList(kept)
    vanilla.config.num_hidden_layers = len(kept)
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i
    assert plan.dropped and difference(vanilla, load(tmp_path / "mor")) < 1e-5


def test_the_start_is_the_best_approximation_of_its_rank(tmp_path):
    source = save_pico(tmp_path / "source", layers=6, tokenizer=False)
    convert(source, tmp_path / "mor", num_recursions=2, init="average", recursion_rank=5, quiet=True)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "mor"))
    part = "mlp.up_proj"
    shared = after[f"model.layers.1.{part}.weight"]
    up, down = (after[f"model.layers.1.mlp.recursion_adapter.up_proj_{factor}"] for factor in ("up", "down"))
    for recursion, layer in enumerate((1, 3)):
        wanted = before[f"model.layers.{layer}.{part}.weight"] - shared
        values = torch.linalg.svdvals(wanted)
        error = (up[recursion] @ down[recursion] - wanted).norm()
        torch.testing.assert_close(error, values[5:].norm())  # Eckart and Young: no rank 5 is nearer
        torch.testing.assert_close(up[recursion].norm(dim=0), values[:5].sqrt())
        torch.testing.assert_close(down[recursion].norm(dim=1), values[:5].sqrt())


def test_shared_keys_and_values_are_those_of_the_first_recursion(tmp_path):
    source = save_pico(tmp_path / "source", "qwen3", 6, tokenizer=False)
    fields = {"num_recursions": 2, "init": "average", "kv_mode": "shared", "capacities": [1.0, 0.5]}
    convert(source, tmp_path / "mor", **fields, **RELAXED, quiet=True)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "mor"))
    for part in ("k_proj", "v_proj", "k_norm"):
        assert not [name for name in after if f"recursion_adapter.{part}" in name or f"{part}.deeper" in name]
        name = f"model.layers.2.self_attn.{part}.weight"
        assert torch.equal(after[name], before[name])
    assert "model.layers.2.self_attn.q_norm.deeper.0.weight" in after
    load(tmp_path / "mor").generate(some_ids(), max_new_tokens=3)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_predicted_flops_and_parameters(backbone):
    fields = {**family_fields(backbone), "capacities": [1.0, 0.5], **RELAXED}
    if backbone != "phi3":
        fields["kv_mode"] = "shared"
    for shape in (fields, {**fields, "kv_mode": "recursion", "recursion_rank": FULL_RANK}):
        model = make(shape)
        check(model, steps=((0, 7), (7, 8), (8, 9)))
        assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())


@torch.no_grad()
def test_full_rank_costs_more_than_it_could():
    """The counter sees the differences: without them in the prediction the law above would fail."""
    model = make({"num_hidden_layers": 6, "routing": "none", "recursion_rank": 4})
    with MatrixProducts() as counted:
        model(torch.tensor([[5, 6]]), use_cache=False)
    cost = forward_flops(model.config, full_routing(model.config, 2))
    assert counted.flops == cost.total > cost.total - cost.recursions > 0


def test_from_scratch_all_recursions_begin_alike_and_come_apart():
    torch.manual_seed(0)
    config = tiny_mor().config
    fields = {key: value for key, value in config.to_dict().items() if key != "initializer_range"}
    model = MoRForCausalLM(MoRConfig(**{**fields, **RELAXED, "routing": "none", "capacities": None,
        "router_thresholds": None, "router_activation": None, "router_alpha": None}))  # fmt: skip
    ids = torch.randint(3, VOCABULARY, (2, 9))
    vanilla = vanilla_of(model.eval())
    assert torch.equal(model(ids).logits, vanilla(ids).logits)
    model(ids, labels=ids).loss.backward()
    adapter = model.model.layers[1].mlp.recursion_adapter
    steps = [adapter.down_proj_up.grad[recursion] for recursion in range(config.num_recursions)]
    assert all(step.abs().max() > 0 for step in steps) and not torch.allclose(steps[0], steps[1])
    assert adapter.down_proj_down.std() > 0 and not adapter.down_proj_down.grad.any()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
def test_gradient_checkpointing_recomputes_the_recursion_that_was(routing, use_reentrant):
    model = tiny_mor(**RELAXED, routing=routing).train()
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_a_norm_recomputed_without_its_layer_is_refused():
    """Nothing but the layer knows the recursion, and the first one's weights would be a silent guess."""
    model = tiny_mor(**RELAXED)
    norm = model.model.layers[1].input_layernorm
    with pytest.raises(RuntimeError, match="checkpoint and compile whole decoder layers"):
        norm(torch.ones(1, 2, model.config.hidden_size))


def test_a_kernel_does_not_replace_what_is_mixed_in():
    """`use_kernels` exchanges the forward pass of every module whose class names a kernel."""

    class Norm(torch.nn.Module):
        kernel_layer_name = "RMSNorm"

    class Doubling:
        def forward(self, x):
            return 2 * x

    class Marked:
        pass

    for mixin, name in ((Doubling, None), (Marked, "RMSNorm")):
        norm = Norm()
        mix_in(norm, mixin)
        assert type(norm).kernel_layer_name == name
    assert not hasattr(torch.nn.Linear, "kernel_layer_name")


def test_all_layers_are_of_the_class_by_which_engines_wrap():
    model = tiny_mor(**RELAXED, prelude_layers=0, coda_layers=2, num_hidden_layers=6, num_recursions=2,
        capacities=None, router_thresholds=None)  # fmt: skip
    assert len({type(layer) for layer in model.model.layers}) == 1


def test_copies_and_pickles_know_their_recursion():
    model = tiny_mor(**RELAXED)
    ids = torch.randint(3, VOCABULARY, (1, 6))
    with torch.no_grad():
        expected = model(ids).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            model.model.layers[1].mlp.recursion_adapter.up_proj_up.data.zero_()  # of the original alone
            assert torch.equal(other(ids).logits, expected)


def test_unrolled_relaxed_model_computes_the_same_in_its_own_type(tmp_path):
    model = tiny_mor("qwen2", **RELAXED, gating="interpolate", router_bias=True)
    switch_on(model)
    model.save_pretrained(tmp_path / "mor")
    unroll(tmp_path / "mor", tmp_path / "vanilla", quiet=True)
    vanilla = load(tmp_path / "vanilla")
    assert type(vanilla).__name__ == "Qwen2ForCausalLM"
    ids = torch.randint(3, VOCABULARY, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(vanilla(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_plan_and_inspection_show_what_it_costs(tmp_path, capsys):
    source = save_pico(tmp_path / "source", layers=6)
    flags = ["--recursions", "2", "--recursion-rank", "4", "--recursion-norms"]
    assert main(["convert", str(source), "-o", str(tmp_path / "mor"), *flags]) == 0
    shown = capsys.readouterr().out
    model = load(tmp_path / "mor")
    own = sum(p.numel() for n, p in model.named_parameters() if "recursion_adapter" in n or "deeper" in n)
    assert own and re.search(f"^of these of each recursion's own +0 +{own} ", shown, flags=re.M)
    assert "at each recursion every matrix of a shared layer differs by rank 4" in shown
    described = describe(tmp_path / "mor")
    assert described.full.recursions == own
    assert described.full.parameters == sum(p.numel() for p in model.parameters())
    assert "recursion_rank" in report(described) and re.search(f"own +{own} ", report(described))


def test_bfloat16_keeps_the_differences_in_the_type_of_the_model(tmp_path):
    model = tiny_mor(**RELAXED)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    adapters = [module for module in half.modules() if isinstance(module, RecursionAdapter)]
    assert adapters and all(p.dtype == torch.bfloat16 for adapter in adapters for p in adapter.parameters())
    half.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)


def test_bad_fields_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`recursion_rank` is -1, but must be 0"):
        tiny_mor(recursion_rank=-1)
    with pytest.raises(ValueError, match="`recursion_norms` is True, but with one recursion nothing is shared"):
        tiny_mor(num_recursions=1, capacities=[1.0], recursion_norms=True)
    model = tiny_mor()
    model.config.recursion_rank = 2
    with pytest.raises(ValueError, match="`config.recursion_rank` is 2, but the model was built with 0"):
        model(torch.tensor([[5]]))
    source = save_pico(tmp_path / "source")
    with pytest.raises(ConversionError, match="`recursion_rank` is 4, but only a conversion to 'mor' uses it"):
        convert(source, tmp_path / "mod", to="mod", recursion_rank=4)
