"""Reads and checks arguments; every message names the argument, its value and what is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from types import NoneType
from typing import TypeVar

from ..errors import ConfigError

_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")

Number = TypeVar("Number", int, float)


def parse_bytes(name: str, value: str | int) -> int:
    """The number of bytes that ``value`` means: ``512MB``, ``1.5GiB``, or a plain number of bytes.

    kB, MB, GB and TB are powers of 1000, KiB, MiB, GiB and TiB powers of 1024. Case does not matter. A fraction of a
    byte is cut off.

    Args:
        name: of the argument, for the error.
    Raises:
        ConfigError: ``value`` is not a size.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or match[2].lower() not in _UNITS or (not match[2] and "." in match[1]):
        raise ConfigError(
            f"{name}={value!r} is not a size: give a whole number of bytes, or a number with "
            "kB, MB, GB, TB, KiB, MiB, GiB or TiB, e.g. 512MB or 1.5GiB"
        )
    return int(Fraction(match[1]) * _UNITS[match[2].lower()])


def parse_numbers(name: str, text: str | None, kind: type[Number]) -> tuple[Number, ...] | None:
    """Returns the comma-separated numbers in ``text``, the value of option ``name``.

    Raises:
        ConfigError: an item is not a number of this kind.
    """
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(",")) if text.strip() else ()
    except ValueError as error:
        what = "integers" if kind is int else "numbers"
        raise ConfigError(f"{name}={text!r} is not a comma-separated list of {what}") from error


def check_number(name: str, value: object, *, optional: bool = False) -> None:
    """ConfigError unless ``value`` is a number, or None if that is allowed."""
    kinds = (int, float, NoneType) if optional else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ConfigError(f"{name}={value!r} is not a number")


def check_finite(name: str, value: float | None) -> None:
    """ConfigError unless ``value`` is a number that is neither infinite nor NaN, or None."""
    check_number(name, value, optional=True)
    if value is not None and not math.isfinite(value):
        raise ConfigError(f"{name}={value} is not finite")


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
    if value is not None and not 0 < value < math.inf:
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
