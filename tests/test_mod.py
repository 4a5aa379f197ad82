"""MoD against equation 1 of the paper written out, and what its options promise: who competes, enters and learns."""

import math

import pytest
import torch
from tiny_families import MOD_BACKBONES, NO_SDPA, VOCABULARY, switch_on, tiny_mod, vanilla_of
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache
from written_out_llama import attention_update, logits_of, mlp_update

from varidepth.modeling.cache_naming import CACHE
from varidepth.modeling.decoder_backbone import family_of
from varidepth.modeling.depth_cache import cache_bytes
from varidepth.modeling.expert_choice import UNSET_THRESHOLD


UNITS = ("block", "attention", "mlp")
GATES = {
    "raw": lambda r: r,
    "sigmoid": torch.sigmoid,
    "one_plus_tanh": lambda r: 1 + 0.2 * torch.tanh(r),
    "straight_through": lambda r: 1 + torch.sigmoid(r) - torch.sigmoid(r).detach(),
}


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.stack([F.pad(row, (width - len(row), 0)) for row in rows])
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def best(scores: torch.Tensor, count: int) -> list[int]:
    """The indices of the `count` highest scores, ascending; of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))
    return sorted(order[:count])


def equation_1(model, ids: torch.Tensor, choose, lures: bool = False) -> torch.Tensor:
    """Logits of one row: x_i + g(r_i) f_i(X~) for the chosen tokens, x_i for the others, in plain loops.

    Args:
        choose: scores of one router -> the tokens that enter.
        lures: tokens that stay out get what they would have got times their gate less itself, which is 0.
    """
    config, base = model.config, model.model
    positions = torch.arange(len(ids))
    x = base.embed_tokens.weight[ids]
    for number, layer in enumerate(base.layers):
        everyone = list(range(len(ids)))
        chosen, gate = everyone, torch.ones(len(ids), dtype=x.dtype)
        if number in config.routed_layers:
            scores = x @ base.routers.weight[config.routed_layers.index(number), 0]
            chosen, gate = choose(scores), GATES[config.gate](scores)

        def attend(x, i, others):
            """What attention adds to token i, which sees itself and the earlier ones of `others`."""
            seen = [j for j in others if j < i] + [i]
            return attention_update(layer, x[seen], positions[seen], config)[-1]  # noqa: B023

        for unit in ("block",) if config.routing_unit == "block" else ("attention", "mlp"):
            routed = unit == config.routing_unit
            rows = list(x)
            for i in everyone:
                inside = not routed or i in chosen
                if not inside and not lures:
                    continue
                update = 0.0
                if unit != "mlp":
                    update = attend(x, i, chosen if routed else everyone)
                if unit != "attention":
                    update = update + mlp_update(layer, (x[i] + update)[None], config)[0]
                factor = gate[i] if routed else 1.0
                rows[i] = rows[i] + (factor if inside else factor - factor.detach()) * update
            x = torch.stack(rows)
    return logits_of(model, x)


def in_double(**fields):
    """Its routers compute in fp32 nevertheless, which bounds the agreement to their rounding."""
    return tiny_mod(routed_layers=[0, 2, 3], aux_loss_coef=0.0, **fields).double()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("gate", "path"), [*((gate, "gathered") for gate in GATES), ("raw", "masked")])
def test_equation_1_and_its_gradients(gate, path, unit):
    """With `training_path="masked"` the routers learn from the tokens that stay out too; the values are the same."""
    model = in_double(gate=gate, routing_unit=unit, capacity=[0.5, 0.3, 0.7], training_path=path).train()
    ids = tokens(1, 13)[0]
    capacities = iter(model.config.capacities * 10)

    def top(scores):
        return best(scores, int(next(capacities) * len(ids)))

    direction = torch.randn(len(ids), VOCABULARY, generator=torch.Generator().manual_seed(2)).double()
    found, expected = model(ids[None]).logits[0], equation_1(model, ids, top, lures=path == "masked")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad((found * direction).sum(), list(parameters.values()))
    written_out = torch.autograd.grad((expected * direction).sum(), list(parameters.values()))
    for name, given, wanted in zip(parameters, gradients, written_out, strict=True):
        assert (given - wanted).norm() <= 1e-5 * wanted.norm(), name

    if gate == "straight_through" or path == "masked":  # no slope of a value
        return
    router = model.model.routers.weight
    gradient = gradients[list(parameters).index("model.routers.weight")]
    for number, column in ((0, 0), (1, 7), (2, 20)):
        differences = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                router[number, 0, column] += step
                differences.append((equation_1(model, ids, top) * direction).sum())
                router[number, 0, column] -= step
        slope = float((differences[0] - differences[1]) / 2e-6)
        assert float(gradient[number, 0, column]) == pytest.approx(slope, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("unit", UNITS)
@torch.no_grad()
def test_equation_1_by_the_causal_rule(unit):
    model = in_double(gate="raw", routing_unit=unit, router_thresholds=[0.45, 0.5, 0.6])
    ids = tokens(1, 13)[0]
    thresholds = iter(model.config.router_thresholds)
    expected = equation_1(
        model,
        ids,
        lambda scores, t=thresholds: [i for t in [next(t)] for i, s in enumerate(scores) if s.sigmoid() >= t],
    )
    output = model(ids[None], output_routing=True)
    torch.testing.assert_close(output.logits[0], expected, rtol=1e-6, atol=1e-6)
    shares = output.routing_mask.float().mean(dim=(0, 1))
    assert ((shares > 0) & (shares < 1)).all()


@pytest.mark.parametrize("backbone", ["llama", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("unit", UNITS)
@torch.no_grad()
def test_gathering_is_masking(backbone, unit):
    """The static mode computes every token and masks; in fp64 the two agree to its rounding."""
    model = tiny_mod(backbone, routing_unit=unit, gate="straight_through", routed_layers=[0, 1, 3]).double()
    batch = left_padded([tokens(1, 12)[0], tokens(1, 7, seed=3)[0]])
    gathered = model(**batch, use_cache=False, output_routing=True)
    assert 0 < float(gathered.routing_mask.float().mean()) < 1
    cache = StaticCache(config=model.config, max_cache_len=16)
    cache.stream_length = 16
    masked = model(**batch, cache=cache).logits
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(masked[valid], gathered.logits[valid], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backbone", ["mistral", "gemma2", "olmo2", "mixtral"])
@pytest.mark.parametrize("unit", UNITS)
def test_masked_training_computes_what_gathered_training_does(backbone, unit):
    """Padded batches, windows, norms behind the part and experts; all weights but the routers' see the same tokens."""
    batch = left_padded([tokens(1, 12)[0], tokens(1, 7, seed=3)[0]])
    valid = batch["attention_mask"].bool()
    found = []
    for path in ("gathered", "masked"):
        model = tiny_mod(backbone, routing_unit=unit, routed_layers=[3], training_path=path, gate="sigmoid").train()
        model.model.routers.requires_grad_(False)
        logits = model(**batch).logits[valid]
        logits.logsumexp(-1).sum().backward()
        gradients = {name: p.grad for name, p in model.model.layers[3].named_parameters() if p.grad is not None}
        found.append((logits.detach(), gradients))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    for name, gradient in found[0][1].items():
        assert (found[1][1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("routing", ["expert_choice", "stochastic"])
def test_exactly_the_capacity_enters_and_pads_do_not_compete(routing):
    model = tiny_mod(routing=routing, capacity=[0.5, 0.25]).train()
    if routing == "expert_choice":
        switch_on(model)
    rows = [tokens(1, 13)[0], tokens(1, 6)[0], tokens(1, 1)[0]]
    mask = model.model(**left_padded(rows), output_routing=True).routing_mask
    assert mask.sum(dim=1).tolist() == [[6, 3], [3, 1], [1, 1]]
    assert not mask[1, :7].any() and not mask[2, :12].any()
    if routing == "expert_choice":  # all scores are equal: the first ones win
        assert mask[0, :6, 0].all() and mask[1, 7:10, 0].all()


@torch.no_grad()
def test_positions_are_the_original_ones():
    """Rotary embeddings know distances only: shifted positions change nothing, other distances do."""
    model = tiny_mod(routed_layers=[1, 2, 3])
    ids, positions = tokens(2, 14), torch.arange(14)[None]
    plain = model(ids, position_ids=positions, output_routing=True)
    assert len(plain.token_depth.unique()) > 2
    torch.testing.assert_close(model(ids, position_ids=positions + 31).logits, plain.logits, rtol=1e-5, atol=1e-5)
    assert (model(ids, position_ids=2 * positions, use_cache=True).logits - plain.logits).abs().max() > 1e-3


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    "fields", [{}, {"always_route_first": 2}, {"capacity_multiple": 3}, {"training_path": "masked"}], ids=str
)
@torch.no_grad()
def test_packed_documents_compete_alone(unit, fields):
    """In training too, where the top-k of a packed row is that of each document."""
    model = tiny_mod(routing_unit=unit, routed_layers=[0, 1, 3], **fields).train()
    documents = [tokens(1, n, seed=n)[0] for n in (9, 1, 6, 4)]
    alone = [model(document[None], output_routing=True) for document in documents]
    packed = model(
        torch.cat(documents)[None],
        position_ids=torch.cat([torch.arange(len(document)) for document in documents])[None],
        output_routing=True,
    )
    assert torch.equal(packed.routing_mask, torch.cat([output.routing_mask for output in alone], dim=1))
    expected = torch.cat([output.logits for output in alone], dim=1)
    torch.testing.assert_close(packed.logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("routing", ["expert_choice", "stochastic"])
@torch.no_grad()
def test_first_tokens_always_enter(routing):
    closed = {"router_thresholds": [1.0, 1.0]} if routing == "expert_choice" else {"capacity": 0.01}
    model = tiny_mod(routing=routing, always_route_first=2, **closed)
    rows = [tokens(1, 9)[0], tokens(1, 5)[0], tokens(1, 1)[0]]
    batch = left_padded(rows)
    first = torch.zeros(3, 9, dtype=torch.bool)
    for row, ids in enumerate(rows):
        first[row, 9 - len(ids) : 11 - len(ids)] = True
    for cache in (None, StaticCache(config=model.config, max_cache_len=9)):
        mask = model(**batch, cache=cache, output_routing=True).routing_mask
        assert torch.equal(mask[..., 0], first) and torch.equal(mask[..., 1], first)
    cache, steps = DynamicCache(config=model.config), []
    for column in range(9):
        step = {name: value[:, column : column + 1] for name, value in batch.items()}
        step["attention_mask"] = batch["attention_mask"][:, : column + 1]
        steps.append(model(**step, cache=cache, output_routing=True).routing_mask)
    assert torch.equal(torch.cat(steps, dim=1)[..., 0], first)

    trained = tiny_mod(routing=routing, always_route_first=4, capacity=[0.5, 0.1]).train()
    mask = trained(**batch, output_routing=True).routing_mask
    assert mask.sum(dim=1).tolist() == [[4, 4], [4, 4], [1, 1]]
    assert mask[0, :4].all() and mask[1, 4:8].all()


def test_the_count_is_rounded_up_to_a_multiple():
    model = tiny_mod(capacity=[0.4, 0.1], capacity_multiple=4).train()
    rows = [tokens(1, 13)[0], tokens(1, 3)[0]]
    assert model(**left_padded(rows), output_routing=True).routing_mask.sum(dim=1).tolist() == [[8, 4], [3, 3]]


def test_capacity_falls_along_a_cosine(tmp_path):
    model = tiny_mod(capacity=[0.25, 0.5], capacity_warmup_steps=4).train()
    ids, counts = tokens(1, 16), []
    for _ in range(6):
        counts.append(model(ids, output_routing=True).routing_mask.sum(dim=1)[0].tolist())
        model.eval()(ids)
        model.train()
    shares = [(1 + math.cos(math.pi * min(step, 4) / 4)) / 2 for step in range(6)]
    assert counts == [[int(16 * (c + (1 - c) * share)) for c in (0.25, 0.5)] for share in shares]
    assert int(model.model.routing_step) == 6
    model.save_pretrained(tmp_path)
    assert int(type(model).from_pretrained(tmp_path).model.routing_step) == 6


def test_stochastic_routing_knows_nothing_of_the_tokens():
    model = tiny_mod(routing="stochastic", capacity=[0.5, 0.25], seed=3)
    assert not any("router" in name for name in model.state_dict())
    rows = [tokens(1, 40)[0], tokens(1, 30, seed=5)[0]]
    alone = [model(row[None], output_routing=True).routing_mask[0] for row in rows]
    assert torch.equal(alone[0][:30], alone[1])
    batch = model(**left_padded(rows), output_routing=True)
    assert torch.equal(batch.routing_mask[1, 10:], alone[1]) and not batch.routing_mask[1, :10].any()
    shares = model(tokens(1, 2000), output_routing=True, use_cache=False).routing_mask.float().mean(dim=(0, 1))
    assert shares.tolist() == pytest.approx([0.5, 0.25], abs=0.05)
    assert not torch.equal(alone[0][:, 0], alone[0][:, 1])
    model.train()
    draws = [model(rows[0][None], output_routing=True).routing_mask for _ in range(2)]
    assert not torch.equal(*draws)
    assert [draw.sum(dim=1).tolist() for draw in draws] == [[[20, 10]]] * 2


def training_outputs(**fields):
    model = tiny_mod(aux_loss_coef=0.5, **fields).train()
    batch = left_padded([tokens(1, 13)[0], tokens(1, 6)[0]])
    return model, batch, model.model(**batch, output_routing=True)


@pytest.mark.parametrize("rule", ["threshold", "predictor"])
def test_the_rule_learns_the_members_and_pads_teach_nothing(rule):
    model, batch, outputs = training_outputs(inference_rule=rule)
    valid = batch["attention_mask"].bool()
    logits, members = outputs.decision_logits[valid], outputs.routing_mask[valid].float()
    expected = 0.5 * F.binary_cross_entropy_with_logits(logits, members, reduction="none").sum(1).mean()
    torch.testing.assert_close(outputs.aux_loss, expected, rtol=1e-5, atol=1e-6)
    assert 0 < members.sum() < members.numel()
    assert torch.equal(logits, outputs.router_logits[valid]) == (rule == "threshold")
    alone = [model.model(row[None], output_routing=True) for row in (tokens(1, 13)[0], tokens(1, 6)[0])]
    together = (13 * alone[0].aux_loss + 6 * alone[1].aux_loss) / 19
    torch.testing.assert_close(outputs.aux_loss, together, rtol=1e-5, atol=1e-6)


def test_the_predictor_does_not_reach_the_stream():
    model, _, outputs = training_outputs(inference_rule="predictor", predictor_hidden_size=12)
    assert model.model.predictors.expand_weight.shape == (2, 12, 32)
    outputs.aux_loss.backward()
    for name, parameter in model.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.any())
        assert moved == ("predictors" in name), name
    # the paper's first method has no such stop
    model, _, outputs = training_outputs()
    outputs.aux_loss.backward()
    assert model.model.embed_tokens.weight.grad.any() and model.model.routers.weight.grad.any()


@torch.no_grad()
def test_the_predictor_decides_and_the_router_gates():
    model = tiny_mod(inference_rule="predictor", routed_layers=[3], seed=3)
    ids = tokens(1, 12)
    plain = model(ids, output_routing=True)
    assert 0 < int(plain.routing_mask.sum()) < 12
    assert torch.equal(plain.routing_mask[..., 0], plain.decision_logits[..., 0] >= 0)
    model.model.routers.weight.mul_(-2)
    other = model(ids, output_routing=True)
    assert torch.equal(other.routing_mask, plain.routing_mask)
    moved = (other.logits - plain.logits).abs().amax(-1) > 1e-6
    assert torch.equal(moved, plain.routing_mask[..., 0])


@torch.no_grad()
def test_the_running_mean_follows_the_edge_and_decides():
    model = tiny_mod(inference_rule="ema_threshold", capacity=[0.25, 0.5], ema_decay=0.9)
    model.model.threshold_ema.fill_(UNSET_THRESHOLD)
    ids = tokens(2, 12)
    assert model(ids, output_routing=True).routing_mask.all(), "before the first step everyone enters"
    means = None
    for step in range(3):
        output = model.train()(tokens(2, 12, seed=step), output_routing=True)
        edges = []
        for router, count in enumerate((2 * 3, 2 * 6)):
            ranked = output.router_logits[..., router].flatten().sort(descending=True).values
            edges.append((ranked[count - 1] + ranked[count]) / 2)
        edges = torch.stack(edges)
        means = edges if means is None else 0.9 * means + 0.1 * edges
        torch.testing.assert_close(model.model.threshold_ema, means)
    output = model.eval()(ids, output_routing=True)
    assert torch.equal(output.routing_mask, output.router_logits >= means)
    assert torch.equal(model.model.threshold_ema, means), "evaluation moves nothing"


@torch.no_grad()
def test_first_tokens_do_not_move_the_running_mean():
    """They enter whatever they score: the rest of the capacity is what the threshold has to let in."""
    model = tiny_mod(inference_rule="ema_threshold", capacity=0.5, always_route_first=3, routed_layers=[1])
    model.model.threshold_ema.fill_(UNSET_THRESHOLD)
    output = model.train()(tokens(1, 12), output_routing=True)
    rest = output.router_logits[0, 3:, 0].sort(descending=True).values
    torch.testing.assert_close(model.model.threshold_ema[0], (rest[2] + rest[3]) / 2)
    again = model.eval()(tokens(1, 12), output_routing=True)
    assert int(again.routing_mask.sum()) == 6


def test_the_straight_through_gate_is_exactly_one():
    """To the last bit; its gradient, the sigmoid's, is compared above."""
    model, plain = (tiny_mod(gate=gate, routed_layers=[0, 2, 3]).train() for gate in ("straight_through", "raw"))
    plain.config.gate, plain.config.router_alpha = "one_plus_tanh", 1e-30
    output = model(tokens(2, 12))
    assert torch.equal(plain(tokens(2, 12)).logits, output.logits)
    output.logits.logsumexp(-1).sum().backward()
    assert model.model.routers.weight.grad.norm() > 1e-4


CONSTANT = {"router_bias": True, "gate": "sigmoid", "router_thresholds": [0.0] * 2}


def gated_vanilla(model, gate: float):
    """The vanilla model whose weights are scaled so that the routed part of each routed layer adds `gate` of it."""
    vanilla, unit = vanilla_of(model), model.config.routing_unit
    norm = family_of(model.config).norm_after.get(unit)
    for number in model.config.routed_layers:
        layer = vanilla.model.layers[number]
        if norm is not None:
            weight = getattr(layer, norm).weight
            zero_centred = model.config.backbone.startswith("gemma")
            weight.copy_((1 + weight) * gate - 1 if zero_centred else weight * gate)
            continue
        names = ("o_proj",) if unit == "attention" else ("down_proj", "c_proj")
        part = layer.self_attn if unit == "attention" else layer.mlp
        scaled = [p for name, p in part.named_parameters() if any(n in name for n in names)]
        assert scaled
        for parameter in scaled:
            parameter.mul_(gate)
    return vanilla


@pytest.mark.parametrize("capacity", [1.0, 0.5], ids=["dense", "gathered"])
@pytest.mark.parametrize("unit", ["attention", "mlp"])
@pytest.mark.parametrize("backbone", MOD_BACKBONES)
@torch.no_grad()
def test_a_constant_gate_scales_the_part_behind_its_norm(backbone, unit, capacity):
    """residual + g norm(part): a gate before the norm of olmo2, gemma, exaone4 and glm4 would be undone by it."""
    model = tiny_mod(backbone, routing_unit=unit, capacity=capacity, **CONSTANT)
    model.model.routers.weight.zero_()
    model.model.routers.bias.fill_(-0.8)
    gate = float(torch.tensor(-0.8).sigmoid())
    expected = gated_vanilla(model, gate)(tokens(2, 12)).logits
    torch.testing.assert_close(model(tokens(2, 12)).logits, expected, rtol=1e-5, atol=1e-5)
    assert (vanilla_of(model)(tokens(2, 12)).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("backbone", MOD_BACKBONES)
@torch.no_grad()
def test_a_constant_gate_scales_the_update_of_the_block(backbone):
    model = tiny_mod(backbone, **CONSTANT)
    model.model.routers.weight.zero_()
    model.model.routers.bias.fill_(-0.8)
    vanilla, gate = vanilla_of(model), torch.tensor(-0.8).sigmoid()

    def update_only(layer, args, output):
        return args[0] + gate * (output - args[0])

    for number in model.config.routed_layers:
        vanilla.model.layers[number].register_forward_hook(update_only)
    expected = vanilla(tokens(2, 12)).logits
    torch.testing.assert_close(model(tokens(2, 12)).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", UNITS)
@torch.no_grad()
def test_skipped_tokens_store_nothing(unit):
    model = tiny_mod(routing_unit=unit, routed_layers=[0, 1, 3])
    rows = [tokens(1, 12)[0], tokens(1, 7)[0]]
    batch = left_padded(rows)
    output = model(**batch, use_cache=True, output_routing=True)
    entered, cache = int(output.routing_mask.sum()), output.cache
    step = model(
        tokens(2, 1),
        attention_mask=F.pad(batch["attention_mask"], (0, 1), value=1),
        position_ids=batch["position_ids"][:, -1:] + 1,
        cache=cache,
        output_routing=True,
    )
    entered += int(step.routing_mask.sum())
    per_token = 2 * 4 * model.config.num_key_value_heads * model.config.head_dim
    dense = 2 * 13  # of each layer, pads included as in vanilla models
    expected = 4 * dense if unit == "mlp" else dense + entered
    assert 0 < entered < 3 * 21
    assert cache_bytes(cache)["stored"] == per_token * expected


@pytest.mark.parametrize("unit", ["block", "attention"])
@torch.no_grad()
def test_an_eighth_of_the_tokens_in_every_other_layer_is_9_16_of_the_cache(unit):
    """The paper's layout: 56.25 % of the dense cache, here with a share that is exact."""
    model = tiny_mod(routing_unit=unit, capacity=0.125, router_thresholds=[1.0, 1.0], always_route_first=2)
    ids = tokens(1, 16)
    cache = model(ids, use_cache=True).cache
    dense = vanilla_of(model)(ids, use_cache=True)[CACHE]
    assert cache_bytes(cache)["stored"] == 0.5625 * cache_bytes(dense)["stored"]


@pytest.mark.parametrize("unit", UNITS)
@torch.no_grad()
def test_layers_that_nobody_enters_do_not_run(unit):
    model = tiny_mod(routing_unit=unit, router_thresholds=[1.0, 1.0], attention="eager")
    layer = model.model.layers[1]
    called = []
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        layer.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    output = model(tokens(2, 9), output_attentions=True, output_hidden_states=True)
    assert called == {"block": [], "attention": ["mlp.up_proj"], "mlp": ["self_attn.q_proj"]}[unit]
    assert len(output.attentions) == 4 and len(output.hidden_states) == 5
    if unit == "block":
        assert torch.equal(output.hidden_states[1], output.hidden_states[2])
    if unit != "mlp":
        assert not output.attentions[1].any()


@pytest.mark.parametrize("backbone", sorted(NO_SDPA) + ["llama", "qwen3"])
@pytest.mark.parametrize("unit", UNITS)
@torch.no_grad()
def test_attention_weights_are_put_to_their_tokens(backbone, unit):
    model = tiny_mod(backbone, routing_unit=unit, attention="eager")
    output = model(tokens(1, 12), output_attentions=True, output_routing=True)
    for number, weights in enumerate(output.attentions):
        assert weights.shape == (1, 4, 12, 12)
        inside = torch.ones(12, dtype=torch.bool)
        if unit != "mlp" and number in model.config.routed_layers:
            inside = output.routing_mask[0, :, model.config.routed_layers.index(number)]
        torch.testing.assert_close(weights.sum(-1), inside.float().expand(1, 4, -1))
        assert not weights[..., ~inside].any()
