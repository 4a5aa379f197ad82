"""Planted facts, prompts, and recall of a model that looks up what it still remembers."""

import re
from types import SimpleNamespace

import pytest
import torch
from prefix_reader import tiny_jrt
from real_text import VOCABULARY, source_config, text_tokenizer
from transformers import LlamaForCausalLM

from varidepth.analysis.contains import contains
from varidepth.analysis.document_recall import (
    ORDERS,
    RecallQuestion,
    RecallShare,
    document_recall,
    recall_questions,
)
from varidepth.training.text_blocks import load_documents


DOCUMENTS = [
    "The clerk was here. He wrote a {letter}. It went to town. \nThen he left (at six.) Nobody saw him! The end.",
    "One door. Two doors. Three doors. Four doors. Five doors. Six doors. Seven doors. Eight doors. Nine doors.",
]


class Rememberer(torch.nn.Module):
    """Looks the attribute up in the last `memory` characters before the question, and writes the value if it is there.

    It is a model that can `generate` and no more; prompts must be padded on the left, and masked there.
    """

    def __init__(self, memory: int, answer: str = " {value}.\nMore of it."):
        super().__init__()
        self.device, self.memory, self.answer = torch.device("cpu"), memory, answer
        self.config = SimpleNamespace()
        self.prompts: list[str] = []

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, pad_token_id):
        assert not self.training and not do_sample and pad_token_id == 0
        assert (attention_mask.diff(dim=1) >= 0).all()
        rows = [text_tokenizer().decode(ids[mask == 1]) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        self.prompts += rows
        written = [self.write(prompt)[:max_new_tokens] for prompt in rows]
        longest = max(len(row) for row in written)
        tail = torch.tensor([row + [pad_token_id] * (longest - len(row)) for row in written])
        return torch.cat([input_ids, tail], dim=1)

    def write(self, prompt: str) -> list[int]:
        shown, _, attribute = prompt.rpartition("\n")
        found = re.findall(re.escape(attribute) + r" (\w+)\.", shown[-self.memory :])
        return text_tokenizer()(self.answer.format(value=found[-1] if found else "Unknown"))["input_ids"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_facts_stand_as_sentences_where_they_should(document):
    questions = recall_questions([document], depths=(0.0, 0.25, 0.5, 1.0), seed=3)
    assert [question.depth for question in questions] == [0.0, 0.25, 0.5, 1.0]
    shown = questions[0].document
    assert {question.document for question in questions} == {shown}
    rest, places = shown, []
    for question in questions:
        fact = f"{question.attribute}: {question.value}."
        assert shown.count(fact) == 1 and question.value not in document
        before = shown[: shown.index(fact)].rstrip()
        assert not before or before[-1] in ".!?"
        places.append(shown.index(fact))
        rest = rest.replace(fact, "")
    assert rest.split() == document.split()
    assert places == sorted(places) and places[0] == 0 and shown.endswith(f"{questions[-1].value}.")
    assert abs(places[2] / len(shown) - 0.5) < 0.15
    assert len({question.value for question in questions} | {question.attribute for question in questions}) == 8
    assert recall_questions([document], seed=0) != recall_questions([document], seed=1)


def test_a_text_without_sentences_is_parted_between_words():
    text = "word " * 60
    middle = recall_questions([text], depths=(0.5,))[0]
    before, after = middle.document.split(f"{middle.attribute}: {middle.value}.")
    assert before.split() == after.split() == ["word"] * 30


def test_the_orders():
    question = RecallQuestion("A {text}.", "Codename of Tavori", "Belun", 0.5)
    assert question.prompt("after") == "A {text}.\nCodename of Tavori:"
    announced = "Information about Codename of Tavori. A {text}.\n"
    assert question.prompt("before_and_after") == f"{announced}Codename of Tavori:"
    assert question.prompt("twice") == f"{announced}A {{text}}.\nCodename of Tavori:"


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_recall_by_depth_and_order(batch_size):
    questions = recall_questions(DOCUMENTS)
    # the start of the document is too long ago, and its middle is not
    model = Rememberer(memory=130).train()
    recall = document_recall(model, text_tokenizer(), questions, batch_size=batch_size)
    assert model.training
    assert sorted(model.prompts) == sorted(question.prompt(order) for order in ORDERS for question in questions)
    for order in ORDERS:
        correct = {depth: recall.shares[order, depth].correct for depth in (0.0, 0.5, 1.0)}
        assert correct == {0.0: 0, 0.5: 2, 1.0: 2} and recall.of_order(order) == RecallShare(4, 6)
    everything = document_recall(Rememberer(memory=10_000), text_tokenizer(), questions, orders=["twice"])
    assert set(everything.shares) == {("twice", depth) for depth in (0.0, 0.5, 1.0)}
    assert everything.of_order("twice").accuracy == 1.0
    assert "| twice | 100.0% (34.2% to 100.0%) |" in everything.table()


@pytest.mark.parametrize(
    ("answer", "tokens", "right"),
    [(" IT IS {value}", 24, 6), (" none\n{value}", 24, 0), (" {value}", 1, 0), (" {value}s", 24, 6)],
)
def test_the_first_line_must_contain_the_value(answer, tokens, right):
    model = Rememberer(memory=10_000, answer=answer)
    recall = document_recall(
        model, text_tokenizer(), recall_questions(DOCUMENTS), orders=["after"], max_new_tokens=tokens
    )
    assert recall.of_order("after") == RecallShare(right, 6)


@pytest.mark.parametrize("make", [lambda: LlamaForCausalLM(source_config()), lambda: tiny_jrt(VOCABULARY, 64)])
def test_real_models_answer_something(make):
    torch.manual_seed(0)
    model = make()
    questions = recall_questions([text[:300] for text in load_documents()[:2]])
    shares = document_recall(model, text_tokenizer(), questions, batch_size=3, max_new_tokens=4).shares
    assert {share.questions for share in shares.values()} == {2} and len(shares) == 9


def test_wilson_interval():
    # figures of E. B. Wilson's formula at z = 1.96
    assert RecallShare(0, 10).interval == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert RecallShare(5, 10).interval == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert RecallShare(10, 10).interval == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_contains():
    assert contains("it was PARIS.", ["Lyon", "Paris"]) and contains("a+b", "A+B") and not contains("aab", "a+b")
    for answers in ([], "", ["Paris", ""]):
        with pytest.raises(ValueError, match="must be non-empty strings"):
            contains("Paris", answers)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda questions: recall_questions([" ", ""]), "no text to plant facts in"),
        (lambda questions: recall_questions(DOCUMENTS, depths=(0.5, 0.2)), "must be 1 to 8 numbers that ascend"),
        (lambda questions: recall_questions(DOCUMENTS, depths=(0.5, 1.5)), "from 0"),
        (lambda questions: recall_questions(DOCUMENTS, depths=()), "must be 1 to 8 numbers"),
        (lambda questions: document_recall(None, None, []), "nothing to ask"),
        (
            lambda questions: document_recall(None, None, questions, orders=["thrice"]),
            "'thrice', but orders are after",
        ),
        (lambda questions: document_recall(None, None, questions, batch_size=0), "`batch_size` is 0"),
        (lambda questions: document_recall(None, None, questions, max_new_tokens=0), "`max_new_tokens` is 0"),
    ],
)
def test_what_is_refused(ask, message):
    with pytest.raises(ValueError, match=message):
        ask(recall_questions(DOCUMENTS))
