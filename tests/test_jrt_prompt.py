"""JRT-Prompt against prompts written out by hand, and its pipeline against `generate` on such a prompt."""

import copy

import pytest
import torch
from real_text import VOCABULARY, source_config, text_tokenizer
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM

from varidepth.analysis.contains import contains
from varidepth.generation.jrt_pipeline import JRTPromptPipeline
from varidepth.generation.jrt_prompt import (
    conversation,
    encode_prompts,
    first_line,
    jrt_prompt,
    jrt_prompts,
)
from varidepth.generation.jrt_tasks import task_answers, task_prompt, truncate_row
from varidepth.generation.jrt_truncation import answer_position, token_ids, truncate_context, window_around_answer


CONTEXT = "Ada Lovelace was born in London in 1815."
QUESTION = "The city of her birth is"
ONCE = "Ada Lovelace was born in London in 1815. The city of her birth is"
TWICE = f"The city of her birth is Ada Lovelace was born in London in 1815.\n{ONCE}"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer():
    tokenizer = copy.deepcopy(text_tokenizer())
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def words(count: int) -> str:
    return " ".join(f"n{i}" for i in range(count))


# prompts


def test_the_context_is_shown_as_often_as_asked():
    assert jrt_prompt(CONTEXT, QUESTION) == TWICE
    assert jrt_prompt(CONTEXT, QUESTION, repeats=1) == ONCE
    assert jrt_prompt("C", "Q", repeats=4) == "Q C\nC\nC\nC Q"


def test_announcement_and_template():
    assert jrt_prompt("C", "Q", announcement="About Q.") == "About Q. C\nC Q"
    assert jrt_prompt("C", "Q", announcement="") == "C\nC Q"
    assert jrt_prompt("C", "Q", announcement="About Q.", repeats=1) == "C Q"
    template = "Text: {context}\nQuestion: {question}\nAnswer:"
    assert jrt_prompt("C", "Q", template=template) == "Q C\nText: C\nQuestion: Q\nAnswer:"
    assert jrt_prompt("{context} 100%", "{x}?") == "{x}? {context} 100%\n{context} 100% {x}?"


def test_lists_of_contexts():
    assert jrt_prompts(["A", "B"], ["x", "y"]) == ["x A\nA x", "y B\nB y"]
    prompts = jrt_prompts(
        ["A", "B"], ["x", "y"], announcements=["1", "2"], repeats=3, template="{context}: {question}"
    )
    assert prompts == ["1 A\nA\nA: x", "2 B\nB\nB: y"]
    assert jrt_prompts([], []) == []


@pytest.mark.parametrize("context", ["", " \n", None])
def test_an_empty_context_or_question_is_refused(context):
    with pytest.raises(ValueError, match="The context is .* give one"):
        jrt_prompt(context, QUESTION)
    with pytest.raises(ValueError, match="The question is .* give one"):
        jrt_prompt(CONTEXT, context)


@pytest.mark.parametrize("repeats", [0, -1, 1.5, "2", True])
def test_repeats_must_be_a_number_of_times(repeats):
    with pytest.raises(ValueError, match="whole number of times; give 1"):
        jrt_prompt(CONTEXT, QUESTION, repeats=repeats)


@pytest.mark.parametrize(
    ("template", "fields"),
    [
        ("{context}", "['context']"),
        ("{context} {query}", "['context', 'query']"),
        ("{} {question}", "['', 'question']"),
    ],
)
def test_a_template_with_other_fields_is_refused(template, fields):
    with pytest.raises(ValueError, match="must have {context} and {question}") as error:
        jrt_prompt(CONTEXT, QUESTION, template=template)
    assert fields in str(error.value)


def test_a_template_with_a_lonely_brace_is_refused():
    with pytest.raises(ValueError, match="a literal brace twice"):
        jrt_prompt(CONTEXT, QUESTION, template="{context} {question} }")
    assert jrt_prompt("C", "Q", template="{{{context}}} {question}", repeats=1) == "{C} Q"


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="'contexts': 2, 'questions': 1"):
        jrt_prompts(["A", "B"], ["x"])
    with pytest.raises(ValueError, match="'announcements': 1"):
        jrt_prompts(["A", "B"], ["x", "y"], announcements=["1"])
    with pytest.raises(ValueError, match="'contexts': 'one string'"):
        jrt_prompts("AB", "xy")


