"""Tests variants that change the repeat: chunks that score their own tokens, and what comes before a chunk."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny
from support.arrays import assert_close
from support.caches import Cache, context, payment, words

from kvcompose_gguf import ConfigError
from kvcompose_gguf.methods.kvcompose import KVCompose
from kvcompose_gguf.methods.kvzip import CONTINUATION, INSTRUCTION, KVzip
from kvcompose_gguf.methods.variant import Variant
from kvcompose_gguf.scoring.collect import Attention
from kvcompose_gguf.scoring.requests import AttentionRequest, Repeat

thorough = settings(deadline=None, derandomize=True, max_examples=100)
N = 80
CONTEXT = tiny.tokens(tiny.GQA, N)


def collect(cache: Cache, tokens: list[int], queries: Repeat, agg_task: str = "max") -> Attention:
    request = AttentionRequest(queries, agg_task)  # type: ignore[arg-type]
    return request.collect(cache, tokens, (), words)  # type: ignore[arg-type]


def repeated(tokens: list[int], chunk: int, first_words: list[int], later_words: list[int]) -> list[list[int]]:
    """Returns the tokens of every chunk's decode: a continuation and the 8 tokens before the chunk, or the instruction."""
    chunks = []
    for first in range(0, len(tokens), chunk):
        begin = [*later_words, *tokens[max(0, first - 8) : first]] if first and later_words else first_words
        chunks.append([*begin, *tokens[first : first + chunk]])
    return chunks


def paid_by(queries: list[int], il: int, n_tokens: int, agg_task: str) -> np.ndarray:
    """Returns the attention of these tokens, all after the context, to the context: ``(n_head, n_tokens)``."""
    paid = np.stack([payment(il, Cache.layers[il], token, n_tokens) for token in queries])
    return paid.max(axis=0) if agg_task == "max" else paid.sum(axis=0) / np.float32(len(queries))


@thorough
@given(
    st.integers(1, 60),
    st.one_of(st.none(), st.integers(1, 70)),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(1, 70),
    st.sampled_from(["max", "mean"]),
)
def test_a_token_is_judged_by_its_own_chunk_alone(
    n_tokens: int, chunk: int | None, n_words: int, n_later: int, n_batch: int, agg_task: str
) -> None:
    cache, tokens = Cache(), context(n_tokens)
    cache.n_batch = n_batch
    first_words, later_words = list(range(n_words)), list(range(50, 50 + n_later))
    instruction, continuation = (" ".join(map(str, w)) for w in (first_words, later_words))
    attention = collect(cache, tokens, Repeat(chunk, 1.0, instruction, continuation, own=True), agg_task)
    n_chunk = min(chunk or n_tokens, n_tokens)
    assert attention.chunk == n_chunk
    for il in range(len(Cache.layers)):
        expected = np.full((Cache.layers[il].n_head, n_tokens), np.nan, np.float32)
        for i, queries in enumerate(repeated(tokens, n_chunk, first_words, later_words)):
            mine = slice(i * n_chunk, (i + 1) * n_chunk)
            expected[:, mine] = paid_by(queries, il, n_tokens, agg_task)[:, mine]
        assert attention.layers[il].dtype == np.float32
        np.testing.assert_array_equal(attention.layers[il], expected)
    assert cache.held == tokens
    assert not cache.is_scoring


@pytest.mark.parametrize("agg_task", ["max", "mean"])
def test_one_chunk_of_everything_is_its_own(agg_task: str) -> None:
    own, all_of_it = (collect(Cache(), context(30), Repeat(None, own=o), agg_task) for o in (True, False))
    for got, want in zip(own.layers, all_of_it.layers, strict=True):
        np.testing.assert_array_equal(got, want)
    several = collect(Cache(), context(30), Repeat(7, own=True), agg_task)
    assert any((a != b).any() for a, b in zip(several.layers, all_of_it.layers, strict=True))


