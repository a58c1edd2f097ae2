"""Predicts the memory and speed of a training step on any topology by ahead-of-time compilation."""
