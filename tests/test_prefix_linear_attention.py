"""The op of prefix linear attention: three forms, one result, in linear time; and the layer for anyone's model."""

import functools
import math

import pytest
import torch
from torch.autograd import gradcheck

from varidepth import PrefixLinearAttention, prefix_linear_attention
from varidepth.modeling import prefix_linear_attention as module
from varidepth.modeling.feature_maps import FEATURE_MAPS, FeatureMap, find_feature_map


BATCH, HEADS, FEATURES, VALUES = 2, 3, 4, 5


def problem(tokens: int, prefix: int, dtype: torch.dtype = torch.float64, features: int = FEATURES, seed: int = 0):
    """Query, key, value, and prefix key and value where there is a prefix."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(tokens, features), (tokens, features), (tokens, VALUES)]
    sizes += [(prefix, features), (prefix, VALUES)] if prefix else []
    return [torch.randn(BATCH, HEADS, *size, dtype=dtype, generator=generator) for size in sizes]


def masks(tokens: int, prefix: int, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(BATCH, tokens, generator=generator) > 0.3
    attention[:, 0] = True
    return {
        "attention_mask": attention,
        "prefix_mask": torch.rand(BATCH, prefix, generator=generator) > 0.3 if prefix else None,
    }


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    return float((given - expected).abs().max() / expected.abs().max())


def written_out(query, key, value, prefix_key=None, prefix_value=None, attention_mask=None, prefix_mask=None):
    """Equation 3 token by token, with the Taylor kernel as the paper writes it."""
    output = torch.zeros_like(value)
    scale = 1 / math.sqrt(query.shape[-1])

    def kernel(one, other):
        score = float(one @ other) * scale
        return 1 + score + score**2 / 2

    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i in range(query.shape[2]):
                terms = [
                    (kernel(query[b, h, i], key[b, h, j]), value[b, h, j])
                    for j in range(i + 1)
                    if attention_mask is None or attention_mask[b, j]
                ]
                terms += [
                    (kernel(query[b, h, i], prefix_key[b, h, j]), prefix_value[b, h, j])
                    for j in range(0 if prefix_key is None else prefix_key.shape[2])
                    if prefix_mask is None or prefix_mask[b, j]
                ]
                output[b, h, i] = sum(weight * vector for weight, vector in terms) / sum(weight for weight, _ in terms)
    return output


@pytest.mark.parametrize("implementation", module.IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens, prefix", [(7, 0), (7, 4), (7, 7), (4, 9)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_formula_of_the_paper(implementation, tokens, prefix, masked):
    tensors, kept = problem(tokens, prefix), masks(tokens, prefix) if masked else {}
    output, _ = prefix_linear_attention(*tensors, implementation=implementation, chunk_size=3, **kept)
    expected = written_out(*tensors, **kept)
    if masked:
        output, expected = (t * kept["attention_mask"][:, None, :, None] for t in (output, expected))
    assert relative_error(output, expected) <= 1e-12


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("tokens, prefix", [(1, 3), (64, 0), (130, 64), (130, 130), (100, 130), (2500, 1300)])
@pytest.mark.parametrize("in_graph", [False, True], ids=["inference", "training"])
def test_parallel_is_chunked_is_recurrent(feature_map, tokens, prefix, in_graph):
    tensors, kept = problem(tokens, prefix), masks(tokens, prefix)
    run = functools.partial(prefix_linear_attention, feature_map=feature_map, **kept)
    expected, state = run(*tensors, implementation="reference")
    if in_graph:
        tensors = [tensor.requires_grad_() for tensor in tensors]
    for implementation in ("chunked", "recurrent"):
        output, given_state = run(*tensors, implementation=implementation)
        assert relative_error(output.detach(), expected) <= 1e-10
        assert relative_error(given_state.detach(), state) <= 1e-10


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("tokens, prefix", [(30, 0), (70, 40), (40, 70)])
def test_gradients_are_those_of_the_formula(feature_map, tokens, prefix, monkeypatch):
    """Also where blocks are recomputed in the backward pass."""
    monkeypatch.setattr(module, "BLOCK_TOKENS", 32)
    tensors = [tensor.requires_grad_() for tensor in problem(tokens, prefix)]
    gradients = {}
    for implementation in module.IMPLEMENTATIONS:
        output, state = prefix_linear_attention(
            *tensors, implementation=implementation, feature_map=feature_map, chunk_size=8, **masks(tokens, prefix)
        )
        weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        gradients[implementation] = torch.autograd.grad((weight * output).sum() + state.square().mean(), tensors)
    for implementation in ("chunked", "recurrent"):
        for given, expected in zip(gradients[implementation], gradients["reference"], strict=True):
            assert relative_error(given, expected) <= 1e-10


@pytest.mark.parametrize("place", range(6))
def test_one_input_alone_may_need_a_gradient(place):
    """As with an adapter on one projection of the first layer."""
    tensors, mask = problem(100, 70), masks(100, 70)
    tensors.append(prefix_linear_attention(*problem(5, 0, seed=2))[1])

    def gradient(needing: list[int]) -> torch.Tensor:
        given = [tensor.clone().requires_grad_(i in needing) for i, tensor in enumerate(tensors)]
        output = prefix_linear_attention(*given[:5], state=given[5], chunk_size=8, **mask)[0]
        return torch.autograd.grad(output.square().sum(), given[place])[0]

    assert relative_error(gradient([place]), gradient([*range(6)])) <= 1e-12


def test_gradients_by_finite_differences():
    tensors = [tensor[:1, :1].clone().requires_grad_() for tensor in problem(5, 3)]
    assert gradcheck(lambda *given: prefix_linear_attention(*given, chunk_size=2), tensors)


def test_the_packed_features_have_the_products_of_the_full_ones():
    """153 features instead of 273, and the same inner products (twice 1 + s + s^2 / 2)."""
    taylor, (query, key) = FEATURE_MAPS["taylor"], problem(20, 0, features=16)[:2]

    def full(vectors: torch.Tensor) -> torch.Tensor:
        dim = vectors.shape[-1]
        square = (vectors[..., :, None] * vectors[..., None, :]).flatten(-2) / (2 * dim) ** 0.5
        return torch.cat([torch.ones_like(vectors[..., :1]), vectors / dim**0.25, square], dim=-1)

    assert full(query).shape[-1] == 273
    assert taylor.size(16) == 153
    expected = 2 * full(query) @ full(key).mT
    packed_query, packed_key = (taylor.expand(taylor.prepare(vectors)) for vectors in (query, key))
    assert packed_query.shape[-2] == 153
    packed = packed_query.mT @ (packed_key * taylor.weights(16, like=query))
    assert relative_error(packed, expected) <= 1e-13
    assert relative_error(taylor.kernel(taylor.prepare(query), taylor.prepare(key)), expected) <= 1e-13


def test_a_feature_map_of_ones_own(monkeypatch):
    class Squares(FeatureMap):
        def size(self, feature_dim):
            return feature_dim

        def expand(self, prepared):
            return prepared.square() + 0.1

    tensors = problem(9, 4)
    expected, _ = prefix_linear_attention(*tensors, feature_map=Squares(), implementation="reference")
    output, state = prefix_linear_attention(*tensors, feature_map=Squares(), chunk_size=4)
    assert relative_error(output, expected) <= 1e-12
    assert state.shape == (BATCH, HEADS, FEATURES, VALUES + 1)
    monkeypatch.setitem(FEATURE_MAPS, "squares", Squares())
    assert torch.equal(prefix_linear_attention(*tensors, feature_map="squares", chunk_size=4)[0], output)


@pytest.mark.parametrize("implementation", module.IMPLEMENTATIONS)
def test_continuing_from_a_state(implementation):
    query, key, value, *prefix = problem(50, 20)
    mask = masks(50, 20)["attention_mask"]
    whole, state = prefix_linear_attention(query, key, value, *prefix, attention_mask=mask)
    first, middle = prefix_linear_attention(
        *(tensor[:, :, :23] for tensor in (query, key, value)), *prefix, attention_mask=mask[:, :23]
    )
    kept = middle.clone()
    rest, last = prefix_linear_attention(
        *(tensor[:, :, 23:] for tensor in (query, key, value)),
        state=middle,
        attention_mask=mask[:, 23:],
        implementation=implementation,
    )
    assert relative_error(torch.cat([first, rest], dim=2), whole) <= 1e-12
    assert relative_error(last, state) <= 1e-12
    assert torch.equal(middle, kept)


@pytest.mark.parametrize("training", [False, True])
def test_no_rows_and_no_tokens(training):
    tensors = [tensor.requires_grad_(training) for tensor in problem(9, 4)]
    output, state = prefix_linear_attention(*(tensor[:0] for tensor in tensors))
    assert output.shape == (0, HEADS, 9, VALUES) and state.shape == (0, HEADS, 15, VALUES + 1)
    output, state = prefix_linear_attention(*(tensor[:, :, :0] for tensor in tensors[:3]), *tensors[3:])
    assert output.shape == (BATCH, HEADS, 0, VALUES)
    assert (
        relative_error(state.detach(), prefix_linear_attention(*(tensors[i] for i in (3, 3, 4)))[1].detach()) <= 1e-12
    )


def test_what_a_token_sees():
    """Causal behind and inside the prefix through `key`, all of the prefix through `prefix_key`."""
    query, key, value, prefix_key, prefix_value = problem(12, 6)
    before = prefix_linear_attention(query, key, value, prefix_key, prefix_value)[0]
    for at in range(12):
        moved = key.clone()
        moved[:, :, at] += 1
        changed = (prefix_linear_attention(query, moved, value, prefix_key, prefix_value)[0] != before).any(-1)
        assert not changed[:, :, :at].any() and changed[:, :, at:].all()
    for at in range(6):
        moved = prefix_key.clone()
        moved[:, :, at] += 1
        assert (prefix_linear_attention(query, key, value, moved, prefix_value)[0] != before).any(-1).all()


def test_masked_tokens_weigh_nothing():
    tensors, kept = problem(40, 20), masks(40, 20)
    before, state = prefix_linear_attention(*tensors, **kept)
    changed = [tensor.clone() for tensor in tensors]
    for tensor, mask in zip(changed, [*[kept["attention_mask"]] * 3, *[kept["prefix_mask"]] * 2], strict=True):
        tensor.masked_fill_(~mask[:, None, :, None], 7.0)
    after, given_state = prefix_linear_attention(*changed, **kept)
    seen = kept["attention_mask"][:, None, :, None]
    assert torch.equal(after * seen, before * seen) and torch.equal(given_state, state)
    leading = torch.zeros(BATCH, 40, dtype=torch.bool)
    leading[:, 3:] = True
    assert prefix_linear_attention(*tensors[:3], attention_mask=leading)[0].isfinite().all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("native", [False, True], ids=["widened", "native"])
def test_lower_precision(dtype, tolerance, native, monkeypatch):
    """The state is fp32 whatever the inputs are, also where products are taken in their own type."""
    if native:
        monkeypatch.setattr(module, "_product_dtype", lambda query: query.dtype)
    tensors = problem(300, 100, dtype)
    output, state = prefix_linear_attention(*tensors)
    expected, _ = prefix_linear_attention(*(tensor.double() for tensor in tensors))
    assert output.dtype == dtype and state.dtype == torch.float32
    assert relative_error(output.double(), expected) <= tolerance


@pytest.mark.parametrize("in_graph", [False, True], ids=["inference", "training"])
def test_autocast_does_not_round_the_state(in_graph):
    tensors = [tensor.requires_grad_(in_graph) for tensor in problem(200, 100, torch.float32)]
    expected = prefix_linear_attention(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = prefix_linear_attention(*tensors)
    assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_compiles_as_one_graph(training):
    tensors = problem(100, 40, torch.float32)
    expected, state = prefix_linear_attention(*tensors, **masks(100, 40))
    tensors = [tensor.requires_grad_(training) for tensor in tensors]
    compiled = torch.compile(prefix_linear_attention, fullgraph=True, backend="aot_eager")
    output, given_state = compiled(*tensors, **masks(100, 40))
    assert relative_error(output.detach(), expected) <= 1e-5
    assert relative_error(given_state.detach(), state) <= 1e-5
    if training:
        output.sum().backward()
        given = [tensor.grad.clone() for tensor in tensors]
        expected = torch.autograd.grad(prefix_linear_attention(*tensors, **masks(100, 40))[0].sum(), tensors)
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(given, expected, strict=True))


def test_training_keeps_only_inputs_of_long_rows(monkeypatch):
    """Memory between forward and backward: far below that of the features."""
    monkeypatch.setattr(module, "BLOCK_TOKENS", 128)
    tensors = [tensor.requires_grad_() for tensor in problem(1024, 512, torch.float32, features=16)]
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        prefix_linear_attention(*tensors)
    features = BATCH * HEADS * 1024 * 153 * 4
    assert sum(saved.values()) < features / 2


def test_the_layer_in_a_model_of_ones_own():
    torch.manual_seed(0)
    layer = PrefixLinearAttention(hidden_size=24, num_heads=3, feature_dim=4, head_dim=5).double()
    hidden_states = torch.randn(2, 11, 24, dtype=torch.float64)
    whole, state = layer(hidden_states, prefix_length=6)
    assert whole.shape == (2, 11, 24) and state.shape == (2, 3, 15, 6)
    by_mask, _ = layer(hidden_states, encoder_mask=torch.ones(2, 6))
    assert torch.equal(by_mask, whole)
    first, state = layer(hidden_states[:, :8], prefix_length=6)
    rest, _ = layer(hidden_states[:, 8:], state=state)
    assert relative_error(torch.cat([first, rest], dim=1), whole) <= 1e-12
    padded = torch.cat([torch.randn(2, 3, 24, dtype=torch.float64), hidden_states], dim=1)
    mask = torch.ones(2, 14)
    mask[:, :3] = 0
    left, _ = layer(padded, attention_mask=mask, prefix_length=torch.tensor([6, 6]))
    assert relative_error(left[:, 3:], whole) <= 1e-12
    causal = PrefixLinearAttention(24, num_heads=3, reads_prefix=False)
    assert not any("prefix" in name for name, _ in causal.named_parameters())
    with pytest.raises(ValueError, match="reads_prefix=False"):
        causal(hidden_states.float(), prefix_length=6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"implementation": "fast"}, "`implementation` is 'fast', but must be one of"),
        ({"feature_map": "tailor"}, "did you mean 'taylor'"),
        ({"chunk_size": 0}, "`chunk_size` is 0"),
        ({"attention_mask": torch.ones(2, 5)}, r"`attention_mask` has shape \(2, 5\), but must be \(2, 7\)"),
        ({"prefix_key": None}, "only one of `prefix_key` and `prefix_value`"),
        ({"prefix_key": None, "prefix_value": None, "prefix_mask": torch.ones(2, 4)}, "`prefix_mask` was given"),
        ({"key": torch.ones(2, 3, 6, 4)}, "`key` has shape"),
        ({"state": torch.ones(2, 3, 4, 6)}, r"`state` has shape \(2, 3, 4, 6\), but must be \(2, 3, 15, 6\)"),
        ({"query": torch.ones(2, 7, 4)}, "`query` has shape"),
    ],
)
def test_bad_input_gets_a_sentence(change, message):
    names = ("query", "key", "value", "prefix_key", "prefix_value")
    arguments = dict(zip(names, problem(7, 4), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        prefix_linear_attention(**arguments)


def test_an_unknown_map_names_the_known_ones():
    with pytest.raises(ValueError, match="'taylor', 'elu', 'softmax'"):
        find_feature_map("relu")
