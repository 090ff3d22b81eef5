"""``kvcompose bench``: time and memory over the context size."""
