"""varidepth: variable-depth language models for Hugging Face Transformers.

Importing the package registers its architectures with AutoConfig and AutoModel.
"""

__version__ = "0.1.0"

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto import modeling_auto

from varidepth.configuration.configuration_mor import MoRConfig
from varidepth.modeling.modeling_mor import MoRForCausalLM, MoRForSequenceClassification, MoRModel


def _register() -> None:
    AutoConfig.register(MoRConfig.model_type, MoRConfig)
    AutoModel.register(MoRConfig, MoRModel)
    AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM)
    AutoModelForSequenceClassification.register(MoRConfig, MoRForSequenceClassification)
    # transformers also looks class names up by model type: label smoothing in Trainer, pipelines, its test mixins.
    modeling_auto.MODEL_MAPPING_NAMES["mor"] = MoRModel.__name__
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mor"] = MoRForCausalLM.__name__
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["mor"] = MoRForSequenceClassification.__name__


_register()

__all__ = ["MoRConfig", "MoRForCausalLM", "MoRForSequenceClassification", "MoRModel", "__version__"]
