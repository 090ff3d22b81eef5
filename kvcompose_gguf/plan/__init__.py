"""The decision: which tokens stay, as pure values."""

from __future__ import annotations

from ..moved import from_folder

__getattr__ = from_folder(__name__)
