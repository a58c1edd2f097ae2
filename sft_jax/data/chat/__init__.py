"""Conversations to ids and mask, made by one call."""
