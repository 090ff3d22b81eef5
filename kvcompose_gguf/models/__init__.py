"""Model files: find, fetch, identify, and read their chat templates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..moved import from_folder

if TYPE_CHECKING:
    from .known import fetch, names

__all__ = ["fetch", "names"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import known

        return getattr(known, name)
    return from_folder(__name__)(name)
