"""Slots, their queue and their generations; knows nothing about HTTP."""
