"""Measuring a network: likelihoods of given text, answers it writes, and what it has forgotten."""
