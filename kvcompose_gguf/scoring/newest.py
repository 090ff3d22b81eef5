"""Collects the attention that new tokens pay to themselves, in a cache whose older rows may be composites."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..kernels.types import FloatArray
from .collect import Reader


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
    place = min(length + first, max(n_tokens, reader.n_ctx_train - n_piece))  # as Scorer.on_top
    n_used = session.n_rows_used()
    with session.scoring("max", max(n_used), max_bytes):
        with reader.on_top(place - n_tokens), reader.meter.ignored():
            for i in range(0, n_piece, reader.n_batch):
                reader.decode(tokens[first + i : first + min(i + reader.n_batch, n_piece)], place + i)
        scores = session.scores(max(n_used))
    return [np.ascontiguousarray(of_layer[:, n - n_new : n]) for of_layer, n in zip(scores, n_used, strict=True)]
