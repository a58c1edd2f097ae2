"""The model: decoder, attention, rotary embedding, quantization, and the split into trainable and frozen parameters."""
