"""JRT-RNN as a model: what a prefix does, what a cache holds, how short prompts are read, and what is refused."""

import functools

import pytest
import torch
from tiny_jrt import MASK, PREFIX, VOCABULARY, tiny_jrt, tokens
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from varidepth import JRTConfig, JRTForCausalLM, JRTForSequenceClassification, JRTModel, PrefixLinearAttention
from varidepth.modeling import window_blocks
from varidepth.modeling.prefix_cache import PrefixStateLayer


TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    return float((given - expected).abs().max() / expected.abs().max())


def left_padded(rows: list[torch.Tensor], width: int | None = None) -> dict[str, torch.Tensor]:
    width = width or max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, width - row.shape[1] :], mask[place, width - row.shape[1] :] = row[0], 1
    return {"input_ids": ids, "attention_mask": mask}


# --- the architecture


@pytest.mark.parametrize(
    "preset, parameters, reading, convolutions",
    [("360m", 356_578_304, [1, 6, 11, 16, 21], 16), ("1.3b", 1_375_143_168, [1, 6, 11, 16, 21, 27, 33], 22)],
)
def test_presets_are_the_released_models(preset, parameters, reading, convolutions):
    config = JRTConfig.preset(preset)
    with torch.device("meta"):
        model = JRTForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [i for i, kind in enumerate(config.layer_types) if kind == "linear_attention"] == reading
    assert [i - 1 for i, kind in enumerate(config.layer_types) if kind == "sliding_attention"] == reading
    assert config.layer_types.count("conv") == convolutions
    assert (config.sliding_window, config.prefix_length, config.mask_token_id) == (129, 1024, 50263)


def test_a_causal_model_has_no_weights_for_a_prefix():
    names = [name for name, _ in tiny_jrt(prefix_length=0).named_parameters()]
    assert not any("prefix" in name for name in names)
    assert sum("prefix" in name for name, _ in tiny_jrt().named_parameters()) == 4


def test_initial_weights():
    """Projections into the residual stream are smaller by sqrt(2 layers); convolutions start as torch's own."""
    model = JRTForCausalLM(JRTConfig(vocab_size=500, hidden_size=256, num_hidden_layers=8, intermediate_size=512))
    for name, parameter in model.named_parameters():
        spread = float(parameter.std())
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        elif name.endswith(".bias"):
            assert not parameter.any()
        elif "conv.conv" in name:
            assert parameter.abs().max() <= 3**-0.5 and spread > 0.3
        elif name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            assert spread == pytest.approx(0.02 / 4, rel=0.05), name
        else:
            assert spread == pytest.approx(0.02, rel=0.05), name


def test_the_window_is_129_keys():
    model = tiny_jrt(layer_types=["sliding_attention"], num_hidden_layers=1, prefix_length=0, sliding_window=129)
    ids = tokens(1, 200)
    before = model(ids).logits
    for distance, seen in ((128, True), (129, False)):
        changed = ids.clone()
        changed[0, 199 - distance] = 1
        assert bool((model(changed).logits[0, 199] != before[0, 199]).any()) is seen


@pytest.mark.parametrize("auto", [AutoConfig, AutoModel, AutoModelForCausalLM])
def test_a_checkpoint_through_auto_classes(auto, tmp_path):
    model = tiny_jrt()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in {name for name, _ in model.named_parameters()}
    loaded = auto.from_pretrained(tmp_path)
    if auto is AutoConfig:
        fields = JRTConfig.__dataclass_fields__
        assert all(
            getattr(loaded, name) == getattr(model.config, name)
            for name in fields
            if name not in ("dtype", "transformers_version")
        )
    else:
        base = loaded if auto is AutoModel else loaded.model
        assert isinstance(base, JRTModel)
        ids = tokens(1, 9)
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_the_classifier_reads_the_last_token():
    config = tiny_jrt().config
    model = JRTForSequenceClassification(config).eval()
    rows = [tokens(1, 9, seed=1), tokens(1, 5, seed=2)]
    together = model(**left_padded(rows)).logits
    for place, row in enumerate(rows):
        assert relative_error(together[place], model(row).logits[0]) <= TOLERANCE


# --- the prefix


