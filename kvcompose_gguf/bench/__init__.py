"""``kvcompose bench``: time and memory over the context size."""

from __future__ import annotations

from ..moved import from_folder

__getattr__ = from_folder(__name__)
