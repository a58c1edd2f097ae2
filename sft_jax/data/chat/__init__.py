"""Encodes conversations as token ids and a loss mask."""