def test_what_a_position_depends_on():
    """All of the prefix before its end, everything before it behind; never a later token behind the prefix."""
    model, ids = tiny_jrt(), tokens(1, 14)
    before = model(ids, prefix_length=8).logits
    for at in range(14):
        changed = ids.clone()
        changed[0, at] = 1 + (ids[0, at] == 1)
        moved = (model(changed, prefix_length=8).logits != before).any(-1)[0]
        assert moved.tolist() == ([True] * 14 if at < 8 else [False] * at + [True] * (14 - at))


@pytest.mark.parametrize("length", [3, PREFIX, PREFIX + 4])
def test_by_default_the_first_tokens_are_the_prefix(length):
    model, ids = tiny_jrt(), tokens(2, length)
    output = model(ids)
    assert output.prefix_length.tolist() == [min(length, PREFIX)] * 2
    assert torch.equal(output.logits, model(ids, prefix_length=min(length, PREFIX)).logits)
    assert not torch.equal(output.logits, model(ids, prefix_length=0).logits)


def test_a_mask_is_another_way_to_say_a_length():
    model, rows = tiny_jrt(), [tokens(1, 12, seed=1), tokens(1, 9, seed=2)]
    batch = left_padded(rows)
    by_length = model(**batch, prefix_length=torch.tensor([4, 7])).logits
    mask = torch.zeros(2, 10)
    mask[0, :4] = mask[1, 3:10] = 1
    assert torch.equal(model(**batch, encoder_mask=mask).logits, by_length)
    assert relative_error(by_length[1, 3:], model(rows[1], prefix_length=7).logits[0]) <= TOLERANCE


def test_a_prefix_with_holes():
    """`encoder_mask` need not be a beginning: what is outside is only seen causally."""
    model, ids = tiny_jrt(layer_types=["linear_attention"], num_hidden_layers=1), tokens(1, 10)
    mask = torch.tensor([[0, 0, 0, 1, 1]])
    before = model(ids, encoder_mask=mask).logits
    changed = ids.clone()
    changed[0, 2] = 1
    assert (model(changed, encoder_mask=mask).logits != before).any(-1)[0].tolist() == [False] * 2 + [True] * 8
    changed[0, 2], changed[0, 3] = ids[0, 2], 1
    assert (model(changed, encoder_mask=mask).logits != before).any(-1)[0].all()


@pytest.mark.parametrize(
    "prefix", [{}, {"prefix_length": 3}, {"encoder_mask": torch.ones(1, 5)}, {"prefix_length": 0}]
)
@pytest.mark.parametrize("prompt_length", [5, 9])
def test_generate_keeps_the_prefix_of_the_prompt(prefix, prompt_length):
    """With a cache, without one, with chunks, and by hand."""
    model, prompt = tiny_jrt(), tokens(1, prompt_length)
    run = functools.partial(model.generate, max_new_tokens=8, do_sample=False, eos_token_id=None, **prefix)
    by_hand = prompt
    pinned = prefix or {"prefix_length": min(PREFIX, prompt_length)}
    for _ in range(8):
        by_hand = torch.cat([by_hand, model(by_hand, **pinned).logits[:, -1:].argmax(-1)], dim=1)
    for way in ({}, {"use_cache": False}, {"prefill_chunk_size": 2}, {"num_beams": 1, "num_return_sequences": 1}):
        assert run(prompt, **way).tolist() == by_hand.tolist(), way


