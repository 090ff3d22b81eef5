"""``kvcompose demo``: the same questions to a full and to a compressed cache."""
