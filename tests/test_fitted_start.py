"""The fitted start: shared layers, and what recursions add to them, solved for from what the source does on a text."""

import pytest
import torch
from real_text import save_source, source_config, text_blocks
from tiny_families import tiny_mor, vanilla_of
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from varidepth import MoDConfig, MoDForCausalLM, MoRConfig, MoRForCausalLM
from varidepth.conversion.convert import convert
from varidepth.training import stream_writers
from varidepth.training.fitted_start import FITTED_BACKBONES, fit_shared_layers
from varidepth.training.hidden_matching import hidden_distance, matched_states


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("fitted") / "source")


@pytest.fixture
def source(source_folder):
    return LlamaForCausalLM.from_pretrained(source_folder)


SHARINGS = ("cycle", "middle_cycle", "middle_sequence")


def shared_model(source, sharing, **fields):
    torch.manual_seed(3)
    settings = {"num_recursions": 2, "sharing": sharing, "routing": "none", **fields}
    model = MoRForCausalLM(MoRConfig.from_backbone(source.config, **settings)).eval()
    weights = source.state_dict()
    first = {layer: slot for slot, layer in reversed(list(enumerate(model.config.physical_layers)))}
    for name in model.state_dict():
        if name.startswith("model.layers."):
            layer, _, rest = name.removeprefix("model.layers.").partition(".")
            model.state_dict()[name].copy_(weights[f"model.layers.{first[int(layer)]}.{rest}"])
        else:
            model.state_dict()[name].copy_(weights[name])
    return model


def distance_at_the_end(model, source, ids):
    with torch.no_grad():
        states = [m.model(ids, output_hidden_states=True).hidden_states for m in (model, source)]
    return float(hidden_distance(*states, matched_states(model.config, source.config, "all")[-1:]).mean())


@pytest.mark.parametrize("sharing", SHARINGS)
def test_fitted_layers_follow_the_source(sharing, source):
    """On text that the fit has not seen, before the last layer."""
    model = shared_model(source, sharing)
    held_out = text_blocks().blocks[-16:]
    before = distance_at_the_end(model, source, held_out)
    fit_shared_layers(model, source, text_blocks().blocks[:-16].split(16), sweeps=2, compose=False)
    assert distance_at_the_end(model, source, held_out) < 0.95 * before


@pytest.mark.parametrize("compose", [True, False])
def test_solution_is_the_best_one(compose, source):
    """No small step of the last fitted matrix brings the stream nearer to the source's, token for token."""
    model = shared_model(source, "middle_cycle")
    ids = text_blocks().blocks[:64]
    report = fit_shared_layers(model, source, [ids], sweeps=1, compose=compose, ridge=1e-9)
    layer = model.model.layers[report[-1].layer]
    writer = layer.mlp.down_proj
    seen = {}
    hooks = [
        writer.register_forward_pre_hook(lambda module, args: seen.update(features=args[0])),
        layer.post_attention_layernorm.register_forward_pre_hook(lambda module, args: seen.update(between=args[0])),
    ]
    states = source.model(ids, output_hidden_states=True).hidden_states
    # the first application continues the model's own stream, the second one begins with the source's
    with torch.no_grad():
        own = model.model(ids, output_hidden_states=True).hidden_states
    gradient, size = 0.0, 0.0
    for slot, entering in ((2, own[2]), (4, _behind_first(model, source, states))):
        positions = source.model.rotary_emb(entering, torch.arange(ids.shape[1])[None])
        with torch.no_grad():
            layer(entering, attention_mask=None, position_embeddings=positions)
        scale = states[slot + 1].square().sum(-1, keepdim=True).rsqrt()
        rest = (seen["between"] + writer(seen["features"]) - states[slot + 1]) * scale
        gradient = gradient + torch.einsum("bth,btf->hf", rest, seen["features"] * scale)
        size = size + torch.einsum("bth,btf->hf", rest.abs(), (seen["features"] * scale).abs())
    for hook in hooks:
        hook.remove()
    assert gradient.abs().max() < 1e-3 * size.abs().max()


@torch.no_grad()
def _behind_first(model, source, states):
    """What enters the last shared layer the second time: what the one before makes of the source's stream."""
    entering = states[3]
    positions = source.model.rotary_emb(entering, torch.arange(entering.shape[1])[None])
    return model.model.layers[1](entering, attention_mask=None, position_embeddings=positions)


