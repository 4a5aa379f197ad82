"""What users do to a model besides running it: edit its config, copy it, move it, classify, and mistake its masks."""

import copy
import io
import pickle

import pytest
import torch
from tiny_families import VOCABULARY, switch_on, tiny_mor
from transformers import AutoModelForSequenceClassification, DynamicCache, Gemma2Config, StaticCache

from varidepth import MoRConfig, MoRForCausalLM


def prompts(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("inference_rule", "treshold", "`inference_rule` is 'treshold', but must be one of"),
        ("gating", "interp", "`gating` is 'interp'"),
        ("router_activation", "tan", "`router_activation` is 'tan'"),
        ("router_thresholds", [0.5], "`router_thresholds` has 1 entries"),
        ("capacities", [0.5, 0.6, 0.7], "`capacities` is .* must be non-increasing"),
        ("inference_rule", "predictor", "the model was built without predictors"),
        ("kv_mode", "shared", "`config.kv_mode` is 'shared', but the model was built with 'recursion'"),
        ("capacity_warmup_steps", 3, "`config.capacity_warmup_steps` is 3, but the model was built with 0"),
        ("num_hidden_layers", 5, "`config.num_hidden_layers` is 5, but the model was built with 8"),
    ],
)
def test_edits_of_a_built_models_config_are_checked(field, value, message):
    model = tiny_mor()
    model(prompts())
    setattr(model.config, field, value)
    with pytest.raises(ValueError, match=message):
        model(prompts())


@torch.no_grad()
def test_thresholds_are_a_dial():
    model = tiny_mor()
    depths = []
    for threshold in (0.0, 0.5, 1.0):
        model.config.router_thresholds = [0.5, threshold, threshold]
        depths.append(int(model(prompts(), output_routing=True).token_depth.sum()))
    assert depths[0] == 3 * 18 and depths[2] == 18 and depths[2] < depths[1] < depths[0]


@pytest.mark.parametrize("kv_mode", ["recursion", "shared"])
@torch.no_grad()
def test_copies_and_pickles(kv_mode):
    model = tiny_mor(kv_mode=kv_mode)
    expected = model(prompts()).logits
    assert torch.equal(copy.deepcopy(model)(prompts()).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(prompts()).logits, expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(prompts()).logits, expected)


def test_warmup_at_full_capacity_changes_nothing_under_shared_keys():
    fields = {"kv_mode": "shared", "capacities": [1.0, 1.0, 1.0], "aux_loss_coef": 0.0}
    padded = torch.nn.functional.pad(prompts(), (4, 0))
    mask = (padded != 0).long()
    warming, plain = (tiny_mor(capacity_warmup_steps=steps, **fields).train() for steps in (5, 0))
    given, expected = (model(padded, attention_mask=mask).logits[:, 4:] for model in (warming, plain))
    torch.testing.assert_close(given, expected)


@torch.no_grad()
def test_an_offloaded_cache_is_on_the_device_when_its_slot_runs(monkeypatch):
    """Slots are skipped, so that the prefetch of the next slot does not suffice."""
    model = tiny_mor(capacities=[0.9, 0.5, 0.3])
    cache = model(prompts(1), use_cache=True).cache
    resident = {layer: False for layer in cache.layers}
    for layer in cache.layers:
        monkeypatch.setattr(layer, "prefetch", lambda layer=layer: resident.__setitem__(layer, True))
        update = layer.update

        def checked(*args, layer=layer, update=update, **kwargs):
            assert resident[layer]
            return update(*args, **kwargs)

        monkeypatch.setattr(layer, "update", checked)
    cache.offloading = True
    cache.update = lambda key, value, slot, **kwargs: cache.layers[slot].update(key, value, **kwargs)
    for token in prompts(1)[0]:
        model(token.view(1, 1), cache=cache, use_cache=True)


