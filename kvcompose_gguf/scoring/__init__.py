"""From queries to evidence: what a method asks for, and how it is collected."""

from __future__ import annotations

from ..moved import from_folder

__getattr__ = from_folder(__name__)