# the paper's tasks

FDA = {"text": "\nDevice data. Speed: 5 rpm...\n", "key": "speed", "value": "5 rpm"}
SWDE = {
    "text": "The film runs 90 minutes.. \n\nSummary of information above...\nlength:",
    "key": "length",
    "value": "90 minutes",
}
NQ = {
    "context": " The queen was born in Leeds . ",
    "question": "The queen was born in",
    "orig_question": "where was the queen born:",
    "answers": ["Leeds", "the town of Leeds"],
}
TRIVIAQA = {
    "context": "[DOC] [TLE] Rivers[PAR] The Aare flows through Bern.",
    "question": "The river through Bern is the ",
    "orig_question": "Which river flows through Bern:",
    "answers": ["Aare"],
}
SQUAD = {
    "text": "Bees dance. Question: What do bees do? Bees\n",
    "context": "Bees dance. Question: What do bees do?",
    "question": "What do bees do?",
    "value": "dance",
}
PROMPTS = {
    "fda": (
        FDA,
        "Device data. Speed: 5 rpm. Speed:",
        "Information about Speed. Device data. Speed: 5 rpm.\nDevice data. Speed: 5 rpm. Speed:",
    ),
    "swde": (
        SWDE,
        "The film runs 90 minutes. Length:",
        "Information about Length. The film runs 90 minutes..\nThe film runs 90 minutes.. Length:",
    ),
    "nq": (
        NQ,
        "The queen was born in Leeds . The queen was born in",
        "where was the queen born The queen was born in Leeds.\nThe queen was born in Leeds. The queen was born in",
    ),
    "drop": (
        NQ,
        "The queen was born in Leeds . The queen was born in",
        "where was the queen born The queen was born in Leeds.\nThe queen was born in Leeds. The queen was born in",
    ),
    "triviaqa": (
        TRIVIAQA,
        "Rivers The Aare flows through Bern. The river through Bern is the",
        "Which river flows through Bern: Rivers The Aare flows through Bern.\n"
        "Rivers The Aare flows through Bern. The river through Bern is the",
    ),
    "squad": (
        SQUAD,
        "Bees dance. Question: What do bees do? Bees",
        "What do bees do? Bees dance. \nBees dance. Question: What do bees do? Bees",
    ),
}


@pytest.mark.parametrize("task", PROMPTS)
def test_the_prompts_of_the_paper(task):
    row, once, twice = PROMPTS[task]
    before = copy.deepcopy(row)
    assert task_prompt(task, row, repeats=1) == once
    assert task_prompt(task, row) == twice
    assert row == before


def test_more_repeats_of_a_task_go_on_in_the_same_way():
    third = "Information about Speed. Device data. Speed: 5 rpm." + "\nDevice data. Speed: 5 rpm." * 2 + " Speed:"
    assert task_prompt("fda", FDA, repeats=3) == third
    assert task_prompt("squad", SQUAD, repeats=3).count("Bees dance. ") == 3


def test_the_question_at_the_end_of_a_document_is_removed():
    row = {**FDA, "text": "A: 5.SPEED:speed:"}
    assert task_prompt("fda", row, repeats=1) == "A: 5. Speed:"
    row = {**NQ, "context": "Born in Leeds. the queen was born inThe queen was born in"}
    # the official default of NQ removes one copy in its own case, the other prompts all copies in any case
    assert task_prompt("nq", row, repeats=1) == "Born in Leeds. the queen was born in. The queen was born in"
    assert task_prompt("drop", row, repeats=1) == "Born in Leeds. The queen was born in"
    assert task_prompt("nq", row) == task_prompt("drop", row)
    assert task_prompt("nq", row).endswith("\nBorn in Leeds. The queen was born in")
    # TriviaQA is searched before what its marks leave behind is stripped
    row = {**TRIVIAQA, "context": "Aare. The river through Bern is the\n[DOC]"}
    assert task_prompt("triviaqa", row, repeats=1).startswith("Aare. The river through Bern is the. The")


def test_gold_answers():
    assert task_answers("fda", FDA) == ["5 rpm"]
    assert task_answers("nq", NQ) == ["Leeds", "the town of Leeds"]


