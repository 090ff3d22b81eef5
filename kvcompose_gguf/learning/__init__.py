"""Teaches the prediction of a model's scores; finds its retrieval heads and eviction errors."""
