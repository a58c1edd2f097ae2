"""Evaluates a model: likelihood of held-out text, accuracy of generated answers, and forgetting."""
