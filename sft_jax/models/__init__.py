"""The network: decoder, attention, rope, and the LoRA parameter split."""