def test_an_assistant_does_not_see_the_prefix_of_its_model():
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    model, prompt = tiny_jrt(), tokens(1, 9)
    run = functools.partial(model.generate, prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for prefix in ({"prefix_length": 3}, {"encoder_mask": torch.tensor([[0, 1, 1, 0, 1]])}):
        assert run(**prefix, assistant_model=MistralForCausalLM(config)).tolist() == run(**prefix).tolist()


def test_rows_generate_as_they_do_alone():
    model, rows = tiny_jrt(), [tokens(1, 11, seed=1), tokens(1, 4, seed=2), tokens(1, 7, seed=3)]
    run = functools.partial(model.generate, max_new_tokens=8, do_sample=False, eos_token_id=None)
    together = run(**left_padded(rows), prefix_length=torch.tensor([9, 2, 5]))
    for row, sequence, length in zip(rows, together, [9, 2, 5], strict=True):
        assert sequence[-8:].tolist() == run(row, prefix_length=length)[0, -8:].tolist()


# --- the cache


def cache_bytes(cache) -> int:
    tensors = []
    for layer in cache.layers:
        if isinstance(layer, PrefixStateLayer):
            tensors.append(layer.state)
        elif hasattr(layer, "conv_states"):
            tensors.append(layer.conv_states[0])
        else:
            tensors += [layer.keys, layer.values]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_memory_does_not_grow():
    """Heads x 15 features x (head size + 1) in fp32, a window less one, and the taps of a convolution."""
    model = tiny_jrt()
    cache = model(tokens(1, 12), use_cache=True).cache
    state, window, taps = 4 * 15 * 9, 2 * 4 * 8 * 4, 64 * 3
    assert cache_bytes(cache) == 4 * (2 * state + window + taps)
    before = cache_bytes(cache)
    for step in range(30):
        model(tokens(1, 1, seed=step), cache=cache)
    assert cache_bytes(cache) == before
    assert cache.get_seq_length() == 42


def test_a_cache_knows_its_prefix():
    model, ids = tiny_jrt(), tokens(2, 12)
    whole = model(ids, prefix_length=torch.tensor([4, 6])).logits
    cache = model(ids[:, :8], prefix_length=torch.tensor([4, 6]), use_cache=True).cache
    with pytest.raises(ValueError, match=r"`prefix_length` is 4, but the cache has read a prefix of \[4, 6\] tokens"):
        model(ids[:, 8:], cache=cache, prefix_length=4)
    with pytest.raises(ValueError, match="`encoder_mask` was given with a cache that has read its prefix"):
        model(ids[:, 8:], cache=cache, encoder_mask=torch.ones(2, 4))
    rest = model(ids[:, 8:], cache=cache, prefix_length=torch.tensor([4, 6])).logits
    assert relative_error(rest, whole[:, 8:]) <= TOLERANCE


def test_a_cache_can_be_reordered_repeated_and_selected():
    model, ids = tiny_jrt(layer_types=["linear_attention"] * 2, num_hidden_layers=2), tokens(3, 9)
    nexts = tokens(3, 1, seed=4)

    def follow(change, rows, tokens_then):
        cache = model(ids, use_cache=True).cache
        change(cache)
        alone = model(torch.cat([ids[rows], tokens_then], dim=1), prefix_length=PREFIX).logits[:, -1:]
        assert relative_error(model(tokens_then, cache=cache).logits, alone) <= TOLERANCE

    follow(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0], nexts)
    follow(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2], nexts.repeat(2, 1))
    follow(lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2], nexts[:2])
    cache = model(ids, use_cache=True).cache
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids, cache=cache).logits, model(ids).logits)


def test_a_recorded_cache_can_be_reordered_and_then_cropped():
    model, ids = tiny_jrt(layer_types=["linear_attention"] * 2, num_hidden_layers=2), tokens(3, 11)
    cache, lengths, rows = DynamicCache(config=model.config), torch.tensor([4, 6, 2]), torch.tensor([2, 0, 0])
    cache.activate_past_recording()
    model(ids[:, :6], cache=cache, prefix_length=lengths)
    cache.crop(0)
    model(ids[:, 6:10], cache=cache)
    cache.reorder_cache(rows)
    cache.crop(-2)
    output = model(ids[rows, 8:], cache=cache)
    assert output.prefix_length.tolist() == lengths[rows].tolist()
    whole = model(ids[rows], prefix_length=lengths[rows]).logits
    assert relative_error(output.logits, whole[:, 8:]) <= TOLERANCE


def test_a_cropped_call_is_undone_where_gradients_are_kept():
    model, ids = tiny_jrt(layer_types=["linear_attention"] * 2, num_hidden_layers=2), tokens(1, 9)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    with torch.enable_grad():
        model(ids[:, :6], cache=cache)
        model(ids[:, 6:], cache=cache)
        cache.crop(-3)
        logits = model(ids[:, 6:], cache=cache).logits
    assert relative_error(logits.detach(), model(ids).logits[:, 6:]) <= TOLERANCE


def test_a_reset_cache_forgets_the_prefix_of_its_prompt():
    model, prompt = tiny_jrt(layer_types=["linear_attention"] * 2, num_hidden_layers=2), tokens(1, 9)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    cache = model.generate(prompt, prompt_lookup_num_tokens=2, prefix_length=2, **options).cache
    cache.reset()
    assert torch.equal(model(prompt, cache=cache).logits, model(prompt).logits)


