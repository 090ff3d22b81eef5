"""``kvcompose serve``: llama-server's HTTP interface on compressed KV caches."""
