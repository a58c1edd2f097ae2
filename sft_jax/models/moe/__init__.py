"""Mixtures of experts: routers, experts and their products."""
