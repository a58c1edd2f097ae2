"""Tokenizes rows in several processes, and caches the result."""
