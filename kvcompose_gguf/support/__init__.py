"""Small helpers that know nothing about caches or models."""
