"""Scores of continuations against a loop over tokens; no token is seen before it is scored."""

import pytest
import torch
from prefix_reader import PrefixReader, tiny_jrt, token_nats
from real_text import VOCABULARY, source_config, text_tokenizer
from transformers import LlamaForCausalLM

from varidepth.analysis.log_likelihood import log_likelihood, log_likelihoods


PAIRS = [
    ("The capital of France is", " Paris, of course"),
    ("Which of these words need depth? All of", " them"),
    ("One", " and two and three"),
]


def tokens_of(context: str, continuation: str) -> tuple[list[int], int]:
    tokenize = text_tokenizer()
    return tokenize(context + continuation)["input_ids"], len(tokenize(context)["input_ids"])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_scores_equal_a_loop_over_tokens(batch_size):
    torch.manual_seed(0)
    model = LlamaForCausalLM(source_config(initializer_range=0.2)).train()
    scores = log_likelihoods(model, text_tokenizer(), PAIRS, batch_size=batch_size)
    assert model.training
    model.eval()
    for pair, score in zip(PAIRS, scores, strict=True):
        tokens, first = tokens_of(*pair)
        assert score.tokens == len(tokens) - first > 0
        with torch.no_grad():
            steps = [
                model(torch.tensor([tokens[:i]])).logits[0, -1].log_softmax(-1) for i in range(first, len(tokens))
            ]
        expected = sum(float(step[token]) for step, token in zip(steps, tokens[first:], strict=True))
        assert score.log_likelihood == pytest.approx(expected, rel=1e-4)
        assert not score.greedy
        assert log_likelihood(model, text_tokenizer(), *pair).log_likelihood == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("prefix_length", [0, 2, 64])
def test_a_prefix_ends_before_the_continuation(prefix_length):
    model = PrefixReader(VOCABULARY, prefix_length)
    scores = log_likelihoods(model, text_tokenizer(), PAIRS)
    for pair, score in zip(PAIRS, scores, strict=True):
        tokens, first = tokens_of(*pair)
        assert score.log_likelihood == pytest.approx(-model.nats(tokens, first), rel=1e-5)
    firsts = sorted(tokens_of(*pair)[1] for pair in PAIRS)
    assert sorted(model.seen_prefixes[0]) == sorted(min(prefix_length, first) for first in firsts)


@pytest.mark.parametrize("prefix_length", [2, 64])
def test_a_jrt_rnn_has_not_seen_the_continuation(prefix_length):
    model = tiny_jrt(VOCABULARY, prefix_length)
    for pair, score in zip(PAIRS, log_likelihoods(model, text_tokenizer(), PAIRS), strict=True):
        tokens, first = tokens_of(*pair)
        expected = token_nats(model, tokens, first, min(prefix_length, first))
        assert score.log_likelihood == pytest.approx(-expected, rel=1e-4)


def test_greedy_is_what_generation_would_write():
    model, tokenizer = PrefixReader(VOCABULARY, 0), text_tokenizer()
    context = "The capital"
    last = tokenizer(context)["input_ids"][-1]
    model.bigrams[last] = 0.0
    written = tokenizer(context + " of")["input_ids"][-1]
    model.bigrams[last, written] = 9.0
    assert log_likelihood(model, tokenizer, context, " of").greedy
    assert not log_likelihood(model, tokenizer, context, " or").greedy


def test_blanks_at_the_end_of_a_context_go_to_the_continuation():
    model, tokenizer = PrefixReader(VOCABULARY, 64), text_tokenizer()
    assert log_likelihood(model, tokenizer, "The code is ", "old") == log_likelihood(
        model, tokenizer, "The code is", " old"
    )


def test_an_empty_context_is_the_start_token_of_a_causal_model():
    model, tokenizer = PrefixReader(VOCABULARY, 0), text_tokenizer()
    tokens = [tokenizer.bos_token_id, *tokenizer("Tea")["input_ids"]]
    assert log_likelihood(model, tokenizer, "", "Tea").log_likelihood == pytest.approx(-model.nats(tokens, 1))
    with pytest.raises(ValueError, match="context of 'Tea' is empty, but the model reads a prefix .* give a context"):
        log_likelihood(PrefixReader(VOCABULARY, 64), tokenizer, "", "Tea")


def test_what_is_refused():
    model, tokenizer = PrefixReader(VOCABULARY, 0), text_tokenizer()
    with pytest.raises(ValueError, match="The continuation '' adds no token .* give a longer one"):
        log_likelihood(model, tokenizer, "Tea", "")
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        log_likelihoods(model, tokenizer, PAIRS, batch_size=0)
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        log_likelihood(model, bare, "", "Tea")
