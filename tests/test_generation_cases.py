"""Every way to generate, in every mode of MoR and MoD, against a loop without cache, padding or `generate`.

Named after the generation cases of transformers, whose own mixin is not in its sdist. Rows are random; the tolerance
is 1e-5 relative in fp32, with every router score at least 1e-4 from its threshold, which is checked.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from generation_reference import (
    CASES,
    JRT_CASES,
    SMALLEST,
    build,
    config_of,
    full_logits,
    padded,
    prefix_of,
    prompts,
    relative_error,
    slow_greedy,
    slow_sample,
    slow_score,
    vanilla,
)
from tiny_families import run_with_margin
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, set_seed
from transformers.cache_utils import StaticLayer
from transformers.generation.streamers import BaseStreamer

from varidepth.modeling.cache_naming import CACHE


STEPS = 8
TOLERANCE = 1e-5
ROUTED = list(CASES)
ALL = [*CASES, *JRT_CASES]
# those whose cache may start before the whole prompt is known, and hold everything
CACHED = [case for case in ALL if case != "jrt-iterate"]
pytestmark = pytest.mark.timeout(120)
each_case = pytest.mark.parametrize("case", ALL)
each_routed_case = pytest.mark.parametrize("case", ROUTED)
each_cached_case = pytest.mark.parametrize("case", CACHED)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def generate(model: Any, ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """`generate` with a fixed number of new tokens, greedy unless told otherwise; a dict output."""
    options = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, **kwargs}
    return model.generate(ids, **options) if ids is not None else model.generate(**options)


def assert_rows(sequences: torch.Tensor, rows: list[torch.Tensor]) -> None:
    """The last tokens of each sequence are those of the reference row."""
    for sequence, row in zip(sequences, rows, strict=True):
        assert sequence[-row.shape[1] :].tolist() == row[0].tolist()


@each_routed_case
def test_scores_keep_their_distance(case: str) -> None:
    """The comparisons below mean something: no decision is within rounding, and depths differ between tokens."""
    model = build(case)
    depths = set()
    for ids in prompts():
        row = slow_greedy(model, ids, STEPS)[0]
        output, margin = run_with_margin(model, input_ids=row, use_cache=False, output_routing=True)
        depths |= set(output.token_depth.flatten().tolist())
        assert margin > 1e-4
    assert model.config.routing == "none" or len(depths) > 1, f"every token has depth {depths}"


@each_case
def test_greedy(case: str) -> None:
    model = build(case)
    for ids in prompts():
        row, logits = slow_greedy(model, ids, STEPS)
        output = generate(model, ids, output_logits=True)
        assert output.sequences.tolist() == row.tolist()
        assert relative_error(torch.cat(output.logits), logits) <= TOLERANCE


@each_case
def test_greedy_without_cache(case: str) -> None:
    model, ids = build(case), prompts()[0]
    row, _ = slow_greedy(model, ids, STEPS)
    assert generate(model, ids, use_cache=False).sequences.tolist() == row.tolist()


@each_case
def test_greedy_left_padded_batch(case: str) -> None:
    model = build(case)
    references = [slow_greedy(model, ids, STEPS) for ids in prompts()]
    ids, mask = padded(prompts())
    output = generate(model, ids, attention_mask=mask, output_logits=True)
    assert_rows(output.sequences, [row for row, _ in references])
    logits = torch.stack(output.logits, dim=1)
    assert relative_error(logits, torch.stack([logits for _, logits in references])) <= TOLERANCE


@each_case
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_changes_no_logit(case: str, side: str, use_cache: bool) -> None:
    model = build(case)
    ids, mask = padded(prompts(), side)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
    for place, row in enumerate(prompts()):
        assert relative_error(logits[place][mask[place] == 1], full_logits(model, row)[0]) <= TOLERANCE


@pytest.mark.parametrize(
    "case", [case for case in ALL if "sliding_window" not in (CASES | JRT_CASES)[case] or case == "jrt-recurrent"]
)
def test_decode_after_right_padded_prefill(case: str) -> None:
    """Not with a sliding window: there, as in every vanilla model, pads between tokens use up the window."""
    model = build(case)
    rows = prompts()
    ids, mask = padded(rows, "right")
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True).cache
    token = torch.tensor([[5], [6], [7]])
    mask = torch.cat([mask, torch.ones_like(token)], dim=1)
    positions = torch.tensor([[row.shape[1]] for row in rows])
    logits = model(input_ids=token, attention_mask=mask, position_ids=positions, cache=cache).logits
    for place, row in enumerate(rows):
        reference = full_logits(model, torch.cat([row, token[place : place + 1]], dim=1), row.shape[1])[0, -1:]
        assert relative_error(logits[place], reference) <= TOLERANCE


@each_case
def test_sample(case: str) -> None:
    model, ids = build(case), prompts()[1]
    torch.manual_seed(5)
    row = slow_sample(model, ids, STEPS, temperature=0.7)
    for use_cache in (True, False):
        torch.manual_seed(5)
        output = generate(model, ids, do_sample=True, temperature=0.7, top_k=0, use_cache=use_cache)
        assert output.sequences.tolist() == row.tolist()


@each_cached_case
@pytest.mark.parametrize("do_sample", [False, True], ids=["beam", "beam-sample"])
def test_beam_search(case: str, do_sample: bool) -> None:
    model = build(case)
    ids, mask = padded(prompts())
    found = {}
    for use_cache in (True, False):
        torch.manual_seed(6)
        options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": do_sample, "output_scores": True}
        found[use_cache] = generate(model, ids, attention_mask=mask, use_cache=use_cache, **options)
    assert found[True].sequences.tolist() == found[False].sequences.tolist()
    for place, sequence in enumerate(found[True].sequences):
        prompt = prompts()[place // 2]
        row = torch.cat([prompt, sequence[None, ids.shape[1] :]], dim=1)
        score = slow_score(model, row, prompt.shape[1])
        assert abs(found[True].sequences_scores[place] - score) <= TOLERANCE * abs(score) * 10


@each_case
def test_num_return_sequences(case: str) -> None:
    model = build(case)
    ids, mask = padded(prompts())
    found = {}
    for use_cache in (True, False):
        torch.manual_seed(7)
        options = {"num_return_sequences": 3, "do_sample": True, "use_cache": use_cache}
        found[use_cache] = generate(model, ids, attention_mask=mask, **options).sequences.tolist()
    assert found[True] == found[False]
    assert len(found[True]) == 9


@each_cached_case
@pytest.mark.parametrize("role", ["target", "assistant", "both"])
def test_assisted_decoding(case: str, role: str) -> None:
    model, ids = build(case), prompts()[0]
    target = vanilla() if role == "assistant" else model
    assistant = vanilla() if role == "target" else model
    row, logits = slow_greedy(target, ids, STEPS)
    output = generate(target, ids, assistant_model=assistant, output_logits=True)
    assert output.sequences.tolist() == row.tolist()
    assert relative_error(torch.cat(output.logits), logits) <= TOLERANCE


@each_cached_case
def test_prompt_lookup(case: str) -> None:
    model = build(case)
    ids = prompts()[1].repeat(1, 3)
    row, _ = slow_greedy(model, ids, 2 * STEPS)
    output = generate(model, ids, prompt_lookup_num_tokens=3, max_new_tokens=2 * STEPS)
    assert output.sequences.tolist() == row.tolist()


@each_cached_case
@pytest.mark.parametrize("way", ["assistant", "lookup"])
def test_guesses_in_a_second_turn(case: str, way: str) -> None:
    """Only what the cache has not seen is read."""
    model, ids = build(case), prompts()[1].repeat(1, 3)
    first = generate(model, ids)
    longer = torch.cat([first.sequences, ids[:, :3]], dim=1)
    row, _ = slow_greedy(model, longer, STEPS, ids.shape[1])
    guess = {"assistant_model": vanilla()} if way == "assistant" else {"prompt_lookup_num_tokens": 3}
    assert generate(model, longer, cache=first[CACHE], **guess).sequences.tolist() == row.tolist()
    assert "prepare_inputs_for_generation" not in vars(model)


@each_cached_case
def test_continue_from_a_cache(case: str) -> None:
    """Two further turns on the cache of the first, for a left-padded batch."""
    model = build(case)
    ids, mask = padded(prompts())
    rows, cache = prompts(), None
    for turn in range(3):
        lengths = [row.shape[1] for row in prompts()]
        references = [slow_greedy(model, row, 3, length)[0] for row, length in zip(rows, lengths, strict=True)]
        output = generate(model, ids, attention_mask=mask, cache=cache, max_new_tokens=3)
        assert_rows(output.sequences, references)
        cache = output[CACHE]
        said = torch.tensor([[11 + turn, 23], [7, 5 + turn], [31, 13]])
        ids = torch.cat([output.sequences, said], dim=1)
        mask = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], dim=1)
        rows = [torch.cat([row, said[place : place + 1]], dim=1) for place, row in enumerate(references)]


@each_cached_case
def test_crop_and_redo(case: str) -> None:
    """A cache cut back by some tokens and filled again gives the logits of a fresh one."""
    model, ids = build(case), slow_greedy(build(case), prompts()[0], STEPS)[0]
    reference = full_logits(model, ids, 6)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(input_ids=ids[:, :10], cache=cache, **prefix_of(model, 6))
    cache.crop(-4)
    assert cache.get_seq_length() == 6
    logits = model(input_ids=ids[:, 6:], cache=cache).logits
    assert relative_error(logits, reference[:, 6:]) <= TOLERANCE


@each_cached_case
def test_inputs_embeds(case: str) -> None:
    model, ids = build(case), prompts()[0]
    row, _ = slow_greedy(model, ids, STEPS)
    output = generate(model, inputs_embeds=model.get_input_embeddings()(ids))
    assert output.sequences.tolist() == row[:, ids.shape[1] :].tolist()


@each_cached_case
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_chunked_prefill(case: str, chunk: int) -> None:
    model = build(case)
    ids, mask = padded(prompts())
    references = [slow_greedy(model, row, STEPS)[0] for row in prompts()]
    output = generate(model, ids, attention_mask=mask, prefill_chunk_size=chunk)
    assert_rows(output.sequences, references)


class CollectingStreamer(BaseStreamer):
    """Keeps what `generate` sends: the prompt first, then token by token."""

    def __init__(self) -> None:
        self.sent: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.sent.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@each_case
def test_streaming(case: str) -> None:
    model, ids = build(case), prompts()[2]
    row, _ = slow_greedy(model, ids, STEPS)
    streamer = CollectingStreamer()
    generate(model, ids, streamer=streamer)
    assert streamer.ended
    assert streamer.sent == [ids[0].tolist(), *([token] for token in row[0, ids.shape[1] :].tolist())]


@each_case
def test_logits_to_keep(case: str) -> None:
    model, ids = build(case), prompts()[0]
    logits = full_logits(model, ids)
    for keep in (1, 3):
        kept = model(input_ids=ids, logits_to_keep=keep).logits
        assert relative_error(kept, logits[:, -keep:]) <= TOLERANCE
    chosen = torch.tensor([0, 4, 5])
    kept = model(input_ids=ids, logits_to_keep=chosen).logits
    assert relative_error(kept, logits[:, chosen]) <= TOLERANCE


@each_routed_case
@pytest.mark.parametrize("use_cache", [True, False])
def test_outputs_on_request(case: str, use_cache: bool) -> None:
    """Scores, hidden states and attentions have the shapes of a model as deep as the unrolled one."""
    model, ids = build(case, "eager"), prompts()[0]
    config = model.config
    output = generate(
        model,
        ids,
        use_cache=use_cache,
        output_scores=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    assert len(output.scores) == len(output.hidden_states) == len(output.attentions) == STEPS
    for step, (states, attentions) in enumerate(zip(output.hidden_states, output.attentions, strict=True)):
        new = 1 if use_cache and step else ids.shape[1] + (0 if use_cache else step)
        assert [tuple(state.shape) for state in states] == [(1, new, config.hidden_size)] * (
            config.num_hidden_layers + 1
        )
        assert len(attentions) == config.num_hidden_layers
        head = model.lm_head(states[-1][:, -1])
        if config.backbone == "llama":
            assert relative_error(head, output.scores[step]) <= TOLERANCE


@each_routed_case
def test_routing_is_reported(case: str) -> None:
    """Depth per token: the same from a full forward, a prefill with decode, and a padded batch; none at pads."""
    model, row = build(case), prompts()[0]
    whole = model(input_ids=row, use_cache=False, output_routing=True).token_depth
    assert whole.shape == row.shape
    assert 0 <= whole.min() and whole.max() <= len(model.config.routed_passes)
    cache = DynamicCache(config=model.config)
    parts = [
        model(input_ids=part, cache=cache, output_routing=True).token_depth
        for part in (row[:, :5], *row[:, 5:].split(1, dim=1))
    ]
    assert torch.cat(parts, dim=1).tolist() == whole.tolist()
    ids, mask = padded(prompts())
    batch = model(input_ids=ids, attention_mask=mask, output_routing=True).token_depth
    assert batch[0].tolist() == whole[0].tolist()
    assert not batch[mask == 0].any()


@each_cached_case
def test_static_cache(case: str) -> None:
    model = build(case)
    ids, mask = padded(prompts())
    references = [slow_greedy(model, row, STEPS) for row in prompts()]
    output = generate(model, ids, attention_mask=mask, cache_implementation="static", output_logits=True)
    assert_rows(output.sequences, [row for row, _ in references])
    logits = torch.stack(output.logits, dim=1)
    assert relative_error(logits, torch.stack([logits for _, logits in references])) <= TOLERANCE


@each_cached_case
def test_static_cache_chunked_prefill_and_embeds(case: str) -> None:
    model, ids = build(case), prompts()[0]
    row, _ = slow_greedy(model, ids, STEPS)
    output = generate(model, ids, cache_implementation="static", prefill_chunk_size=4)
    assert output.sequences.tolist() == row.tolist()
    output = generate(model, inputs_embeds=model.get_input_embeddings()(ids), cache_implementation="static")
    assert output.sequences.tolist() == row[:, ids.shape[1] :].tolist()


@pytest.mark.skipif(not StaticLayer.is_croppable, reason="transformers below 5.24 cannot crop a static cache")
@pytest.mark.parametrize("case", [*(case for case in ROUTED if not case.startswith("gemma2")), "jrt-recurrent"])
@pytest.mark.parametrize("way", ["assistant", "lookup"])
def test_static_cache_goes_back_on_what_was_guessed_wrong(case: str, way: str) -> None:
    """Not where a window is shorter than the static cache: transformers refuses what it cannot restore."""
    model, ids = build(case), prompts()[1].repeat(1, 3)
    row, _ = slow_greedy(model, ids, STEPS)
    guess = {"assistant_model": vanilla()} if way == "assistant" else {"prompt_lookup_num_tokens": 3}
    # transformers leaves no column for a last guess, which fails with its own models too
    guess["max_cache_len"] = 32
    assert generate(model, ids, cache_implementation="static", **guess).sequences.tolist() == row.tolist()


def decode(step: Callable[..., Any], model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Prefill of 4 tokens by the plain model, then token by token through `step`; logits of all but the first 4."""
    model(input_ids=ids[:, :4], cache=cache)
    logits = []
    for place in range(4, ids.shape[1]):
        token, position = ids[:, place : place + 1], torch.tensor([[place]])
        logits.append(step(input_ids=token, position_ids=position, cache=cache).logits)
    return torch.cat(logits, dim=1)


