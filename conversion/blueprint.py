"""Everything about a new checkpoint before its first byte is written, the same for all architectures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from ..modeling.modeling_jrt import JRTPreTrainedModel
from ..modeling.routed_model import RoutedPreTrainedModel
from .checkpoint_writer import TargetTensor
from .errors import ConversionError
from .plan import ConversionPlan
from .recipe import Recipe


AnyConfig = TypeVar("AnyConfig", bound=PreTrainedConfig)
AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)


@dataclass(frozen=True)
class Blueprint:
    """
    Attributes:
        model: the new model, without values (on the meta device).
        plan: what becomes what.
        recipe: the recipe with every choice made, which makes the same checkpoint again.
        targets: its tensors.
    """

    model: RoutedPreTrainedModel | JRTPreTrainedModel
    plan: ConversionPlan
    recipe: Recipe
    targets: list[TargetTensor]

    def check_targets(self) -> None:
        """Compares the tensors to be written with what the new model holds, so that none is left random.

        Raises:
            ConversionError: at the first difference.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        if self.model.config.tie_word_embeddings:
            expected.pop("lm_head.weight", None)
        planned = {target.name: target.shape for target in self.targets}
        for name in [*expected, *planned]:
            if planned.get(name) != expected.get(name):
                raise ConversionError(
                    f"The tensor {name} would have the shape {_shape(planned.get(name))}, but the new model needs "
                    f"{_shape(expected.get(name))}; the weights and config.json of the source are of different models."
                )


def make_config(build: Callable[[], AnyConfig]) -> AnyConfig:
    """Builds a configuration and turns what it refuses into one sentence.

    Raises:
        ConversionError: if a field has a wrong type or value.
    """
    try:
        return build()
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConversionError(" ".join(str(error).split())) from error


def empty_model(model_class: type[AnyModel], config: PreTrainedConfig) -> AnyModel:
    """The model of a configuration on the meta device, for names, shapes and types.

    Raises:
        ConversionError: if the configuration has sizes of which no model can be built.
    """
    try:
        with torch.device("meta"):
            return model_class(config)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ConversionError(
            f"No model can be built of the configuration ({' '.join(str(error).split())}); check the sizes in "
            "config.json."
        ) from error


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))
