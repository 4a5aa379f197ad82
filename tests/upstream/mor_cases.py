"""MoR in the routing and KV modes that matter, under every mixin of transformers.

Depth: 4 unrolled layers, a prelude, two recursions of one shared layer, and a coda.

Routing is steadied. Several tests compare two computations that differ by rounding (half precision, eager against
sdpa, one process against two). With freshly drawn weights every router score lies near its threshold and rounding
decides; the comparison then says nothing about the model. So the initialisation is wrapped: two embedding columns
carry a sign that depends on the token id, and router r reads column r alone, far from its threshold. Depths still
differ from token to token: a third of the tokens leave before the first recursion, half of the rest before the second.
"""

import unittest
from typing import Any

import torch
from tests.causal_lm_tester import TinyModelSuite
from tests.test_memory_cleanup_mixin import MemoryCleanupMixin
from transformers import AutoModelForCausalLM

from tests import test_modeling_common
from varidepth import MoRConfig, MoRForCausalLM, MoRForSequenceClassification, MoRModel


COLUMN = 0.5  # size of the embedding columns that routers read
LOGIT = 4.0  # size of the router logits that they give


def steady(module: torch.nn.Module) -> None:
    """Sets the columns that routers read, and the routers, as the module docstring says."""
    weight = module.weight
    if isinstance(module, torch.nn.Embedding):
        ids = torch.arange(weight.shape[0], device=weight.device)
        for column, period in enumerate((3, 2)):
            weight[:, column] = torch.where(ids % period == 0, -COLUMN, COLUMN).to(weight.dtype)
        return
    weight.zero_()
    for router in range(weight.shape[0]):
        if weight.shape[1] == 1:
            weight[router, 0, router % 2] = LOGIT / COLUMN
        else:
            weight[router, 0, 0], weight[router, 1, 0] = -LOGIT / COLUMN, LOGIT / COLUMN


def is_steadied(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Embedding) or type(module).__name__ == "RouterBank"


def wrap_initialisation() -> None:
    """A new model and weights that a checkpoint lacks are steadied; weights from a file stay as they are."""
    construct, initialise = MoRModel.__init__, MoRModel._init_weights

    @torch.no_grad()
    def construct_steadied(self: MoRModel, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        for module in self.modules():
            if is_steadied(module) and module.weight.device.type != "meta":
                steady(module)

    @torch.no_grad()
    def initialise_steadied(self: Any, module: torch.nn.Module) -> None:
        initialise(self, module)
        if is_steadied(module) and not getattr(module.weight, "_is_hf_initialized", False):
            steady(module)

    MoRModel.__init__ = construct_steadied
    for model_class in (MoRModel, MoRForCausalLM, MoRForSequenceClassification):
        model_class._init_weights = initialise_steadied


def keep_to_own_fields() -> None:
    """transformers' helper against flaky comparisons sets fields of every family; our config refuses foreign ones."""
    original = test_modeling_common.set_config_for_less_flaky_test

    def set_existing(config: Any) -> None:
        before = set(vars(config))
        original(config)
        for name in set(vars(config)) - before:
            delattr(config, name)

    test_modeling_common.set_config_for_less_flaky_test = set_existing


wrap_initialisation()
keep_to_own_fields()


class MoRSuite(TinyModelSuite):
    """The common part of all modes."""

    config_class = MoRConfig
    classes = {"base": MoRModel, "causal": MoRForCausalLM, "classify": MoRForSequenceClassification}
    depth = {"backbone": "llama", "num_hidden_layers": 4, "num_recursions": 2, "sharing": "middle_cycle"}


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
        type(self).released = [weakref.ref(self.model), weakref.ref(self.output.past_key_values)]

    def tearDown(self) -> None:
        watched = type(self).released
        super().tearDown()
        self.assertEqual([reference() for reference in watched], [None, None])
