"""A run: prepare, start, loop, finish."""