@pytest.mark.parametrize("chunk", [16, 20, 33])
@pytest.mark.parametrize("agg_task", ["max", "mean"])
def test_a_models_own_chunks_give_the_attention_of_numpy(make_llama, agg_task, chunk):
    method = Variant(compression_ratio=0.5, own=True, scoring_chunk=chunk, agg_task=agg_task)
    got = make_llama(n_threads=1, n_threads_batch=1).observe(CONTEXT, method).attention
    model = tiny.NumpyLlama(tiny.GQA)
    model.forward(CONTEXT)
    want = [np.empty((4, N)) for _ in range(3)]
    for first in range(0, N, chunk):
        _, attention = model.forward(CONTEXT[first : first + chunk])
        for l, paid in enumerate(attention):
            paid = paid[:, :, first : min(first + chunk, N)]
            want[l][:, first : first + chunk] = paid.max(axis=1) if agg_task == "max" else paid.mean(axis=1)
        model.truncate(N)
    assert_close(np.stack(got), np.stack(want), 1e-4)


@thorough
@given(
    st.integers(1, 60),
    st.integers(1, 70),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 30),
    st.sampled_from(["max", "mean"]),
)
def test_an_instruction_comes_before_every_chunk_and_its_tokens_judge_as_well(
    n_tokens: int, chunk: int, n_words: int, has_continuation: bool, n_more: int, agg_task: str
) -> None:
    """Runs with exactly the cells needed, or a few more."""
    first_words, later_words = list(range(n_words)), [50, 51, 52, 53, 54] if has_continuation else []
    n_cells = n_tokens + max(n_words, len(later_words) + min(8, n_tokens) if later_words else 0) + 1 + n_more
    cache, tokens = Cache(n_cells), context(n_tokens)
    instruction, continuation = (" ".join(map(str, w)) for w in (first_words, later_words))
    attention = collect(cache, tokens, Repeat(chunk, 1.0, instruction, continuation), agg_task)
    assert attention.chunk == min(chunk, n_tokens, 1 + n_more)
    expected = repeated(tokens, attention.chunk, first_words, later_words)
    assert cache.of_kind("decode", "remove") == list(
        itertools.chain(*([("decode", queries, n_tokens), ("remove", n_tokens)] for queries in expected))
    )
    for il in range(len(Cache.layers)):
        want = paid_by(list(itertools.chain(*expected)), il, n_tokens, agg_task)
        np.testing.assert_array_equal(attention.layers[il], want)


def test_kvcompose_asks_with_its_instruction_before_every_chunk():
    method = KVCompose(compression_ratio=0.5, instruction="7 8", scoring_chunk=4, agg_task="mean", in_place=False)
    cache, tokens = Cache(), context(10)
    assert method.attention_request is not None
    attention = method.attention_request.collect(cache, tokens, (), words)  # type: ignore[arg-type]
    decoded = [[7, 8, *tokens[:4]], [7, 8, *tokens[4:8]], [7, 8, *tokens[8:]]]
    assert cache.of_kind("decode") == [("decode", queries, 10) for queries in decoded]
    for il in range(2):
        np.testing.assert_array_equal(attention.layers[il], paid_by([*itertools.chain(*decoded)], il, 10, "mean"))
    with pytest.raises(ConfigError, match="needs scoring='repeat'"):
        KVCompose(compression_ratio=0.5, instruction="7 8", scoring="window")


def test_a_continuation_quotes_the_eight_tokens_before_its_chunk():
    cache, tokens = Cache(), context(40)
    queries = KVzip(compression_ratio=0.5, scoring_chunk=15).attention_request.queries
    assert isinstance(queries, Repeat)
    known = {INSTRUCTION: [1, 2], CONTINUATION: [3, 4, 5]}
    AttentionRequest(queries).collect(cache, tokens, (), known.__getitem__)  # type: ignore[arg-type]
    assert [event[1] for event in cache.of_kind("decode")] == [
        [1, 2, *tokens[:15]],
        [3, 4, 5, *tokens[7:15], *tokens[15:30]],
        [3, 4, 5, *tokens[22:30], *tokens[30:]],
    ]