def test_classification_does_not_scale_the_router_loss_by_rows():
    torch.manual_seed(0)
    config = tiny_mor().config
    config.num_labels = 3
    model = AutoModelForSequenceClassification.from_config(config).train()
    assert not model.accepts_loss_kwargs
    batch = {"input_ids": prompts(), "labels": torch.tensor([0, 2])}
    plain = model(**batch)
    counted = model(**batch, num_items_in_batch=torch.tensor(2))
    torch.testing.assert_close(counted.aux_loss, plain.aux_loss)
    bare = model.model(batch["input_ids"]).aux_loss
    torch.testing.assert_close(plain.aux_loss, bare)


@torch.no_grad()
def test_classification_reads_the_last_token_that_is_not_padding():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_mor().config).eval()
    row = prompts(1)
    alone = model(row).logits
    for pad in ((3, 0), (0, 3)):
        padded = torch.nn.functional.pad(row, pad)
        mask = (padded != 0).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        given = model(padded, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(given, alone, rtol=1e-5, atol=1e-6)


def test_routers_and_balancing_bias_stay_in_fp32(tmp_path):
    source = tiny_mor(routing="token_choice", balancing="loss_free")
    source.save_pretrained(tmp_path)
    loaded = MoRForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for model in (loaded, MoRForCausalLM._from_config(source.config, dtype=torch.bfloat16)):
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert model.model.balancing_bias.dtype == model.model.routers.weight.dtype == torch.float32


@torch.no_grad()
def test_a_static_mask_may_cover_columns_to_come():
    model = tiny_mor(capacities=[0.9, 0.5, 0.3])
    row = prompts(1)
    mask = torch.ones(1, 16, dtype=torch.long)
    mask[0, :2] = 0
    short = model(row, attention_mask=mask[:, :9], use_cache=False).logits[:, 2:]
    cache = StaticCache(config=model.config, max_cache_len=16)
    given = model(row, attention_mask=mask, cache=cache, use_cache=True).logits[:, 2:]
    torch.testing.assert_close(given, short, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_masks_per_head_are_refused():
    with pytest.raises(ValueError, match="a 4D mask must have shape"):
        tiny_mor()(prompts(), attention_mask=torch.ones(2, 4, 9, 9, dtype=torch.bool))


def test_a_loss_outside_of_the_model_can_tell_its_scale():
    gradients = []
    for scale, outside in ((1.0, None), (1024.0, 1024.0)):
        model = tiny_mor(aux_loss_coef=0.5, gating="additive").train()
        model.router_loss_scale.outside = outside
        (scale * model(prompts()).logits.logsumexp(-1).mean()).backward()
        gradients.append(model.model.routers.weight.grad / scale)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_from_backbone_keeps_labels_and_refuses_a_short_source():
    source = Gemma2Config(num_hidden_layers=6, num_labels=5, vocab_size=61)
    assert MoRConfig.from_backbone(source, num_recursions=2).num_labels == 5
    assert MoRConfig.from_backbone(source, num_recursions=2, vocab_size=99).vocab_size == 99
    with pytest.raises(ValueError, match="`source_layers` is .* one of the 6 source layers for each of the 8"):
        MoRConfig.from_backbone(source, num_recursions=2, num_hidden_layers=14)


@torch.no_grad()
def test_a_cache_of_the_same_model_goes_on_after_an_edit_of_the_thresholds():
    model = tiny_mor()
    cache = DynamicCache(config=model.config)
    model(prompts(), cache=cache, use_cache=True)
    model.config.router_thresholds = [0.5, 0.2, 0.2]
    model(prompts()[:, :1], cache=cache, use_cache=True)
    assert cache.get_seq_length() == 10


@torch.no_grad()
def test_a_fully_open_router_is_exact_in_bfloat16_too():
    model = tiny_mor(router_bias=True, gating="interpolate", capacities=[1.0, 1.0, 1.0]).to(torch.bfloat16)
    switch_on(model)
    plain = tiny_mor(routing="none").to(torch.bfloat16)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "routers" not in k})
    assert torch.equal(model(prompts()).logits, plain(prompts()).logits)
