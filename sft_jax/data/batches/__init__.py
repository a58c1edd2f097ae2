"""Packs examples into sequences and builds batches."""
