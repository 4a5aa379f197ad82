"""varidepth: variable-depth language models for Hugging Face Transformers.

Importing the package registers its architectures with AutoConfig and AutoModel.
"""

__version__ = "0.1.0"

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from varidepth.configuration.configuration_mor import MoRConfig
from varidepth.conversion.convert import convert
from varidepth.modeling.modeling_mor import MoRForCausalLM, MoRForSequenceClassification, MoRModel


def _register() -> None:
    AutoConfig.register(MoRConfig.model_type, MoRConfig)
    AutoModel.register(MoRConfig, MoRModel)
    AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM)
    AutoModelForSequenceClassification.register(MoRConfig, MoRForSequenceClassification)


_register()

__all__ = ["MoRConfig", "MoRForCausalLM", "MoRForSequenceClassification", "MoRModel", "__version__", "convert"]
