"""Parity with the official MoR modules where they are correct, from their formulas written out token by token.

Expert choice as its module computes it in training and evaluation (top-k over the sequence); token choice as its
module computes it for a single row (for several it indexes the wrong rows).
"""

import pytest
import torch
from tiny_families import VOCABULARY, tiny_mor
from written_out_llama import llama_layer, logits_of


def _block(model, x, positions):
    for layer in model.model.layers[1:-1]:
        x = llama_layer(layer, x, positions, model.config)
    return x


def _finish(model, h, positions):
    h = llama_layer(model.model.layers[-1], h, positions, model.config)
    return logits_of(model, h)


def _start(model, ids):
    positions = torch.arange(ids.shape[0])
    return llama_layer(model.model.layers[0], model.model.embed_tokens(ids), positions, model.config), positions


def official_expert_choice(model, ids, gating):
    """Logits, chosen tokens per depth, and the mean cross-entropy of each depth's router over its candidates."""
    config = model.config
    h, positions = _start(model, ids)
    chosen, members, losses = positions, [], []
    for r in range(config.num_recursions):
        scores = h[chosen] @ model.model.routers.weight[r, 0]
        weights = 0.1 * scores.sigmoid()
        k = max(1, int(config.capacities[r] * ids.shape[0]))
        top = weights.topk(k).indices.sort().values
        target = torch.zeros_like(scores)
        target[top] = 1.0
        losses.append(torch.nn.functional.binary_cross_entropy_with_logits(scores, target))
        gate, chosen = weights[top], chosen[top]
        update = _block(model, h[chosen], chosen)
        h = h.clone()
        h[chosen] = h[chosen] + (gate[:, None] * update if gating == "weighted" else update)
        members.append(chosen.tolist())
    return _finish(model, h, positions), members, losses


def official_token_choice(model, ids, gating):
    """Logits and the chosen depth of each token, 0-based."""
    entry, positions = _start(model, ids)
    probabilities = (entry @ model.model.routers.weight[0].T).softmax(-1)
    choice = probabilities.argmax(-1)
    weight = probabilities.gather(1, choice[:, None])
    h, out = entry, entry.clone()
    for r in range(model.config.num_recursions):
        active = positions[choice >= r]
        if not len(active):
            break
        h = h.clone()
        h[active] = _block(model, h[active], active)
        leaving = positions[choice == r]
        gate = weight[leaving] if gating == "weighted" else 1.0
        out[leaving] = gate * h[leaving] + entry[leaving]
    return _finish(model, out, positions), choice


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (17,), generator=torch.Generator().manual_seed(11))


@pytest.mark.parametrize("gating", ["weighted", "additive"])
@torch.no_grad()
def test_expert_choice_in_top_k_mode(ids, gating):
    model = tiny_mor(inference_rule="topk", gating=gating)
    expected, members, _ = official_expert_choice(model, ids, gating)
    output = model(ids[None], use_cache=False, output_routing=True)
    torch.testing.assert_close(output.logits[0], expected, rtol=1e-5, atol=1e-5)
    depth = torch.zeros(len(ids), dtype=torch.long)
    for chosen in members:
        depth[chosen] += 1
    assert output.token_depth[0].tolist() == depth.tolist()
    assert [len(chosen) for chosen in members] == [17, 11, 5]


def test_expert_choice_router_loss_in_training(ids):
    model = tiny_mor(aux_loss_coef=0.5).train()
    _, members, means = official_expert_choice(model, ids, "weighted")
    candidates = [len(ids), *(len(chosen) for chosen in members[:-1])]
    expected = 0.5 * sum(mean * n for mean, n in zip(means, candidates, strict=True)) / len(ids)
    torch.testing.assert_close(model.model(ids[None]).aux_loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gating", ["weighted", "additive"])
@torch.no_grad()
def test_token_choice_of_one_row(ids, gating):
    model = tiny_mor(routing="token_choice", gating=gating, seed=1)
    expected, choice = official_token_choice(model, ids, gating)
    output = model(ids[None], use_cache=False, output_routing=True)
    assert len(set(choice.tolist())) == 3
    assert output.token_depth[0].tolist() == (choice + 1).tolist()
    torch.testing.assert_close(output.logits[0], expected, rtol=1e-5, atol=1e-5)


def test_token_choice_balancing_losses(ids):
    model = tiny_mor(routing="token_choice", balancing_coef=0.1, router_z_loss_coef=0.01).train()
    entry, _ = _start(model, ids)
    logits = entry @ model.model.routers.weight[0].T
    probabilities = logits.softmax(-1)
    fraction = 3 * torch.nn.functional.one_hot(probabilities.argmax(-1), 3).float().mean(0)
    expected = 0.1 * (fraction * probabilities.mean(0)).sum() + 0.01 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(model.model(ids[None]).aux_loss, expected, rtol=1e-5, atol=1e-6)


def test_loss_free_balancing_moves_the_bias_against_the_load(ids):
    model = tiny_mor(routing="token_choice", balancing="loss_free").train()
    depth = model.model(ids[None], output_routing=True).token_depth[0]
    load = torch.bincount(depth - 1, minlength=3).float()
    expected = 0.001 * (load.mean() - load).sign()
    torch.testing.assert_close(model.model.balancing_bias[0], expected)


def test_capacity_warmup_starts_full_and_ends_at_the_capacity(ids):
    model = tiny_mor(capacity_warmup_steps=4).train()
    shares = [(model.model(ids[None], output_routing=True).token_depth == 3).float().mean().item() for _ in range(6)]
    assert shares[0] == 1.0 and shares == sorted(shares, reverse=True) and shares[-1] == pytest.approx(5 / 17)
    assert int(model.model.routing_step) == 6


def test_pads_take_no_capacity_and_ties_are_broken_exactly(ids):
    model = tiny_mor(capacities=[1.0, 0.5, 0.25]).train()
    with torch.no_grad():
        model.model.routers.weight.zero_()
    batch = torch.stack([torch.nn.functional.pad(ids[:8], (4, 0)), ids[:12]])
    output = model.model(batch, attention_mask=(batch != 0).long(), output_routing=True)
    depths = [torch.bincount(row, minlength=4).tolist() for row in output.token_depth]
    assert depths == [[4, 4, 2, 2], [0, 6, 3, 3]]
