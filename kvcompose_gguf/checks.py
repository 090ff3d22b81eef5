"""Checks of arguments; every message names the argument, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType

import numpy as np

from .errors import ConfigError


def check_number(name: str, value: object, *, optional: bool = False) -> None:
    """ConfigError unless ``value`` is a number, or None if that is allowed."""
    kinds = (int, float, NoneType) if optional else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ConfigError(f"{name}={value!r} is not a number")


def check_integer(name: str, value: object, *, optional: bool = False) -> None:
    """ConfigError unless ``value`` is an integer, or None if that is allowed."""
    kinds = (int, NoneType) if optional else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ConfigError(f"{name}={value!r} is not an integer")


def check_flag(name: str, value: object) -> None:
    """ConfigError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is neither True nor False")


def check_positive(name: str, value: float | None) -> None:
    """ConfigError unless ``value`` is positive and finite, or None."""
    if value is not None and not 0 < value < np.inf:
        raise ConfigError(f"{name}={value} is not positive and finite")


def check_odd(name: str, value: int) -> None:
    """ConfigError unless ``value`` is an odd positive integer."""
    check_integer(name, value)
    check_positive(name, value)
    if value % 2 == 0:
        raise ConfigError(f"{name}={value} is not odd")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """ConfigError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is none of {', '.join(map(repr, choices))}")
