"""An out-of-tree copy of Llama's public interface: proves that the harness itself is sound.

The model adds nothing to Llama but a model type of its own, so whatever fails here is the harness or transformers.
"""

import unittest

from tests.causal_lm_tester import TinyModelSuite
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)
from transformers.generation import GenerationMixin
from transformers.models.auto import modeling_auto


class PlainConfig(LlamaConfig):
    model_type = "varidepth_plain"


class PlainModel(LlamaModel):
    config_class = PlainConfig


class PlainForCausalLM(LlamaForCausalLM, GenerationMixin):
    config_class = PlainConfig


class PlainForSequenceClassification(LlamaForSequenceClassification):
    config_class = PlainConfig


AutoConfig.register("varidepth_plain", PlainConfig)
AutoModel.register(PlainConfig, PlainModel)
AutoModelForCausalLM.register(PlainConfig, PlainForCausalLM)
AutoModelForSequenceClassification.register(PlainConfig, PlainForSequenceClassification)
modeling_auto.MODEL_MAPPING_NAMES["varidepth_plain"] = "PlainModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["varidepth_plain"] = "PlainForCausalLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["varidepth_plain"] = "PlainForSequenceClassification"


class VanillaTest(TinyModelSuite, unittest.TestCase):
    config_class = PlainConfig
    classes = {"base": PlainModel, "causal": PlainForCausalLM, "classify": PlainForSequenceClassification}
