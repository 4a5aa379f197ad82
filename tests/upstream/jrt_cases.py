"""JRT-RNN with a prefix and without, under every mixin of transformers.

Depth: 2 layers, prefix linear attention and sliding-window attention; the recurrent mode has no attention at all.
"""

import unittest

from tests.causal_lm_tester import TinyModelSuite

from varidepth import JRTConfig, JRTForCausalLM, JRTForSequenceClassification, JRTModel


class JRTSuite(TinyModelSuite):
    """The common part of all modes."""

    config_class = JRTConfig
    classes = {"base": JRTModel, "causal": JRTForCausalLM, "classify": JRTForSequenceClassification}
    fields = {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "sliding_attention"],
        "feature_dim": 4,
        "prefix_length": 5,
    }


class JRTPrefixTest(JRTSuite, unittest.TestCase):
    pass


class JRTCausalTest(JRTSuite, unittest.TestCase):
    fields = JRTSuite.fields | {"prefix_length": 0}


class JRTRecurrentTest(JRTSuite, unittest.TestCase):
    fields = JRTSuite.fields | {"layer_types": ["conv", "linear_attention"]}
    has_attentions = False
