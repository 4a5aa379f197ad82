"""varidepth: variable-depth language models for Hugging Face Transformers."""

__version__ = "0.1.0"
