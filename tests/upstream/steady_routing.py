"""What the suites of the routed architectures share: routing that no rounding can flip, and their configuration.

Routing is steadied. Several tests compare two computations that differ by rounding (half precision, eager against
sdpa, one process against two). With freshly drawn weights every router score lies near its threshold and rounding
decides; the comparison then says nothing about the model. So the initialisation is wrapped: two embedding columns
carry a sign that depends on the token id, and router r reads column r alone, far from its threshold. Depths still
differ from token to token: a third of the tokens leave before the first routed pass, half before the second.
"""

from typing import Any

import torch

from tests import test_modeling_common


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


def steady_initialisation(classes: dict[str, Any]) -> None:
    """A new model and weights that a checkpoint lacks are steadied; weights from a file stay as they are."""
    base = classes["base"]
    construct, initialise = base.__init__, base._init_weights

    @torch.no_grad()
    def construct_steadied(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        for module in self.modules():
            if is_steadied(module) and module.weight.device.type != "meta":
                steady(module)

    @torch.no_grad()
    def initialise_steadied(self: Any, module: torch.nn.Module) -> None:
        initialise(self, module)
        if is_steadied(module) and not getattr(module.weight, "_is_hf_initialized", False):
            steady(module)

    base.__init__ = construct_steadied
    for model_class in classes.values():
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


keep_to_own_fields()