def test_labels_behind_a_cache_are_all_read():
    model, ids = tiny_jrt(), tokens(2, 13)
    labels = ids.clone()
    labels[:, :9] = -100
    whole = model(ids, labels=labels).loss
    cache = model(ids[:, :8], use_cache=True).cache
    assert model(ids[:, 8:], labels=labels[:, 8:], cache=cache).loss.item() == pytest.approx(whole.item(), rel=1e-5)


def test_a_prefix_cannot_be_undone():
    model, ids = tiny_jrt(layer_types=["linear_attention"] * 2, num_hidden_layers=2), tokens(1, 9)
    cache = model(ids, use_cache=True).cache
    with pytest.raises(RuntimeError, match="call `activate_past_recording` before they are seen"):
        cache.crop(-2)


def test_lower_precision_keeps_its_state_and_residual_in_fp32():
    model = tiny_jrt().to(torch.bfloat16)
    ids = tokens(1, 20)
    whole = model(ids, output_hidden_states=True)
    assert whole.logits.dtype == torch.bfloat16
    assert whole.hidden_states[1].dtype == torch.float32
    assert tiny_jrt(residual_in_fp32=False).to(torch.bfloat16).model(ids).last_hidden_state.dtype == torch.bfloat16
    cache = model(ids[:, :10], use_cache=True).cache
    assert cache.layers[0].state.dtype == torch.float32
    steps = torch.cat([model(ids[:, i : i + 1], cache=cache).logits for i in range(10, 20)], dim=1)
    assert relative_error(steps.float(), whole.logits[:, 10:].float()) <= 3e-2


@pytest.mark.parametrize("cache_class", [None, DynamicCache, StaticCache])
def test_long_inputs_attend_in_blocks(cache_class, monkeypatch):
    """The mask of a window is never larger than a block, and nothing changes."""
    model = tiny_jrt(layer_types=["sliding_attention"] * 2, num_hidden_layers=2, prefix_length=0)
    ids, cut = tokens(2, 40), 26
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :5] = 0

    def run():
        if cache_class is None:
            return model(ids, attention_mask=mask, use_cache=False).logits
        size = {"max_cache_len": 64} if cache_class is StaticCache else {}
        cache = cache_class(config=model.config, **size)
        first = model(ids[:, :cut], attention_mask=mask[:, :cut], cache=cache).logits
        return torch.cat([first, model(ids[:, cut:], attention_mask=mask, cache=cache).logits], dim=1)

    whole = run()
    sizes = []
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(args[0].shape[1]), with_kwargs=True)
    monkeypatch.setattr(window_blocks, "BLOCK_TOKENS", 8)
    seen = mask[..., None]
    assert relative_error(run() * seen, whole * seen) <= TOLERANCE
    assert max(sizes) == 8 and sum(sizes) == 40


def test_gradients_through_blocks(monkeypatch):
    model, ids = tiny_jrt().train(), tokens(2, 30)
    gradients = []
    for size in (1024, 7):
        monkeypatch.setattr(window_blocks, "BLOCK_TOKENS", size)
        with torch.enable_grad():
            loss = model(ids, labels=ids).loss
            gradients.append(torch.autograd.grad(loss, model.model.layers[1].self_attn.k_proj.weight)[0])
    assert relative_error(gradients[1], gradients[0]) <= TOLERANCE


def test_blocks_and_layers_share_their_masks(monkeypatch):
    """Each mask is made, and kept for the backward pass, once; pads have masks of their own."""
    model = tiny_jrt(layer_types=["sliding_attention"] * 2, num_hidden_layers=2, prefix_length=0).train()
    ids, made = tokens(2, 44), []
    monkeypatch.setattr(window_blocks, "BLOCK_TOKENS", 8)
    make = window_blocks._mask

    def counting(*args, **kwargs):
        made.append(args)
        return make(*args, **kwargs)

    monkeypatch.setattr(window_blocks, "_mask", counting)
    model(ids, use_cache=False)
    # the first block, those behind it, and what is left at the end
    assert len(made) == 3
    model(ids, attention_mask=torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0), use_cache=False)
    assert len(made) == 3 + 2 * 6