def test_a_layer_is_made_of_heads_and_neurons_of_all_that_it_replaces(source):
    model = shared_model(source, "middle_cycle")
    report = fit_shared_layers(model, source, text_blocks().blocks[:64].split(16))
    assert [one.layer for one in report] == [1, 2]
    for one in report:
        slots = {one.layer, one.layer + 2}
        assert set(one.heads) == set(one.neurons) == slots
        assert sum(one.neurons.values()) == source.config.intermediate_size
        made, old = model.model.layers[one.layer], {slot: source.model.layers[slot] for slot in slots}
        for linear, norm in (("gate_proj", "post_attention_layernorm"), ("up_proj", "post_attention_layernorm")):
            rows = getattr(made.mlp, linear).weight * getattr(made, norm).weight
            start = 0
            for slot, count in one.neurons.items():
                candidates = getattr(old[slot].mlp, linear).weight * getattr(old[slot], norm).weight
                nearest = torch.cdist(rows[start : start + count], candidates).min(dim=1)
                assert nearest.values.max() < 5e-3 and len(set(nearest.indices.tolist())) == count
                start += count
        size = source.config.hidden_size // source.config.num_attention_heads
        for number, slot in enumerate(one.heads):
            keys = made.self_attn.k_proj.weight[number * size : (number + 1) * size] * made.input_layernorm.weight
            theirs = (old[slot].self_attn.k_proj.weight * old[slot].input_layernorm.weight).split(size)
            assert min(float((keys - own).abs().max()) for own in theirs) < 1e-5


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        *((family, {}) for family in FITTED_BACKBONES),
        ("granite", {"residual_multiplier": 0.5}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
    ],
)
def test_a_model_that_is_exact_already_stays_so(family, fields):
    """The source's layers are equal where they are shared: the solution is what they are."""
    model = tiny_mor(family, routing="none", num_recursions=2, num_hidden_layers=6, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    source = vanilla_of(model)
    ids = torch.randint(3, source.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = source(ids).logits
        report = fit_shared_layers(model, source, ids.split(4), compose=False)
        assert max(max(one.error) for one in report) < 1e-9
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FITTED_BACKBONES)
def test_layers_of_every_family_are_composed(family):
    """Of parts of the layers that they replace, biases and multipliers included."""
    model = tiny_mor(family, routing="none", num_recursions=2, num_hidden_layers=6, prelude_layers=1, coda_layers=1)
    source = vanilla_of(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in source.model.layers[1:5].parameters():
            parameter += 0.5 * parameter.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0
        ids = torch.randint(3, source.config.vocab_size, (48, 24))
        before = distance_at_the_end(model, source, ids[:8])
        report = fit_shared_layers(model, source, ids[8:].split(8))
        assert distance_at_the_end(model, source, ids[:8]) < 0.9 * before
    assert all(sum(one.neurons.values()) == source.config.intermediate_size for one in report)
    named = any("q_norm" in name for name, _ in model.named_modules())
    assert all(bool(one.heads) != named for one in report)
    for one in report:
        attention, heads = model.model.layers[one.layer].self_attn, one.heads
        if attention.k_proj.bias is None or not heads:
            continue
        for number, slot in enumerate(heads):
            size = attention.head_dim
            found = attention.k_proj.bias[number * size : (number + 1) * size]
            theirs = source.model.layers[slot].self_attn.k_proj.bias.split(size)
            assert any(torch.equal(found, part) for part in theirs)


def test_what_cannot_be_fitted_is_refused(source):
    with pytest.raises(ValueError, match="'mod' without repeated layers"):
        fit_shared_layers(MoDForCausalLM(MoDConfig.from_backbone(source.config)), source, [])
    model = shared_model(source, "middle_cycle")
    with pytest.raises(ValueError, match="holds no token"):
        fit_shared_layers(model, source, [])
    shallow = LlamaForCausalLM(source_config(num_hidden_layers=4))
    for fields, said in (
        ({"kv_mode": "shared"}, "keys and values of the first one"),
        ({"routing": "expert_choice", "gating": "additive"}, "'additive' changes what layers write"),
    ):
        other = MoRForCausalLM(
            MoRConfig.from_backbone(source_config(), num_recursions=2, **{"routing": "none", **fields})
        )
        with pytest.raises(ValueError, match=said):
            fit_shared_layers(other, source, text_blocks().blocks[:1].split(1))
    with pytest.raises(ValueError, match="6 unrolled layers and the source 4"):
        fit_shared_layers(model, shallow, text_blocks().blocks[:1].split(1))


@pytest.fixture(scope="module")
def relaxed_folder(source_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted") / "relaxed"
    fields = {"recursion_rank": 4, "recursion_norms": True, "routing": "none"}
    convert(source_folder, folder, num_recursions=2, quiet=True, **fields)
    return folder


def test_what_recursions_add_brings_each_nearer_to_its_source(relaxed_folder, source):
    """On text that the fit has not seen: nearer than the shared layers alone, and the more so, the higher the rank."""
    held_out = text_blocks().blocks[-16:]
    batches = text_blocks().blocks[:-16].split(16)
    shared = shared_model(source, "middle_cycle")
    fit_shared_layers(shared, source, batches)
    distances = [distance_at_the_end(shared, source, held_out)]
    few = AutoModelForCausalLM.from_pretrained(relaxed_folder)
    many = MoRForCausalLM(MoRConfig.from_backbone(source.config, num_recursions=2, recursion_rank=16, routing="none"))
    many.load_state_dict(shared_model(source, "middle_cycle").state_dict(), strict=False)
    for model in (few, many.eval()):
        report = fit_shared_layers(model, source, batches)
        assert all(len(one.error) == 2 for one in report)
        distances.append(distance_at_the_end(model, source, held_out))
    assert distances[0] > 1.02 * distances[1] > 1.02**2 * distances[2]


@pytest.mark.parametrize("family", FITTED_BACKBONES)
def test_differences_of_full_rank_reach_the_source_itself(family):
    """Layers that differ in what writes to the stream alone: the sum is what the source has, token for token."""
    fields = {"routing": "none", "num_recursions": 2, "num_hidden_layers": 6, "sharing": "cycle"}
    model = tiny_mor(family, recursion_rank=64, **fields)
    plain = tiny_mor(family, **fields)
    source = vanilla_of(plain)
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in source.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight += 0.2 * writer.weight.std() * torch.randn_like(writer.weight)
        model.load_state_dict(plain.state_dict(), strict=False)
        ids = torch.randint(3, source.config.vocab_size, (48, 24))
        report = fit_shared_layers(model, source, ids.split(8), compose=False, ridge=1e-9)
        assert max(max(one.error) for one in report) < 1e-8
        torch.testing.assert_close(model(ids[:2]).logits, source(ids[:2]).logits, rtol=1e-3, atol=1e-3)


def test_shared_matrices_make_room_for_what_recursions_add(source, monkeypatch):
    """Solved for at once, both come nearer to the source, on text of no fit, than the differences behind the rest."""
    held_out, batches = text_blocks().blocks[-16:], text_blocks().blocks[:-16].split(16)
    distances = []
    for rounds in (1, stream_writers._ROUNDS):
        monkeypatch.setattr(stream_writers, "_ROUNDS", rounds)
        torch.manual_seed(3)
        config = MoRConfig.from_backbone(source.config, num_recursions=2, recursion_rank=8, routing="none")
        model = MoRForCausalLM(config).eval()
        model.load_state_dict(shared_model(source, "middle_cycle").state_dict(), strict=False)
        fit_shared_layers(model, source, batches)
        distances.append(distance_at_the_end(model, source, held_out))
    assert distances[1] < 0.99 * distances[0]


def test_the_fit_drops_what_conversion_took_from_singular_values(relaxed_folder, source):
    """It was the difference to a shared layer that is another one now; what it read stays to learn from."""
    model = AutoModelForCausalLM.from_pretrained(relaxed_folder)
    converted = {name: p.clone() for name, p in model.named_parameters() if "recursion_adapter" in name}
    with torch.no_grad():
        for number, layer in enumerate(source.model.layers):
            layer.input_layernorm.weight *= 1 + 0.1 * number
            layer.post_attention_layernorm.weight *= 1 + 0.1 * number
    report = fit_shared_layers(model, source, text_blocks().blocks[:16].split(16))
    # matrices of several layers were divided by one norm, which each recursion must have
    for layer in (model.model.layers[one.layer] for one in report):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            assert torch.equal(norm.deeper[0].weight, norm.weight)
    for name, parameter in model.named_parameters():
        if "recursion_adapter" not in name:
            continue
        if "o_proj" in name or "down_proj" in name:
            assert bool((parameter != 0).all()) and not torch.equal(parameter, converted[name])
        elif name.endswith("_up"):
            assert not parameter.any() and bool(converted[name].any())
        else:
            assert torch.equal(parameter, converted[name])
