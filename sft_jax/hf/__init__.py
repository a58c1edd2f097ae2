"""Hugging Face folders: configs, tensor names, reading, writing, PEFT adapters."""
