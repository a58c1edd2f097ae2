"""Rows to examples, in several processes and once only."""