@pytest.mark.parametrize("bf16", [False, True])
def test_shared_masks_are_of_the_type_in_which_attention_computes(bf16, monkeypatch):
    """Under autocast, too, which would cast them in every call and keep the copies for the backward pass."""
    model = tiny_jrt(layer_types=["sliding_attention"] * 2, num_hidden_layers=2, prefix_length=0).train()
    monkeypatch.setattr(window_blocks, "BLOCK_TOKENS", 8)
    seen, attend = set(), torch.nn.functional.scaled_dot_product_attention

    def look(query, key, value, attn_mask=None, **kwargs):
        seen.add(attn_mask.dtype)
        return attend(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(tokens(2, 44), use_cache=False)
    assert seen == {torch.bfloat16 if bf16 else torch.float32}


@torch.enable_grad()
def test_convolutions_keep_no_more_than_values_and_gates():
    model, ids = tiny_jrt(layer_types=["conv"] * 2, num_hidden_layers=2, prefix_length=0).train(), tokens(2, 30)
    layer = model.model.layers[0].conv
    mask = torch.ones_like(ids).index_fill(1, torch.tensor([0, 1]), 0)
    hidden_states = torch.randn(2, 30, model.config.hidden_size, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for attention_mask in (None, mask):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = layer(hidden_states, attention_mask)
        weights = sum(p.numel() * p.element_size() for p in layer.parameters())
        inputs = 0 if attention_mask is None else mask.numel() * mask.element_size()
        # its input, and four times as much inside
        assert sum(kept.values()) <= 5 * hidden_states.numel() * hidden_states.element_size() + weights + inputs
        parameters = [hidden_states, *layer.parameters()]
        again = torch.autograd.grad(output.square().sum(), parameters)
        direct = layer._mix(layer.in_proj(hidden_states), attention_mask)
        assert torch.equal(direct, output)
        for one, other in zip(again, torch.autograd.grad(direct.square().sum(), parameters), strict=True):
            assert torch.equal(one, other)


# --- short prompts as the official code reads them


def test_a_pad_of_the_official_code_weighs_one():
    """Its key is zero before the feature map, so its kernel is 1 in both sums, with its own value."""
    torch.manual_seed(0)
    layer = PrefixLinearAttention(12, num_heads=1, feature_dim=4, head_dim=3).double()
    hidden_states, mask = torch.randn(1, 6, 12, dtype=torch.float64), torch.tensor([[0, 0, 1, 1, 1, 1]])
    given = layer(hidden_states, attention_mask=mask, encoder_mask=torch.ones(1, 6), pads_leak=True, chunk_size=2)[0]
    query, key, value = (getattr(layer, f"{name}_proj")(hidden_states)[0] for name in "qkv")
    prefix_key, prefix_value = layer.prefix_k_proj(hidden_states)[0], layer.prefix_v_proj(hidden_states)[0]
    score, prefix_score = query @ key.T / 2, query @ prefix_key.T / 2
    pads = mask[0] == 0
    score[:, pads] = prefix_score[:, pads] = 0.0
    weights = (1 + score + score**2 / 2).tril()
    prefix_weights = 1 + prefix_score + prefix_score**2 / 2
    total = weights.sum(-1, keepdim=True) + prefix_weights.sum(-1, keepdim=True)
    expected = layer.o_proj((weights @ value + prefix_weights @ prefix_value) / total)
    assert relative_error(given[0], expected) <= 1e-12
    assert relative_error(given[0, 2:], layer(hidden_states[:, 2:], prefix_length=4)[0][0]) > 1e-2


def official(kind: str, length: int = 12):
    return tiny_jrt(short_prompt=kind, short_prompt_token_id=5, prefix_length=length)


def padded_by_hand(model, row: torch.Tensor, copies: int) -> torch.Tensor:
    """Logits of a row as the official code would see it: pads of token 5, masked in linear attention alone."""
    prompt = row.repeat(1, copies)
    missing = max(model.config.prefix_length - prompt.shape[1], 0)
    ids = torch.cat([torch.full((1, missing), 5), prompt], dim=1)
    mask = torch.cat([torch.zeros(1, missing), torch.ones(1, prompt.shape[1])], dim=1)
    plain = tiny_jrt(prefix_length=model.config.prefix_length)
    for layer in plain.model.layers:
        if layer.kind == "linear_attention":
            own = functools.partial(layer.linear_attn.forward, encoder_mask=torch.ones_like(ids), pads_leak=True)
            layer.linear_attn.forward = lambda x, own=own, **_: own(x, attention_mask=mask)
    return plain(ids, prefix_length=ids.shape[1]).logits[:, -row.shape[1] :]


@pytest.mark.parametrize("kind, copies", [("left_pad", 1), ("read_twice", 2)])
@pytest.mark.parametrize("length", [3, 6, 11])
def test_short_prompts_are_padded_as_the_official_code_does(kind, copies, length):
    model, row = official(kind), tokens(1, length)
    output = model(row)
    assert output.logits.shape == (1, length, VOCABULARY)
    assert relative_error(output.logits, padded_by_hand(model, row, copies)) <= TOLERANCE


@pytest.mark.parametrize("kind", ["left_pad", "read_twice"])
def test_short_prompts_in_a_batch_are_those_alone(kind):
    model, rows = official(kind), [tokens(1, 6, seed=1), tokens(1, 2, seed=2), tokens(1, 5, seed=3)]
    batch = left_padded(rows)
    together = model(**batch).logits
    run = functools.partial(model.generate, max_new_tokens=6, do_sample=False, eos_token_id=None)
    generated = [run(**batch, use_cache=use_cache) for use_cache in (True, False)]
    for place, row in enumerate(rows):
        assert relative_error(together[place, -row.shape[1] :], model(row).logits[0]) <= TOLERANCE
        alone = run(row)[0, -6:].tolist()
        assert all(sequences[place, -6:].tolist() == alone for sequences in generated)


@pytest.mark.parametrize("kind", ["left_pad", "read_twice", "iterate"])
def test_prompts_that_are_not_short_are_read_as_always(kind):
    model, row = official(kind, length=6), tokens(1, 9)
    assert torch.equal(model(row).logits, tiny_jrt().forward(row).logits)


def test_iterate_lets_generated_tokens_join_the_prefix():
    model, row = official("iterate"), tokens(1, 5)
    expected = row
    for _ in range(10):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert model(expected).prefix_length.item() == 12
    assert model.generate(row, max_new_tokens=10, do_sample=False, eos_token_id=None).tolist() == expected.tolist()


# --- what is refused


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
            "`layer_types` is 'full_attention', but must be one of",
        ),
        ({"num_hidden_layers": 3}, "`layer_types` has 4 entries, but must have one for each of the 3 layers"),
        ({"hidden_size": 30}, "`hidden_size` is 30, but must be a multiple of `num_attention_heads`"),
        ({"layer_types": ["conv"] * 4}, "`prefix_length` is 6, but no layer is 'linear_attention'"),
        ({"num_key_value_heads": 3}, "`num_key_value_heads` is 3, but must divide `num_attention_heads`"),
        ({"num_attention_heads": 0}, "`num_attention_heads` is 0, but must be at least 1"),
        ({"prefix_lenght": 3}, "`prefix_lenght` is no field of JRTConfig; did you mean `prefix_length`"),
        ({"prefix_length": -1}, "`prefix_length` is -1, but must be at least 0"),
        ({"short_prompt": "leftpad"}, "did you mean 'left_pad'"),
        (
            {"short_prompt": "left_pad"},
            "`short_prompt` is 'left_pad', which pads, but `short_prompt_token_id` is None",
        ),
        ({"short_prompt": "iterate", "prefix_length": 0}, "`short_prompt` is 'iterate', but `prefix_length` is 0"),
        ({"mask_token_id": VOCABULARY}, "`mask_token_id` is 61, but must be below `vocab_size`"),
        ({"feature_map": "tailor"}, "`feature_map` is 'tailor', but must be one of"),
        ({"conv_kernel_size": 1}, "`conv_kernel_size` is 1, but must be at least 2"),
    ],
)
def test_bad_configurations_get_a_sentence(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_jrt(**fields)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="'360m', '1.3b'"):
        JRTConfig.preset("7b")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prefix_length": 10}, "`prefix_length` is 10 for row 0, which has 9 tokens in this call"),
        ({"prefix_length": torch.tensor([3, 4, 5])}, "one for each of the 2 rows"),
        ({"prefix_length": 3, "encoder_mask": torch.ones(2, 3)}, "say the same thing; give one of them"),
        ({"encoder_mask": torch.ones(2, 10)}, r"`encoder_mask` has shape \(2, 10\), but must be \(2, at most 9\)"),
        (
            {"encoder_mask": torch.ones(2, 9), "attention_mask": torch.tensor([[0] + [1] * 8] * 2)},
            "a pad cannot be in the prefix",
        ),
        ({"attention_mask": torch.ones(2, 1, 9, 9)}, "recurrent layers can only tell pads"),
        ({"attention_mask": torch.ones(2, 8)}, "`attention_mask` has 8 columns"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)}, "`position_ids` restart within a row"),
        ({"inputs_embeds": torch.ones(2, 9, 32)}, "give exactly one of `input_ids` and `inputs_embeds`"),
        ({"labels": tokens(2, 9), "logits_to_keep": 1}, "leave `logits_to_keep` out"),
        ({"cache": DynamicCache(config=JRTConfig(num_hidden_layers=2))}, "the cache has 2 layers"),
    ],
)
def test_bad_calls_get_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_jrt()(tokens(2, 9), **arguments)


