"""Continues from a compressed context when the tokenizer merges text across its end.

The tokenizer turns `"...done." + "\\nWhat?"` into tokens with one for `".\\n"`, but the cached context ends with `"."`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

#: number of tokens at the end of the context that a merge may change
MAX_SEAM = 8


def common_prefix(a: Sequence[T], b: Sequence[T]) -> int:
    """Returns how many leading items ``a`` and ``b`` share."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def join(
    context: Sequence[int],
    prompt: Sequence[int],
    piece: Callable[[int], bytes],
    tokenize: Callable[[bytes], Sequence[int]],
) -> list[int] | None:
    """Returns ``prompt`` rewritten to begin with ``context``, if their texts agree and only tokens at the seam differ.

    Args:
        piece: returns the text of a token, ``b""`` for control tokens, which are never merged.
        tokenize: returns the tokens of a text, without BOS and control tokens.
    Returns:
        The context, then the rest of the seam's text tokenized on its own, then the prompt's tokens after it. ``None``:
        the prompt diverges from the context.
    """
    start = common_prefix(context, prompt)
    if start == len(context):
        return list(prompt)
    if len(context) - start > MAX_SEAM:
        return None

    context_pieces = [piece(token) for token in context[start:]]
    wanted = b"".join(context_pieces)
    text = b""
    end = start
    while end < len(prompt) and len(text) < len(wanted):
        part = piece(prompt[end])
        if not part:
            return None
        text += part
        end += 1
    if not all(context_pieces) or not text.startswith(wanted):
        return None

    rest = text[len(wanted) :]
    tokens = list(tokenize(rest)) if rest else []
    pieces = [piece(token) for token in tokens]
    if b"".join(pieces) != rest or not all(pieces):
        return None  # e.g. a tokenizer that puts a space before every text
    return [*context, *tokens, *prompt[end:]]
