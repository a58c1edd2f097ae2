"""Proofs that a model was imported or exported right; the only place that compares with torch."""
