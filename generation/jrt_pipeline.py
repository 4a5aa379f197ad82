"""JRT-Prompt as a pipeline: contexts and questions in, transformers' text-generation output back.

ask = JRTPromptPipeline("state-spaces/mamba-130m-hf")
ask({"context": article, "question": "The king was born in"}, return_full_text=False)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from transformers import pipeline

from .jrt_prompt import TEMPLATE, Conversation, conversation, encode_prompts, jrt_prompt
from .jrt_truncation import token_ids, truncate_context


FIELDS = ("context", "question", "announcement")


class JRTPromptPipeline:
    """Repeats each context (`jrt_prompt`), then runs a `TextGenerationPipeline`.

    With a tokenizer that has a chat template the prompt is the user's message. Prompt and new tokens must fit into
    `max_position_embeddings` of models that have such a limit.

    Args:
        model (`str` or `PreTrainedModel`): any causal language model, or the name of one.
        tokenizer (`str` or `PreTrainedTokenizerBase`, *optional*): needed if `model` is no name.
        repeats (`int`): how often a context is shown; 1 is the prompt without repetition.
        template (`str`): one reading, with the fields `{context}` and `{question}`.
        chat (`bool`, *optional*): whether to write a chat; by default if the tokenizer has a template.
        system (`str`, *optional*): a system message, in chats only.
        max_context_tokens (`int` or `"fit"`, *optional*): contexts are cut to this many tokens, or to what the model
            has room for; by default nothing is cut and a prompt that is too long is an error.
        keep (`"start"` or `"end"`): which part of a cut context stays.
        max_new_tokens (`int`): the paper's 48, unless a call asks for another number.
        options: passed to `transformers.pipeline`: `device`, `dtype`, `batch_size`, `do_sample` and so on.

    Attributes:
        generator (`TextGenerationPipeline`): what runs the prompts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        repeats: int = 2,
        template: str = TEMPLATE,
        chat: bool | None = None,
        system: str | None = None,
        max_context_tokens: int | Literal["fit"] | None = None,
        keep: Literal["start", "end"] = "start",
        max_new_tokens: int = 48,
        **options: Any,
    ):
        if max_context_tokens not in (None, "fit") and not (
            isinstance(max_context_tokens, int) and max_context_tokens > 0
        ):
            raise ValueError(
                f"`max_context_tokens` is {max_context_tokens!r}; give a number of tokens, 'fit' for what the model "
                "has room for, or None to cut nothing."
            )
        # refuses wrong settings before a model is loaded
        jrt_prompt("context", "question", repeats=repeats, template=template)
        self.generator: Any = pipeline("text-generation", model=model, tokenizer=tokenizer, **options)
        self.repeats = repeats
        self.template = template
        self.chat = chat
        self.system = system
        self.max_context_tokens = max_context_tokens
        self.keep = keep
        self.max_new_tokens = max_new_tokens

    @property
    def tokenizer(self) -> Any:
        return self.generator.tokenizer

    @property
    def position_limit(self) -> int | None:
        """Tokens that the model has positions for; `None` without a limit, as for recurrent models."""
        limit = getattr(self.generator.model.config.get_text_config(), "max_position_embeddings", None)
        return limit if limit and limit > 0 else None

    def __call__(self, inputs: Mapping[str, str] | Iterable[Mapping[str, str]], **options: Any) -> list[Any]:
        """Answers.

        Args:
            inputs: `{"context", "question"}`, or several of them; an `"announcement"` may stand in for the question in
                front of the first context.
            options: passed to the `TextGenerationPipeline`: `batch_size`, `return_full_text`, `do_sample`,
                `stop_sequence` and other arguments of `generate`.

        Returns:
            What a `TextGenerationPipeline` returns for the prompts: a list of `{"generated_text"}` for one input, a
            list of such lists for several.

        Raises:
            ValueError: other fields, an empty context or question, or a prompt longer than the model's context.
        """
        if getattr(options.get("generation_config"), "max_new_tokens", None) is None:
            options.setdefault("max_new_tokens", self.max_new_tokens)
        new_tokens = options.get("max_new_tokens") or options["generation_config"].max_new_tokens
        if isinstance(inputs, Mapping):
            return self.generator(self._prompt(inputs, new_tokens), **options)
        prompts = [self._prompt(one, new_tokens) for one in inputs]
        return self.generator(prompts, **options) if prompts else []

    def _prompt(self, fields: Mapping[str, str], new_tokens: int) -> str | Conversation:
        if not isinstance(fields, Mapping) or not {"context", "question"} <= set(fields) <= set(FIELDS):
            given = sorted(fields) if isinstance(fields, Mapping) else type(fields).__name__
            raise ValueError(
                f"An input has {given}, but must be a mapping with a context and a question, and perhaps an "
                'announcement; give {"context": ..., "question": ...} or a list of these.'
            )
        prompt = jrt_prompt(**fields, repeats=self.repeats, template=self.template)
        if isinstance(self.max_context_tokens, int):
            prompt = self._cut(fields, self.max_context_tokens)
        limit = self.position_limit
        if limit is not None and self._length(prompt) + new_tokens > limit:
            prompt = self._fitted(fields, prompt, limit, new_tokens)
        return conversation(self.tokenizer, prompt, chat=self.chat, system=self.system)

    def _fitted(self, fields: Mapping[str, str], prompt: str, limit: int, new_tokens: int) -> str:
        room = len(token_ids(self.tokenizer, fields["context"]))
        while (excess := self._length(prompt) + new_tokens - limit) > 0:
            if self.max_context_tokens != "fit":
                raise ValueError(
                    f"The prompt and {new_tokens} new tokens take {excess} more than the {limit} positions of the "
                    "model; give max_context_tokens='fit' or a smaller number, fewer repeats or a smaller "
                    "max_new_tokens."
                )
            # each reading gives up its share
            room -= -(-excess // self.repeats)
            if room < 1:
                raise ValueError(
                    f"The {limit} positions of the model have no room for any context beside this question and "
                    f"{new_tokens} new tokens; shorten the question or give a smaller max_new_tokens."
                )
            prompt = self._cut(fields, room)
        return prompt

    def _cut(self, fields: Mapping[str, str], tokens: int) -> str:
        context = truncate_context(self.tokenizer, fields["context"], tokens, keep=self.keep)
        return jrt_prompt(**{**fields, "context": context}, repeats=self.repeats, template=self.template)

    def _length(self, prompt: str) -> int:
        return encode_prompts(self.tokenizer, prompt, chat=self.chat, system=self.system)["input_ids"].shape[1]
