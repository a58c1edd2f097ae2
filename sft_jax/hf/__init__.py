"""Reads and writes Hugging Face model folders and PEFT adapters."""
