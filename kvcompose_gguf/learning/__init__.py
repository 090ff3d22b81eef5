"""Measures a model: fits the surrogate, finds retrieval heads and eviction errors."""
