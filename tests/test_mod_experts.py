"""MoDE (MoD paper, section 4.3): staged, MoD around blocks of experts, and integrated, no-op experts beside them."""

import pytest
import torch
from tiny_families import VOCABULARY, tiny_mod, vanilla_of
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM


MOE = ("mixtral", "qwen3_moe")
each_family = pytest.mark.parametrize("backbone", MOE)


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def rows() -> list[torch.Tensor]:
    return [tokens(1, 13), tokens(1, 6, seed=2)]


def batch() -> dict[str, torch.Tensor]:
    ids = torch.cat([F.pad(row, (0, 13 - row.shape[1])) for row in rows()])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def gates_of(model) -> list[torch.nn.Module]:
    return [layer.mlp.gate for layer in model.model.layers]


@each_family
@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
@pytest.mark.parametrize(("noop", "path"), [(0, "gathered"), (2, "gathered"), (1, "masked")])
def test_the_balance_counts_routed_tokens_only(backbone, unit, noop, path):
    """The loss of the Switch Transformer by hand: E sum_e (share of choices of e) (mean probability of e)."""
    balance = {"output_router_logits": True, "router_aux_loss_coef": 0.3, "aux_loss_coef": 0.0}
    model = tiny_mod(backbone, routing_unit=unit, num_noop_experts=noop, **balance).train()
    seen: list[torch.Tensor] = []
    hooks = [gate.register_forward_hook(lambda g, a, output: seen.append(output[0])) for gate in gates_of(model)]
    for row in rows():  # without pads, what is computed is what entered
        model(row)
    for hook in hooks:
        hook.remove()
    entering = [13, 6] if unit == "attention" else [6, 3]
    assert [len(logits) for logits in seen] == [13, entering[0]] * 2 + [6, entering[1]] * 2
    model.config.training_path = path
    probabilities = torch.cat(seen).softmax(-1)
    experts = 4 + noop
    chosen = F.one_hot(probabilities.topk(2, dim=-1).indices, experts).sum(1).float()
    expected = 0.3 * experts * (chosen.mean(0) * probabilities.mean(0)).sum()
    torch.testing.assert_close(model.model(**batch()).aux_loss, expected, rtol=1e-5, atol=1e-6)


@each_family
def test_without_routed_layers_the_balance_is_the_familys(backbone):
    balance = {"output_router_logits": True, "router_aux_loss_coef": 0.3, "aux_loss_coef": 0.0}
    model = tiny_mod(backbone, routed_layers=[], **balance).train()
    expected = vanilla_of(model).train()(**batch(), output_router_logits=True).aux_loss
    torch.testing.assert_close(model.model(**batch()).aux_loss, 0.3 * expected, rtol=1e-5, atol=1e-6)
    assert model.eval()(**batch()).aux_loss is None


@each_family
@pytest.mark.parametrize("unit", ["block", "mlp"])
def test_checkpointing_changes_neither_balance_nor_gradients(backbone, unit):
    balance = {"output_router_logits": True, "router_aux_loss_coef": 0.3, "aux_loss_coef": 0.1}
    model = tiny_mod(backbone, routing_unit=unit, num_noop_experts=1, **balance).train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        inputs = batch()
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert found[1][1].keys() == found[0][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    assert found[0][1]["model.layers.1.mlp.gate.weight"].norm() > 0
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="mixtures of experts|a part of a layer is routed"):
        model(**batch())


def written_out(layer, x: torch.Tensor, normalised: bool) -> torch.Tensor:
    """Token by token: softmax over all experts, the two best, of which the no-op ones add nothing."""
    experts, out = layer.mlp.experts, []
    for token in x:
        probabilities = (layer.mlp.gate.weight @ token).softmax(0)
        chosen = sorted(range(len(probabilities)), key=lambda e: -float(probabilities[e]))[:2]
        total = sum(probabilities[e] for e in chosen) if normalised else 1.0
        update = torch.zeros_like(token)
        for e in chosen:
            if e < experts.num_experts:
                gate, up = (experts.gate_up_proj[e] @ token).chunk(2)
                update = update + probabilities[e] / total * (experts.down_proj[e] @ (gate * gate.sigmoid() * up))
        out.append(update)
    return torch.stack(out)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("backbone", "normalised"), [("mixtral", True), ("qwen3_moe", True), ("qwen3_moe", False)])
@torch.no_grad()
def test_no_op_experts_are_a_choice_that_adds_nothing(backbone, normalised, implementation):
    fields = {"norm_topk_prob": normalised} if backbone == "qwen3_moe" else {}
    model = tiny_mod(backbone, num_noop_experts=3, **fields)
    model.set_experts_implementation(implementation)
    layer = model.model.layers[1]
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer.mlp(x[None])[0], written_out(layer, x, normalised), rtol=1e-5, atol=1e-6)
    chosen = layer.mlp.gate(x)[2]
    assert layer.mlp.gate.weight.shape == (7, 32) and chosen.max() > 3
    nothing = (chosen > 3).all(dim=1)
    assert nothing.any() and not layer.mlp(x[None])[0, nothing].any()
    assert not layer.mlp(x[None, nothing]).any()


@each_family
@torch.no_grad()
def test_no_op_choices_cost_no_matrix_product(backbone):
    model = tiny_mod(backbone, num_noop_experts=3)
    model.set_experts_implementation("eager")
    layer = model.model.layers[1]
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    real = int((layer.mlp.gate(x)[2] < 4).sum())
    with FlopCounterMode(display=False) as counter:
        layer.mlp(x[None])
    inner = layer.mlp.experts.down_proj.shape[-1]
    assert 0 < real < 80
    assert counter.get_total_flops() == 2 * 40 * 32 * 7 + real * 2 * 3 * 32 * inner


@each_family
def test_no_op_experts_train_and_survive_saving(backbone, tmp_path):
    model = tiny_mod(backbone, num_noop_experts=2).train()
    inputs = batch()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad[4:].norm() > 0
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (loaded.config.num_local_experts, loaded.config.num_noop_experts) == (4, 2)
    with torch.no_grad():
        # grouped products round by the alignment of the weights in memory
        torch.testing.assert_close(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("noop", [0, 1])
@each_family
@torch.no_grad()
def test_static_and_dynamic_caches_agree(backbone, noop):
    model = tiny_mod(backbone, num_noop_experts=noop)
    inputs = {**batch(), "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    inputs = {key: value.flip(1) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    assert torch.equal(model.generate(**inputs, cache_implementation="static"), model.generate(**inputs))
