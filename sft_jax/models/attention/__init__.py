"""Attention within segments: one function, several kernels, and which of them a run uses."""
