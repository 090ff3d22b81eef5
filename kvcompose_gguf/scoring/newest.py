"""Collects the attention that new tokens pay to themselves, in a cache whose older rows may be composites."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..kernels.types import FloatArray
from .pieces import Piece, gap_before
from .reader import Reader, decode_all


def attention_to_newest(
    reader: Reader, tokens: Sequence[int], n_new: int, n_piece: int, length: int, max_bytes: int
) -> list[FloatArray]:
    """Evaluates a piece of the newest tokens again, at the positions that it has in a repeat of the whole context.

    Args:
        tokens: all tokens that the cache stands for.
        n_new: number of newest tokens; each has a row of its own.
        n_piece: number of tokens in the piece, which is taken from the middle of the newest; more than 0.
        length: length of the whole context, of which ``tokens`` may be the beginning.
        max_bytes: limit of the working memory, not counting the scores.
    Returns:
        The largest attention that a token of the piece pays to each new token: for each layer float32
        ``(n_head, n_new)``.
    """
    session, n_tokens = reader.session, len(tokens)
    first = n_tokens - n_new + (n_new - n_piece) // 2
    piece = Piece(first, tokens[first : first + n_piece])
    gap = gap_before(piece, n_tokens, length, reader.n_ctx_train)
    with session.scoring("max", session.state().n_cells_used, max_bytes):
        with reader.on_top(gap), reader.meter.ignored():
            decode_all(reader, piece.tokens, n_tokens + gap)
        scores = session.scores()
    return [np.ascontiguousarray(of_layer[:, -n_new:]) for of_layer in scores]
