"""``python -m kvcompose_gguf``."""

from .cli.app import main

if __name__ == "__main__":
    main()
