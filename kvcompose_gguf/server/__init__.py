"""``kvcompose serve``: llama-server's HTTP interface with the compressed cache behind it."""