def test_another_prefix_than_that_of_the_cache_is_refused_by_generate():
    model, ids = tiny_jrt(), tokens(1, 12)
    cache = model(ids[:, :8], use_cache=True, prefix_length=4).cache
    with pytest.raises(ValueError, match=r"the cache has read a prefix of \[4\] tokens"):
        model.generate(ids, cache=cache, prefix_length=6, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"`prefix_length` is \[4, 4\], but the cache"):
        model(ids[:, 8:], cache=cache, prefix_length=torch.tensor([4, 4]))


def test_checkpointing_refuses_a_cache_it_would_forget():
    model, ids = tiny_jrt(), tokens(1, 12)
    cache = model(ids[:, :8], use_cache=True).cache
    model.train().gradient_checkpointing_enable()
    with torch.enable_grad(), pytest.raises(ValueError, match="which gradient checkpointing would forget"):
        model(ids[:, 8:], cache=cache)


def test_a_layer_reads_a_state_or_a_cache():
    layer = tiny_jrt().model.layers[0].linear_attn
    with pytest.raises(ValueError, match="`state` and `cache` both hold what was read before"):
        layer(torch.ones(1, 2, 32), state=torch.ones(1, 4, 15, 9), cache=DynamicCache())


def test_lengths_may_be_a_list():
    model, ids = tiny_jrt(), tokens(2, 9)
    assert torch.equal(model(ids, prefix_length=[3, 5]).logits, model(ids, prefix_length=torch.tensor([3, 5])).logits)