# Capturing a graph takes seconds: one case per way of routing and of storing.
COMPILED = ["none", "expert", "expert-predictor", "expert-shared", "expert-relaxed", "token", "gemma2-token"]
COMPILED += ["mod", "mod-attention", "jrt", "jrt-recurrent"]


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_decode_on_a_static_cache(case: str) -> None:
    """One graph without breaks; `eager` as backend, since it is the capture that is tested."""
    torch.compiler.reset()
    model = build(case)
    ids = slow_greedy(model, prompts()[0], STEPS)[0]
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=32)
    assert relative_error(decode(step, model, cache, ids), full_logits(model, ids, 4)[:, 4:]) <= TOLERANCE


@pytest.mark.parametrize("case", list(SMALLEST))
def test_compiled_decode_on_a_dynamic_cache(case: str) -> None:
    """Graph breaks are allowed where routing waits for its counts; the tokens are the same."""
    torch.compiler.reset()
    model = build(case)
    ids = slow_greedy(model, prompts()[0], STEPS)[0][:, :6]
    step = torch.compile(model.forward, backend="eager")
    cache = DynamicCache(config=model.config)
    assert relative_error(decode(step, model, cache, ids), full_logits(model, ids)[:, 4:]) <= TOLERANCE


@pytest.mark.parametrize("case", [case for case in ALL if not case.startswith("gemma2")])
def test_eager_is_sdpa(case: str) -> None:
    ids, mask = padded(prompts())
    sdpa, eager = build(case, "sdpa"), build(case, "eager")
    reference = sdpa(input_ids=ids, attention_mask=mask).logits
    value = eager(input_ids=ids, attention_mask=mask).logits
    assert relative_error(value[mask == 1], reference[mask == 1]) <= TOLERANCE
    found = [generate(model, ids, attention_mask=mask).sequences.tolist() for model in (sdpa, eager)]
    assert found[0] == found[1]


