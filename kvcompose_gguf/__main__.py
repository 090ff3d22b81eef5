"""``python -m kvcompose_gguf``."""

from .cli.app import main

main()
