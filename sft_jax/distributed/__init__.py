"""Coordination of several processes."""
