"""How much of the cache a scoring pass uses: chunks, and a fraction of the context."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompose_gguf.errors import ContextLengthError
from kvcompose_gguf.scoring.collect import chunk_size
from kvcompose_gguf.scoring.pieces import spread

thorough = settings(deadline=None, derandomize=True, max_examples=100)


#
# sizes
#


@thorough
@given(st.integers(1, 600), st.integers(1, 5_000), st.integers(1, 5_000), st.integers(1, 5_000))
def test_a_chunk_is_as_large_as_asked_for_if_the_query_and_the_free_cells_allow(
    scoring_chunk: int, n_query: int, n_tokens: int, n_free: int
) -> None:
    chunk = chunk_size(scoring_chunk, n_query, n_tokens, n_tokens + n_free)
    assert chunk >= 1
    assert chunk == min(scoring_chunk, n_query, n_free)


@thorough
@given(st.integers(1, 5_000), st.integers(1, 5_000), st.integers(0, 5_000))
def test_no_chunk_size_keeps_the_whole_query_if_it_fits(n_query: int, n_tokens: int, n_more: int) -> None:
    assert chunk_size(None, n_query, n_tokens, n_tokens + n_query + n_more) == n_query


@pytest.mark.parametrize("n_free", [-1, 0, 1, 9])
def test_no_chunk_size_is_refused_if_the_query_does_not_fit(n_free: int) -> None:
    with pytest.raises(ContextLengthError, match=rf"scoring_chunk=None needs 110 cells, n_ctx is {100 + n_free}"):
        chunk_size(None, 10, 100, 100 + n_free)


@pytest.mark.parametrize("n_cells", [99, 100])
def test_a_context_that_leaves_no_cell_free_cannot_be_scored(n_cells: int) -> None:
    with pytest.raises(ContextLengthError, match=f"100 tokens fill n_ctx={n_cells}"):
        chunk_size(512, 10, 100, n_cells)


def test_one_free_cell_is_enough_to_score() -> None:
    assert chunk_size(512, 100, 100, 101) == 1


#
# a fraction of the context
#

PIECE = 64


def flat(places: list[range]) -> list[int]:
    return [place for piece in places for place in piece]


@thorough
@given(st.integers(1, 5_000))
def test_a_fraction_of_one_is_the_whole_context(n_tokens: int) -> None:
    assert flat(spread(n_tokens, 1.0, PIECE)) == list(range(n_tokens))


@thorough
@given(st.integers(1, 5_000), st.floats(0, 1, exclude_min=True))
def test_a_share_is_pieces_of_neighbours_from_the_first_token_to_the_last(n_tokens: int, fraction: float) -> None:
    share = flat(spread(n_tokens, fraction, PIECE))
    assert len(share) <= n_tokens
    assert (np.diff(share) > 0).all(), "a token is taken twice, or out of order"
    if len(share) == n_tokens:
        return
    pieces = np.array(share).reshape(-1, PIECE)
    assert (np.diff(pieces, axis=1) == 1).all()
    assert share[0] == 0
    if len(pieces) > 1:
        assert share[-1] == n_tokens - 1
        assert np.ptp(np.diff(pieces[:, 0])) <= 1, "the pieces are not evenly spread"


@thorough
@given(st.integers(1, 5_000), st.floats(0, 1, exclude_min=True))
def test_a_share_is_the_fraction_asked_for_to_half_a_piece_but_one_piece_at_least(
    n_tokens: int, fraction: float
) -> None:
    n_share = len(flat(spread(n_tokens, fraction, PIECE)))
    assert n_share >= min(PIECE, n_tokens)
    assert n_share == min(PIECE, n_tokens) or abs(n_share - fraction * n_tokens) <= PIECE / 2


@pytest.mark.parametrize(
    ("n_tokens", "fraction", "starts"),
    [
        (640, 0.3, [0, 288, 576]),
        (1000, 0.01, [0]),
        (1000, 0.13, [0, 936]),
        (129, 0.99, [0, 65]),
        (64, 0.5, [0]),
        (65, 1e-9, [0]),
    ],
)
def test_pieces_start_where_they_should(n_tokens: int, fraction: float, starts: list[int]) -> None:
    expected = [token for start in starts for token in range(start, start + 64)]
    assert flat(spread(n_tokens, fraction, 64)) == expected


def test_without_the_end_every_piece_begins_its_part_of_the_context() -> None:
    assert [place.start for place in spread(1000, 0.25, 64, to_end=False)] == [0, 250, 500, 750]
    assert [place.start for place in spread(129, 0.99, 64, to_end=False)] == [0, 64]
    assert spread(128, 0.99, 64, to_end=False) == [range(128)]


@pytest.mark.parametrize("n_tokens", [1, 10, 63])
def test_a_context_shorter_than_a_piece_is_taken_whole(n_tokens: int) -> None:
    assert flat(spread(n_tokens, 0.1, 64)) == list(range(n_tokens))