def test_rows_and_tasks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="'hotpot' is no recall task of the paper; give one of fda, swde, nq"):
        task_prompt("hotpot", FDA)
    with pytest.raises(ValueError, match=r"columns \['key', 'text', 'value'\], but task 'nq' also reads 'context'"):
        task_prompt("nq", FDA)
    with pytest.raises(ValueError, match="also reads 'answers'"):
        task_answers("nq", FDA)
    with pytest.raises(ValueError, match="The column 'text' of the row is empty"):
        task_prompt("swde", {**SWDE, "text": "Summary of information above... length:"})
    with pytest.raises(ValueError, match="whole number of times"):
        task_prompt("fda", FDA, repeats=0)


# truncation


def test_start_or_end_of_a_context():
    tokenizer, context = text_tokenizer(), words(40)
    ids = token_ids(tokenizer, context)
    start, end = truncate_context(tokenizer, context, 30), truncate_context(tokenizer, context, 30, keep="end")
    assert token_ids(tokenizer, start) == ids[:30] and context.startswith(start)
    assert token_ids(tokenizer, end) == ids[-30:] and context.endswith(end)
    assert truncate_context(tokenizer, context, len(ids)) == context
    with pytest.raises(ValueError, match="leave room for at least 1"):
        truncate_context(tokenizer, context, 0)
    with pytest.raises(ValueError, match="'start' or its 'end'"):
        truncate_context(tokenizer, context, 5, keep="middle")


def test_a_cut_inside_a_character_leaves_no_broken_one():
    tokenizer = text_tokenizer()
    assert len(token_ids(tokenizer, "a€")) == 4
    assert truncate_context(tokenizer, "a€", 3) == "a"
    assert truncate_context(tokenizer, "€a", 3, keep="end") == "a"


def test_position_of_an_answer():
    assert answer_position("Paris, paris and Rome", ["ROME", "paris"]) == 0
    assert answer_position("1+1 is (2)", ["(2)"]) == 7
    assert answer_position("Paris", ["Rome"]) is None
    assert answer_position("Paris", []) is None


def window(answers, size=21, **options):
    """The numbers of `n0 n1 ... n99` in the window; each word is of several tokens."""
    tokenizer = text_tokenizer()
    text = window_around_answer(tokenizer, words(100), answers, context_length=size + 9, answer_length=9, **options)
    return text, token_ids(tokenizer, words(100))


def test_the_window_lies_around_the_earliest_answer():
    text, ids = window(["N70", "n50"])
    before = len(token_ids(text_tokenizer(), words(100)[: words(100).index("n50")]))
    assert text == text_tokenizer().decode(ids[before - 10 : before + 11])
    assert "n50" in text and "n70" not in text


def test_the_window_at_the_edges_of_the_document():
    tokenizer = text_tokenizer()
    text, ids = window(["n1"])
    assert text == tokenizer.decode(ids[:21])
    # as in the official code it does not move back from the end
    text, ids = window(["n99"])
    before = len(token_ids(tokenizer, words(100)[: words(100).index("n99")]))
    assert text == tokenizer.decode(ids[before - 10 :]) and text.endswith("n99")
    # and cuts a document that would fit
    assert window_around_answer(tokenizer, words(100), ["n99"], context_length=len(ids), answer_length=0) != words(100)


def test_the_window_without_an_answer():
    text, ids = window(["nowhere"])
    assert text == text_tokenizer().decode(ids[:21])
    assert window([])[0] == window([], missing="end")[0] == text
    # the official code's negative index: half a window in front of the last character, and this one
    before = len(token_ids(text_tokenizer(), words(100)[:-1]))
    assert before < len(ids)
    assert window(["nowhere"], missing="end")[0] == text_tokenizer().decode(ids[before - 10 :])


def test_windows_without_room_are_refused():
    with pytest.raises(ValueError, match="context_length of 50 with an answer_length of 50 leaves no token"):
        window_around_answer(text_tokenizer(), CONTEXT, ["London"], context_length=50)
    with pytest.raises(ValueError, match="`missing` is 'middle'"):
        window(["nowhere"], missing="middle")


