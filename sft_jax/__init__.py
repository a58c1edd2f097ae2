"""Supervised fine-tuning of language models in JAX: a Hugging Face model in, a tuned Hugging Face model out."""

__version__ = "0.1.0"
