"""varidepth: variable-depth language models for Hugging Face Transformers.

Importing the package registers its architectures with AutoConfig and AutoModel.
"""

__version__ = "0.1.0"

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from varidepth.configuration.configuration_mod import MoDConfig
from varidepth.configuration.configuration_mor import MoRConfig
from varidepth.conversion.convert import convert
from varidepth.modeling.modeling_mod import MoDForCausalLM, MoDForSequenceClassification, MoDModel
from varidepth.modeling.modeling_mor import MoRForCausalLM, MoRForSequenceClassification, MoRModel


def _register() -> None:
    for model in (MoRForCausalLM, MoDForCausalLM):
        classes: dict[str, Any] = model.remote_classes
        config = classes["AutoConfig"]
        AutoConfig.register(config.model_type, config)
        AutoModel.register(config, classes["AutoModel"])
        AutoModelForCausalLM.register(config, classes["AutoModelForCausalLM"])
        AutoModelForSequenceClassification.register(config, classes["AutoModelForSequenceClassification"])


_register()

__all__ = [
    "MoDConfig",
    "MoDForCausalLM",
    "MoDForSequenceClassification",
    "MoDModel",
    "MoRConfig",
    "MoRForCausalLM",
    "MoRForSequenceClassification",
    "MoRModel",
    "__version__",
    "convert",
]