def test_rows_are_cut_around_what_their_task_looks_for():
    tokenizer, sizes = text_tokenizer(), {"context_length": 30, "answer_length": 9}

    def cut(task, row):
        return truncate_row(task, row, tokenizer, **sizes)

    row = {"text": words(100), "key": "n80", "value": "n30"}
    assert cut("fda", row) == {**row, "text": window(["n30"])[0]}
    # the summary of a page is cut off before the window is laid
    tail = words(40) + " Summary of information above... " + words(60)
    assert "Summary" not in cut("swde", {"text": tail, "key": "n39", "value": "n90"})["text"]
    row = {"context": words(100), "answers": ["n60", "n20"], "alt_answers": ["x", "N40", "n20"]}
    assert cut("nq", row)["context"] == window(["n60"])[0]
    assert cut("nq", {**row, "answers": ["none"]})["context"] == window(["n40"])[0]
    for task in ("drop", "triviaqa"):
        assert cut(task, row)["context"] == window([])[0]
    assert cut("fda", {"text": words(100), "key": "speed", "value": "5"}) is None
    with pytest.raises(ValueError, match="also reads 'key'"):
        cut("fda", {"text": "x", "value": "5"})


# metric


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        (" in london, of course", ["London"], True),
        ("Londres", ["London", "Londres"], True),
        ("Londres", ["London"], False),
        ("costs 5.00", ["5x00", "5.00"], True),
        ("costs 5x00", ["5.00"], False),
        ("", ["London"], False),
    ],
)
def test_contains(prediction, answers, expected):
    assert contains(prediction, answers) is expected


@pytest.mark.parametrize("answers", [[], "", ["London", ""]])
def test_answers_that_say_nothing_are_refused(answers):
    with pytest.raises(ValueError, match="must be non-empty strings, at least one"):
        contains("London", answers)


def test_the_first_line_counts():
    assert first_line(" London\nParis\n") == " London"
    assert first_line("London") == "London"
    assert first_line("\nLondon") == ""


# chats and batches


def test_a_chat_template_takes_the_prompt_as_the_users_message():
    tokenizer = chat_tokenizer()
    assert conversation(tokenizer, TWICE) == [{"role": "user", "content": TWICE}]
    encoded = encode_prompts(tokenizer, TWICE, system="Answer in one word.")
    assert tokenizer.decode(encoded["input_ids"][0]) == f"<system>Answer in one word.</s><user>{TWICE}</s><assistant>"
    plain = encode_prompts(tokenizer, TWICE, chat=False)
    assert tokenizer.decode(plain["input_ids"][0]) == TWICE


def test_chats_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompts(text_tokenizer(), TWICE, chat=True)
    with pytest.raises(ValueError, match="'Be brief.' has no place in a prompt without a chat"):
        encode_prompts(text_tokenizer(), TWICE, system="Be brief.")


@pytest.mark.parametrize("make", [text_tokenizer, chat_tokenizer])
def test_batches_are_padded_on_the_left(make):
    tokenizer = make()
    batch = encode_prompts(tokenizer, [ONCE, TWICE])
    pads = (batch["attention_mask"] == 0).sum(-1).tolist()
    assert pads[0] > 0 and pads[1] == 0
    assert batch["attention_mask"][0, : pads[0]].sum() == 0
    assert batch["input_ids"][0, pads[0] :].tolist() == encode_prompts(tokenizer, ONCE)["input_ids"][0].tolist()


def test_batches_that_cannot_be_padded_are_refused():
    tokenizer = copy.deepcopy(text_tokenizer())
    tokenizer.pad_token = None
    assert encode_prompts(tokenizer, [ONCE])["input_ids"].shape[0] == 1
    with pytest.raises(ValueError, match="no pad token; set"):
        encode_prompts(tokenizer, [ONCE, TWICE])
    with pytest.raises(ValueError, match="The list of prompts is empty"):
        encode_prompts(tokenizer, [])


# models


def make_model(kind: str):
    """Random weights, large enough that what is generated depends on the prompt."""
    torch.manual_seed(5)
    if kind == "llama":
        made = LlamaForCausalLM(source_config(initializer_range=0.3, num_hidden_layers=2))
    else:
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
        made = MambaForCausalLM(MambaConfig(**sizes, initializer_range=0.5, tie_word_embeddings=False, pad_token_id=0))
    made.generation_config.eos_token_id = None
    return made.eval()


