"""``python -m kvcompose_gguf``."""

from .cli import main

main()