@each_cached_case
def test_dynamic_cache_without_config(case: str) -> None:
    """A cache that the user made without telling it the config serves as well."""
    model, ids = build(case), prompts()[0]
    row, _ = slow_greedy(model, ids, STEPS)
    assert generate(model, ids, cache=DynamicCache()).sequences.tolist() == row.tolist()


def assert_refused(model: Any, attempt: Callable[[], Any], *words: str) -> None:
    """`attempt` raises one sentence with these words, before any token is embedded."""
    steps: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *_: steps.append(1))
    try:
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            attempt()
    finally:
        hook.remove()
    message = str(caught.value)
    assert "\n" not in message and re.search(r"\.$", message), f"not one sentence: {message}"
    assert len(re.findall(r"\.\s", message)) == 0, f"more than one sentence: {message}"
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    assert not steps, "refused only after the model had run"


@pytest.mark.parametrize("case", ["expert", "mod"])
def test_topk_is_refused_by_generate(case: str) -> None:
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(case, inference_rule="topk")).eval()
    assert_refused(model, lambda: generate(model, prompts()[0]), "topk", "threshold")


REFUSING = ["expert", "expert-shared", "token", "mod", "mod-attention"]


@pytest.mark.parametrize("case", REFUSING)
def test_quantized_cache_is_refused(case: str) -> None:
    model = build(case)
    assert_refused(model, lambda: generate(model, prompts()[0], cache_implementation="quantized"), "quantized")


@pytest.mark.parametrize("case", REFUSING)
def test_continuous_batching_is_refused(case: str) -> None:
    model = build(case)
    assert_refused(model, lambda: model.generate_batch(inputs=[[4, 5, 6]], max_new_tokens=2), "generate")


@pytest.mark.parametrize("case", REFUSING)
def test_foreign_cache_is_refused(case: str) -> None:
    model, ids = build(case), prompts()[0]
    cache = vanilla()(input_ids=ids, use_cache=True)[CACHE]
    longer = torch.cat([ids, ids], dim=1)
    assert_refused(model, lambda: generate(model, longer, cache=cache), "cache")


@pytest.mark.parametrize("case", REFUSING)
def test_early_exit_is_refused(case: str) -> None:
    model = build(case)
    depth = model.config.num_hidden_layers
    assert_refused(model, lambda: generate(model, prompts()[0], assistant_early_exit=2), "assistant_early_exit")
    assert model.config.num_hidden_layers == depth
