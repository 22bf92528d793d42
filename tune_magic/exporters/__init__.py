"""Tuned models in formats other programs read."""
