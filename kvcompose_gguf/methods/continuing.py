"""When a compressed context is continued, and when it is compressed again."""

from __future__ import annotations

from dataclasses import replace

from .base import Method


def choice_of(method: Method | None) -> str:
    """Returns as text the options that decide what a method keeps of a context; empty without a method."""
    return "" if method is None else repr(replace(method, keep_last=0, min_tokens=1, protect_first=0))


def has_grown(n_tokens: int, n_context: int, method: Method | None) -> bool:
    """Returns whether more tokens follow a compressed context than it has. Then everything is compressed again.

    So at most about half of a growing conversation is not compressed.
    """
    return method is not None and n_tokens - n_context - method.keep_last > max(n_context, method.min_tokens)


def is_read_again(n_tokens: int, n_context: int, method: Method | None) -> bool:
    """Returns whether a conversation has grown so much that it is read again from its beginning.

    Every token is read three times at most. A method that ``streams`` reads none again: it composes what is there.
    """
    return method is not None and not method.streams and has_grown(n_tokens, n_context, method)