@pytest.fixture(scope="module", params=["llama", "mamba"])
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


def generated(model, prompt, tokenizer=None, **options):
    """The continuation of a prompt, by `generate` alone."""
    tokenizer = tokenizer or text_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(ids, do_sample=False, pad_token_id=0, **{"max_new_tokens": 6, **options})
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_row_of_a_batch_is_as_if_it_were_alone(model):
    prompts, options = jrt_prompts([CONTEXT, words(20)], [QUESTION, "n7"]), {"max_new_tokens": 5, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    batch = model.generate(**encode_prompts(text_tokenizer(), prompts), **options)
    for row, prompt in enumerate(prompts):
        alone = model.generate(**encode_prompts(text_tokenizer(), prompt), **options)
        for step, logits in enumerate(alone.logits):
            torch.testing.assert_close(batch.logits[step][row], logits[0], atol=1e-4, rtol=1e-4)


def test_the_pipeline_is_generate_on_the_repeated_prompt(model):
    ask = JRTPromptPipeline(model, text_tokenizer(), max_new_tokens=6)
    item, options = {"context": CONTEXT, "question": QUESTION}, {"do_sample": False}
    expected = generated(model, TWICE)
    assert ask(item, return_full_text=False, **options) == [{"generated_text": expected}]
    assert ask(item, **options) == [{"generated_text": TWICE + expected}]

    other = {"context": words(20), "question": "n7", "announcement": "Find n7."}
    second = generated(model, f"Find n7. {words(20)}\n{words(20)} n7")
    answers = ask([item, other], batch_size=2, return_full_text=False, **options)
    assert answers == [[{"generated_text": expected}], [{"generated_text": second}]]
    assert ask(iter([item, other]), return_full_text=False, **options) == answers
    assert ask([]) == []


def test_settings_of_the_pipeline(llama):
    assert generated(llama, ONCE) != generated(llama, TWICE)
    item, options = {"context": CONTEXT, "question": QUESTION}, {"do_sample": False, "return_full_text": False}
    once = JRTPromptPipeline(llama, text_tokenizer(), repeats=1, template="{context}\n{question}:", **options)
    expected = generated(llama, f"{CONTEXT}\n{QUESTION}:", max_new_tokens=48)
    assert once(item) == [{"generated_text": expected}]
    assert once(item, max_new_tokens=3)[0]["generated_text"] == generated(
        llama, f"{CONTEXT}\n{QUESTION}:", max_new_tokens=3
    )
    twice = JRTPromptPipeline(llama, text_tokenizer(), **options)
    sixth = generated(llama, TWICE).removeprefix(generated(llama, TWICE, max_new_tokens=5))
    assert twice(item, stop_sequence=sixth)[0]["generated_text"] == generated(llama, TWICE)
    config = copy.deepcopy(llama.generation_config)
    config.update(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert twice(item, generation_config=config)[0]["generated_text"] == generated(llama, TWICE, max_new_tokens=4)


def test_the_pipeline_takes_names(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    text_tokenizer().save_pretrained(tmp_path)
    ask = JRTPromptPipeline(str(tmp_path), max_new_tokens=6)
    answer = ask({"context": CONTEXT, "question": QUESTION}, do_sample=False, return_full_text=False)
    assert answer == [{"generated_text": generated(llama, TWICE)}]


def test_the_pipeline_writes_chats(llama):
    tokenizer = chat_tokenizer()
    ask = JRTPromptPipeline(llama, tokenizer, system="Be brief.", max_new_tokens=6)
    chat = f"<system>Be brief.</s><user>{TWICE}</s><assistant>"
    item = {"context": CONTEXT, "question": QUESTION}
    [answer] = ask(item, do_sample=False)
    assert answer["generated_text"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": TWICE},
        {"role": "assistant", "content": generated(llama, chat, tokenizer)},
    ]
    assert [len(one) for one in ask([item, item], batch_size=2, do_sample=False)] == [1, 1]
    plain = JRTPromptPipeline(llama, tokenizer, chat=False, max_new_tokens=6)
    assert plain(item, do_sample=False) == [{"generated_text": TWICE + generated(llama, TWICE)}]


def test_contexts_are_cut_to_a_number_of_tokens(llama):
    tokenizer, item = text_tokenizer(), {"context": words(40), "question": "n7"}
    for keep in ("start", "end"):
        ask = JRTPromptPipeline(llama, tokenizer, max_context_tokens=20, keep=keep, max_new_tokens=2)
        prompt = jrt_prompt(truncate_context(tokenizer, words(40), 20, keep=keep), "n7")
        assert ask(item, do_sample=False)[0]["generated_text"].startswith(prompt)


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("keep", ["start", "end"])
def test_contexts_are_cut_to_what_the_model_has_room_for(llama, repeats, keep):
    tokenizer, context, limit = text_tokenizer(), words(400), llama.config.max_position_embeddings
    ask = JRTPromptPipeline(
        llama, tokenizer, repeats=repeats, keep=keep, max_context_tokens="fit", max_new_tokens=12, do_sample=False
    )
    item = {"context": context, "question": "n7"}
    tokens = ask(item, return_tensors=True)[0]["generated_token_ids"]
    assert limit - 2 * repeats < len(tokens) <= limit
    text = ask(item)[0]["generated_text"]
    kept = [truncate_context(tokenizer, context, limit // repeats - n, keep=keep) for n in range(50)]
    assert any(text.startswith(jrt_prompt(part, "n7", repeats=repeats)) for part in kept)
    short = {"context": CONTEXT, "question": QUESTION}
    assert ask(short)[0]["generated_text"].startswith(jrt_prompt(CONTEXT, QUESTION, repeats=repeats))


def test_prompts_beyond_the_models_context_are_refused(llama):
    tokenizer, item = text_tokenizer(), {"context": words(150), "question": "n7"}
    length = len(tokenizer(jrt_prompt(words(150), "n7"))["input_ids"])
    assert length > 512
    with pytest.raises(ValueError, match=rf"take {length + 48 - 512} more than the 512 positions of the model; give"):
        JRTPromptPipeline(llama, tokenizer)(item)
    with pytest.raises(ValueError, match="more than the 512 positions"):
        JRTPromptPipeline(llama, tokenizer, repeats=1)({"context": CONTEXT, "question": QUESTION}, max_new_tokens=500)
    ask = JRTPromptPipeline(llama, tokenizer, max_context_tokens="fit")
    with pytest.raises(ValueError, match="no room for any context beside this question and 48 new tokens"):
        ask({"context": words(150), "question": words(150)})


def test_models_without_positions_have_no_limit():
    ask = JRTPromptPipeline(make_model("mamba"), text_tokenizer(), max_new_tokens=1)
    assert ask.position_limit is None
    assert ask({"context": words(300), "question": "n7"}, do_sample=False)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_zero_is_no_limit(llama, limit):
    ask = JRTPromptPipeline(llama, text_tokenizer(), max_new_tokens=1)
    before = llama.config.max_position_embeddings
    try:
        llama.config.max_position_embeddings = limit
        assert ask.position_limit is None
    finally:
        llama.config.max_position_embeddings = before


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"context": CONTEXT}, r"has \['context'\], but must be a mapping"),
        ({"context": CONTEXT, "question": "x", "answer": "y"}, r"\['answer', 'context', 'question'\]"),
        ([CONTEXT], "has str, but must be a mapping"),
        ({"context": " ", "question": "x"}, "The context is ' '"),
        ([{"context": CONTEXT, "question": None}], "The question is None"),
    ],
)
def test_inputs_that_are_no_questions_are_refused(llama, inputs, message):
    with pytest.raises(ValueError, match=message):
        JRTPromptPipeline(llama, text_tokenizer(), max_context_tokens=5)(inputs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeats": 0}, "`repeats` is 0"),
        ({"template": "{context}"}, "must have {context} and {question}"),
        ({"max_context_tokens": "all"}, "`max_context_tokens` is 'all'; give a number of tokens, 'fit'"),
        ({"max_context_tokens": 0}, "`max_context_tokens` is 0"),
    ],
)
def test_settings_are_refused_before_a_model_is_loaded(settings, message):
    with pytest.raises(ValueError, match=message):
        JRTPromptPipeline("no/such-model", **settings)
