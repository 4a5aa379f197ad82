"""A tester for small decoder-only language models and the test class that joins the mixins of transformers.

The sdist of transformers carries the mixins but not the module that joins them. This one is our own: it asks for
the attributes that the mixins read, nothing more.
"""

import random
import shutil
import tempfile
import unittest
from pathlib import Path
from typing import Any

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_fsdp_mixin import FSDPTesterMixin
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from tests.test_pipeline_mixin import PipelineTesterMixin
from tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import test_fsdp_mixin, test_pipeline_mixin, test_tensor_parallel_mixin


# The mixins run their multi-process cases for a list of transformers' own model types; None means every model.
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None

WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *"the a cat dog mat sat ran on This example is .".split()]


class TinyTester:
    """Builds the tiny config and inputs of one model; `fields` override or extend the config."""

    batch_size = 13
    seq_length = 7
    is_training = True

    def __init__(self, parent: unittest.TestCase, config_class: type, classes: dict[str, type], **fields: Any):
        self.parent = parent
        self.config_class = config_class
        self.base_model_class = classes["base"]
        self.causal_lm_class = classes["causal"]
        self.sequence_classification_class = classes["classify"]
        self.config_fields: dict[str, Any] = {
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **fields,
        }
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            setattr(self, name, self.config_fields[name])

    def get_config(self) -> Any:
        return self.config_class(**self.config_fields)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """The config, random ids without the pad id, and a mask whose rows are right-padded to different lengths."""
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 3) + 3
        attention_mask = torch.ones_like(input_ids)
        for row in range(1, self.batch_size, 3):
            attention_mask[row, random.randint(2, self.seq_length) :] = 0
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class TinyModelSuite(
    ModelTesterMixin,
    GenerationTesterMixin,
    PipelineTesterMixin,
    TrainingTesterMixin,
    TensorParallelTesterMixin,
    FSDPTesterMixin,
):
    """All mixins for one language model; a subclass names the classes in `config_class` and `classes`."""

    config_class: type
    classes: dict[str, type]
    fields: dict[str, Any] = {}
    model_tester: TinyTester
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        super().setUp()
        self.model_tester = TinyTester(self, self.config_class, self.classes, **self.fields)
        self.config_tester = ConfigTester(self, config_class=self.config_class, **self.model_tester.config_fields)
        self.all_model_classes = tuple(self.classes.values())
        self.pipeline_model_mapping = {
            "feature-extraction": self.classes["base"],
            "text-generation": self.classes["causal"],
            "text-classification": self.classes["classify"],
            "zero-shot": self.classes["classify"],
        }

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_sequence_classification_reads_the_last_valid_token(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.classes["classify"](config).eval()
        ids = inputs["input_ids"][:2]
        padded = torch.cat([ids, torch.zeros_like(ids[:, :3])], dim=1)
        mask = padded.ne(0).long()
        with torch.no_grad():
            short, long = model(ids).logits, model(padded, attention_mask=mask).logits
        torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-5)

    def run_task_tests(self, task: str, dtype: str = "float32") -> None:
        """Puts a tiny checkpoint with a tokenizer where the mixin looks for one, then lets the mixin run."""
        folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        architecture = self.pipeline_model_mapping.get(task)
        if architecture is not None:
            target = folder / self.config_class.model_type / architecture.__name__
            torch.manual_seed(0)
            architecture(self.model_tester.get_config()).save_pretrained(target)
            tiny_tokenizer().save_pretrained(target)
            summary = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": [], "model_classes": []}
            test_pipeline_mixin.tiny_model_summary = {architecture.__name__: summary}
        test_pipeline_mixin.TRANSFORMERS_TINY_MODEL_PATH = str(folder)
        super().run_task_tests(task, dtype)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose ids lie inside the tiny vocabulary."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", model_max_length=512, **names)
