"""Generating with a network: sampling, and decoding with a cache of keys and values."""
