"""The pieces of a context that are evaluated a second time, and where they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Piece:
    """Query tokens that are evaluated on top of the context.

    Attributes:
        place: number of positions between the end of the context and the first of these tokens.
        tokens: the tokens.
    """

    place: int
    tokens: Sequence[int]


def spread(n_tokens: int, fraction: float, size: int, to_end: bool = True) -> list[range]:
    """Returns the places of a share of a context: pieces of ``size`` neighbours, evenly from the first token on.

    Args:
        to_end: whether the last of several pieces is the end of the context.
    """
    n_pieces = max(1, round(fraction * n_tokens / size))
    if fraction == 1 or n_pieces * size >= n_tokens:
        return [range(n_tokens)]
    last = n_tokens - size if to_end else n_tokens
    starts = np.linspace(0, last, n_pieces, endpoint=to_end).round().astype(int).tolist()
    return [range(start, start + size) for start in starts]


def pieces_at(places: Sequence[range], tokens: Sequence[int]) -> list[Piece]:
    """Returns the tokens of a context at ``places``."""
    return [Piece(place.start, tokens[place.start : place.stop]) for place in places]


def gap_before(piece: Piece, n_tokens: int, length: int, n_ctx_train: int) -> int:
    """Returns how many positions to skip so that a piece stands where a repeat of the whole context has it.

    Args:
        n_tokens: number of context tokens in the cache.
        length: length of the whole context; less than ``n_tokens``: that is all of it.
        n_ctx_train: number of positions that the model was trained for; the piece comes as near as they allow.
    """
    most = max(0, n_ctx_train - n_tokens - len(piece.tokens))
    return min(max(0, length - n_tokens) + piece.place, most)
