"""Model files: find, fetch, identify, and read their chat templates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..moved import from_folder

if TYPE_CHECKING:
    from .known import fetch, names

__all__ = ["fetch", "names"]

__getattr__ = from_folder(__name__, {"fetch": "known", "names": "known"})
