"""MoD with whole blocks or their attention routed, under every mixin of transformers.

Depth: 2 layers, the first dense, the second routed.
"""

import unittest

from tests.causal_lm_tester import TinyModelSuite
from tests.steady_routing import steady_initialisation

from varidepth import MoDConfig, MoDForCausalLM, MoDForSequenceClassification, MoDModel


class MoDSuite(TinyModelSuite):
    """The common part of all modes."""

    config_class = MoDConfig
    classes = {"base": MoDModel, "causal": MoDForCausalLM, "classify": MoDForSequenceClassification}
    depth = {"backbone": "llama", "num_hidden_layers": 2, "capacity": 0.4}


steady_initialisation(MoDSuite.classes)


class MoDBlockTest(MoDSuite, unittest.TestCase):
    fields = MoDSuite.depth | {"inference_rule": "predictor"}


class MoDAttentionTest(MoDSuite, unittest.TestCase):
    fields = MoDSuite.depth | {"routing_unit": "attention", "gate": "one_plus_tanh"}
