"""MoR in the routing and KV modes that matter, under every mixin of transformers.

Depth: 4 unrolled layers, a prelude, two recursions of one shared layer, and a coda.
"""

import unittest

import torch
from tests.causal_lm_tester import TinyModelSuite
from tests.steady_routing import steady_initialisation
from tests.test_memory_cleanup_mixin import MemoryCleanupMixin
from transformers import AutoModelForCausalLM

from varidepth import MoRConfig, MoRForCausalLM, MoRForSequenceClassification, MoRModel
from varidepth.modeling.cache_naming import CACHE


class MoRSuite(TinyModelSuite):
    """The common part of all modes."""

    config_class = MoRConfig
    classes = {"base": MoRModel, "causal": MoRForCausalLM, "classify": MoRForSequenceClassification}
    depth = {"backbone": "llama", "num_hidden_layers": 4, "num_recursions": 2, "sharing": "middle_cycle"}


steady_initialisation(MoRSuite.classes)


class MoRPlainTest(MoRSuite, unittest.TestCase):
    fields = MoRSuite.depth | {"routing": "none"}


class MoRExpertThresholdTest(MoRSuite, unittest.TestCase):
    fields = MoRSuite.depth | {"routing": "expert_choice", "capacities": [0.7, 0.4]}


class MoRExpertPredictorTest(MoRSuite, unittest.TestCase):
    fields = MoRSuite.depth | {
        "routing": "expert_choice",
        "capacities": [0.7, 0.4],
        "inference_rule": "predictor",
    }


class MoRExpertSharedKvTest(MoRSuite, unittest.TestCase):
    fields = MoRSuite.depth | {"routing": "expert_choice", "kv_mode": "shared"}


class MoRRelaxedTest(MoRSuite, unittest.TestCase):
    """Recursions with low-rank differences and norms of their own."""

    fields = MoRSuite.depth | {"routing": "expert_choice", "recursion_rank": 4, "recursion_norms": True}


class MoRTokenChoiceTest(MoRSuite, unittest.TestCase):
    fields = MoRSuite.depth | {"routing": "token_choice"}


class MoRMemoryTest(MemoryCleanupMixin, unittest.TestCase):
    """Nothing that a model or its cache held survives the clean-up of the memory mixin."""

    def test_model_and_cache_are_released(self) -> None:
        import weakref

        config = MoRConfig(
            **MoRSuite.depth, vocab_size=99, hidden_size=32, intermediate_size=32, num_attention_heads=4
        )
        self.model = AutoModelForCausalLM.from_config(config).eval()
        self.output = self.model.generate(
            torch.arange(3, 9)[None], max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )
        type(self).released = [weakref.ref(self.model), weakref.ref(self.output[CACHE])]

    def tearDown(self) -> None:
        watched = type(self).released
        super().tearDown()
        self.assertEqual([reference() for reference in watched], [None, None])
