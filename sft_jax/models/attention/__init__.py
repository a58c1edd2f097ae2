"""Attention within segments: one function and several backends."""
