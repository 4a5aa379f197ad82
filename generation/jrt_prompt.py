"""JRT-Prompt (Just Read Twice, arXiv 2407.05483): a context is shown again before its question, for any model.

A recurrent model must decide what to remember before it knows what will be asked; at the second reading it knows.

prompts = jrt_prompts(contexts, questions)
model.generate(**encode_prompts(tokenizer, prompts), max_new_tokens=48)
"""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter
from typing import Any

from transformers import BatchEncoding


TEMPLATE = "{context} {question}"
Conversation = list[dict[str, str]]


def repeat_reading(announcement: str, context: str, reading: str, *, repeats: int) -> str:
    """The order of the paper's prompts: announcement and context, the context again on lines of its own, the reading.

    Args:
        announcement: what will be asked for, in front of the first context; may be empty.
        context: the text that is shown `repeats` times, the last time as a part of `reading`.
        reading: context and question as a model reads them once; with `repeats=1` it is the whole prompt.
        repeats: how often the context is shown: 1 is the prompt without JRT, 2 the paper's "twice".

    Raises:
        ValueError: `repeats` is no whole number of at least 1.
    """
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        raise ValueError(
            f"`repeats` is {repeats!r}, but a context is shown a whole number of times; give 1 for the prompt without "
            "repetition, or 2 as in the paper."
        )
    if repeats == 1:
        return reading
    first = f"{announcement} {context}" if announcement else context
    return "\n".join([first, *[context] * (repeats - 2), reading])


def jrt_prompt(
    context: str, question: str, *, repeats: int = 2, announcement: str | None = None, template: str = TEMPLATE
) -> str:
    """One prompt: `announcement context ⏎ context question` for two repeats.

    Args:
        context: the text that holds the answer, taken as it is.
        question: what is asked, or the beginning of a sentence that the answer completes.
        repeats: how often the context is shown; with 1 there is no announcement.
        announcement: what stands in front of the first context; by default the question, `""` for nothing.
        template: one reading, with the fields `{context}` and `{question}`; the readings before it show the bare
            context.

    Raises:
        ValueError: an empty context or question, a template with other fields, or `repeats` below 1.
    """
    for name, text in (("context", context), ("question", question)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"The {name} is {text!r}, but a prompt needs a string with some words; give one.")
    reading = fill_template(template, context, question)
    return repeat_reading(question if announcement is None else announcement, context, reading, repeats=repeats)


def fill_template(template: str, context: str, question: str) -> str:
    """Puts context and question into a template.

    Raises:
        ValueError: the fields of the template are not just `{context}` and `{question}`.
    """
    try:
        fields = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        fields = {str(error)}
    if fields != {"context", "question"}:
        raise ValueError(
            f"The template {template!r} has the fields {sorted(fields)}, but must have {{context}} and {{question}}; "
            "write these two, and a literal brace twice."
        )
    return template.format(context=context, question=question)


def jrt_prompts(
    contexts: Sequence[str], questions: Sequence[str], *, announcements: Sequence[str] | None = None, **options: Any
) -> list[str]:
    """`jrt_prompt` for each context and its question.

    Args:
        contexts, questions: as many of each.
        announcements: one for each context; by default the questions.
        options: `repeats` and `template` of `jrt_prompt`.

    Raises:
        ValueError: lists of different lengths, a string in place of a list, and as `jrt_prompt`.
    """
    lists = {"contexts": contexts, "questions": questions}
    if announcements is not None:
        lists["announcements"] = announcements
    sizes = {name: "one string" if isinstance(some, str) else len(some) for name, some in lists.items()}
    if len(set(sizes.values())) > 1 or "one string" in sizes.values():
        raise ValueError(f"Given are {sizes}, but each context needs its own question; give lists of one length.")
    rows = zip(*lists.values(), strict=True)
    return [
        jrt_prompt(context, question, announcement=rest[0] if rest else None, **options)
        for context, question, *rest in rows
    ]


def conversation(
    tokenizer: Any, prompt: str, *, chat: bool | None = None, system: str | None = None
) -> str | Conversation:
    """The prompt as the user's message of a chat, or unchanged where there is no chat.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): its chat template decides if `chat` is `None`.
        prompt: a prompt of `jrt_prompt`.
        chat: whether to write a chat.
        system: a system message in front, in chats only.

    Raises:
        ValueError: a chat without a chat template, or a system message without a chat.
    """
    template = getattr(tokenizer, "chat_template", None)
    if chat is None:
        chat = template is not None
    if chat and template is None:
        raise ValueError("chat=True, but the tokenizer has no chat template; set one, or leave `chat` out.")
    if not chat:
        if system is not None:
            raise ValueError(
                f"The system message {system!r} has no place in a prompt without a chat; use a tokenizer with a chat "
                "template, or write it into `template`."
            )
        return prompt
    start = [] if system is None else [{"role": "system", "content": system}]
    return [*start, {"role": "user", "content": prompt}]


def encode_prompts(
    tokenizer: Any, prompts: str | Sequence[str], *, chat: bool | None = None, system: str | None = None
) -> BatchEncoding:
    """Token ids and attention mask for `generate`, padded on the left.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): needs a pad token where prompts differ in length.
        prompts: one prompt or several.
        chat, system: as in `conversation`.

    Returns:
        `input_ids` and `attention_mask`, both `torch.LongTensor` of shape `(number of prompts, longest prompt)`.

    Raises:
        ValueError: no prompt, several without a pad token, and as `conversation`.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("The list of prompts is empty; give at least one.")
    if len(texts) > 1 and tokenizer.pad_token_id is None:
        raise ValueError(
            f"{len(texts)} prompts need padding, but the tokenizer has no pad token; set "
            "`tokenizer.pad_token = tokenizer.eos_token`."
        )
    inputs = [conversation(tokenizer, text, chat=chat, system=system) for text in texts]
    padding = len(texts) > 1
    if isinstance(inputs[0], str):
        return tokenizer(inputs, padding=padding, padding_side="left", return_tensors="pt")
    return tokenizer.apply_chat_template(
        inputs,
        add_generation_prompt=True,
        padding=padding,
        return_dict=True,
        return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    )


def first_line(text: str) -> str:
    """The generated text up to the first newline, where the paper stops."""
    return text.partition("\n")[0]
