"""Pipeline checks for the tasks of a text model; the sdist carries the mixin but not the checks it calls.

Each class offers what `PipelineTesterMixin` asks for: `get_test_pipeline` builds the pipeline and two inputs,
`run_pipeline_test` runs it and looks at the shape of the answer. Tasks that no language model has get an empty class.
"""

import math
from typing import Any

from transformers import pipeline


class TextPipelineChecks:
    """One pipeline task on a tiny model and its tokenizer."""

    task = ""
    examples: tuple[str, ...] = ("the cat sat on the mat", "a dog ran")

    def get_test_pipeline(self, model: Any, tokenizer: Any = None, **kwargs: Any) -> tuple[Any, list[str]]:
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype", "float32"))
        return pipeline(self.task, model=model, tokenizer=tokenizer, dtype=dtype), list(self.examples)

    def run_pipeline_test(self, pipe: Any, examples: list[str]) -> None:
        raise NotImplementedError


class FeatureExtractionPipelineTests(TextPipelineChecks):
    task = "feature-extraction"

    def run_pipeline_test(self, pipe: Any, examples: list[str]) -> None:
        single = pipe(examples[0])
        assert len(single[0][0]) == pipe.model.config.hidden_size
        assert all(math.isfinite(value) for value in single[0][0])
        assert len(pipe(examples)) == len(examples)


class TextGenerationPipelineTests(TextPipelineChecks):
    task = "text-generation"

    def run_pipeline_test(self, pipe: Any, examples: list[str]) -> None:
        pipe.model.generation_config.max_length = None
        single = pipe(examples[0], do_sample=False, max_new_tokens=4)
        assert single[0]["generated_text"].startswith(examples[0])
        tail = pipe(examples[0], do_sample=False, max_new_tokens=4, return_full_text=False)
        assert single[0]["generated_text"] == examples[0] + tail[0]["generated_text"]
        both = pipe(examples, do_sample=False, max_new_tokens=4, batch_size=2)
        assert both[0] == single, "a batch changed the text of its first row"
        several = pipe(examples[0], do_sample=True, num_return_sequences=2, max_new_tokens=4)
        assert len(several) == 2


class TextClassificationPipelineTests(TextPipelineChecks):
    task = "text-classification"

    def run_pipeline_test(self, pipe: Any, examples: list[str]) -> None:
        single = pipe(examples[0])
        assert single[0]["label"] in pipe.model.config.id2label.values()
        scores = pipe(examples[0], top_k=None)
        assert len(scores) == pipe.model.config.num_labels
        assert len(pipe(examples)) == len(examples)


class ZeroShotClassificationPipelineTests(TextPipelineChecks):
    task = "zero-shot-classification"

    def get_test_pipeline(self, model: Any, tokenizer: Any = None, **kwargs: Any) -> tuple[Any, list[str]]:
        pipe, examples = super().get_test_pipeline(model, tokenizer, **kwargs)
        pipe._preprocess_params["candidate_labels"] = ["cat", "dog"]
        return pipe, examples

    def run_pipeline_test(self, pipe: Any, examples: list[str]) -> None:
        answer = pipe(examples[0], candidate_labels=["cat", "dog", "mat"])
        assert sorted(answer["labels"]) == ["cat", "dog", "mat"]
        assert abs(sum(answer["scores"]) - 1.0) < 1e-3
