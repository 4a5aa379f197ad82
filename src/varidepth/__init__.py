"""varidepth: language models whose depth and memory vary per token, for Hugging Face Transformers.

Importing the package registers its architectures with AutoConfig and AutoModel, and with PEFT where that is used.
"""

__version__ = "0.1.0"

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from varidepth.configuration.configuration_jrt import JRTConfig
from varidepth.configuration.configuration_mod import MoDConfig
from varidepth.configuration.configuration_mor import MoRConfig
from varidepth.conversion.convert import convert
from varidepth.modeling.modeling_jrt import JRTForCausalLM, JRTForSequenceClassification, JRTModel
from varidepth.modeling.modeling_mod import MoDForCausalLM, MoDForSequenceClassification, MoDModel
from varidepth.modeling.modeling_mor import MoRForCausalLM, MoRForSequenceClassification, MoRModel
from varidepth.modeling.prefix_linear_attention import prefix_linear_attention
from varidepth.modeling.prefix_mixers import PrefixLinearAttention
from varidepth.training.peft_defaults import register_peft_defaults


def _register() -> None:
    for model in (MoRForCausalLM, MoDForCausalLM, JRTForCausalLM):
        classes: dict[str, Any] = model.remote_classes
        config = classes["AutoConfig"]
        AutoConfig.register(config.model_type, config)
        AutoModel.register(config, classes["AutoModel"])
        AutoModelForCausalLM.register(config, classes["AutoModelForCausalLM"])
        AutoModelForSequenceClassification.register(config, classes["AutoModelForSequenceClassification"])


_register()
register_peft_defaults()

__all__ = [
    "JRTConfig",
    "JRTForCausalLM",
    "JRTForSequenceClassification",
    "JRTModel",
    "MoDConfig",
    "MoDForCausalLM",
    "MoDForSequenceClassification",
    "MoDModel",
    "MoRConfig",
    "MoRForCausalLM",
    "MoRForSequenceClassification",
    "MoRModel",
    "PrefixLinearAttention",
    "__version__",
    "convert",
    "prefix_linear_attention",
]
