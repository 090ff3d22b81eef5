"""Kinds of pooling: what becomes of the embedding vectors of a text's tokens."""

from __future__ import annotations

#: their numbers (enum llama_pooling_type), without those of rerankers
POOLING = {"none": 0, "mean": 1, "cls": 2, "last": 3}