def test_a_causal_model_refuses_a_prefix():
    with pytest.raises(ValueError, match="`config.prefix_length` is 0: the model is causal"):
        tiny_jrt(prefix_length=0)(tokens(1, 9), prefix_length=3)


@pytest.mark.parametrize(
    "batch, message",
    [
        (left_padded([tokens(1, 14), tokens(1, 13)]), "give rows of one length"),
        (left_padded([tokens(1, 14), tokens(1, 3)]), "prompts of 3 to 12 tokens cannot be padded to one prefix of 12"),
        (
            {"input_ids": tokens(2, 6), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])},
            "pads on the left, but the batch is padded otherwise",
        ),
        ({"input_ids": tokens(2, 6), "prefix_length": torch.tensor([5, 3])}, "its prefixes have holes or end in diff"),
        ({"input_ids": tokens(1, 6), "encoder_mask": torch.tensor([[1, 0, 1]])}, "its prefixes have holes or end in"),
        ({"input_ids": tokens(2, 6), "prefix_length": torch.tensor([5, 0])}, "its prefixes have holes or end in diff"),
    ],
)
def test_batches_that_the_official_code_cannot_express_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        official("left_pad")(**batch)


def test_generate_refuses_what_it_cannot_do():
    model, prompt = tiny_jrt(), tokens(1, 9)
    with pytest.raises(NotImplementedError, match="use `generate` on a padded batch"):
        model.generate_batch([[3, 4]])
    with pytest.raises(ValueError, match="cannot hold recurrent states"):
        model.generate(prompt, cache_implementation="quantized", max_new_tokens=2)
    padding = official("left_pad", length=20)
    cache = padding(prompt, use_cache=True).cache
    with pytest.raises(ValueError, match="so that it cannot be continued"):
        padding.generate(torch.cat([prompt, prompt], 1), cache=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="which reads all tokens again; pass no cache"):
        official("iterate").generate(prompt, cache=DynamicCache(), max_new_tokens=2)


def test_the_mask_token_is_known_for_gpt2s_vocabulary_only():
    assert JRTConfig().mask_token_id == 50263
    assert JRTConfig(vocab_size=1000).mask_token_id is None
    assert tiny_jrt().config.mask_token_id == MASK
