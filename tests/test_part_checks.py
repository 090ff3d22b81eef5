"""Prompts that are read in parts: a share of every part is evaluated a second time, and shows what is important in it."""

from __future__ import annotations

from typing import Any

import pytest
from support import tiny

from kvcompose_gguf import KVCompose

CONFIG = tiny.GQA
TOKENS = tiny.tokens(CONFIG, 900, seed=21)
OPTIONS: dict[str, Any] = {
    "compression_ratio": 0.6, "chunk": 128, "n_fresh": 16, "min_tokens": 100, "keep_last": 8, "n_sink": 2,
    "spot_check": 0.25,
}  # fmt: skip


def test_a_share_of_every_part_is_read_again_where_it_would_stand_behind_the_whole_prompt(
    make_llama: Any, monkeypatch: pytest.MonkeyPatch, kept: Any
) -> None:
    method = KVCompose(**OPTIONS)
    llama = make_llama(CONFIG, method, n_ctx=4096)
    for _ in range(2):  # these prompts teach
        llama.compress(TOKENS)
        llama.reset()
    pieces, decode = [], llama.context.decode

    def noted(tokens: Any, pos: int) -> None:
        pieces.append((len(tokens), pos, list(tokens) == TOKENS[pos - 900 : pos - 900 + len(tokens)]))
        decode(tokens, pos)

    monkeypatch.setattr(llama.context, "decode", noted)
    llama.compress(TOKENS)
    assert all(is_same for _, _, is_same in pieces)
    assert [pos for _, pos, _ in pieces] == sorted(pos for _, pos, _ in pieces)
    assert pieces[-1][1] > 900 + 800
    assert [n for n, _, _ in pieces[1:-1]].count(24) >= 3  # of 96 tokens: a part and its piece fit into the chunk
    assert sum(n for n, _, _ in pieces) >= 0.2 * 900


@pytest.mark.parametrize("spot_check", [0.25, 1.0])
def test_a_check_of_parts_stays_below_the_ceiling(make_llama: Any, kept: Any, spot_check: float) -> None:
    method = KVCompose(**OPTIONS | {"compression_ratio": None, "n_kept": 128, "spot_check": spot_check})
    llama = make_llama(CONFIG, method, n_ctx=4096, n_batch=64)
    n_bytes, through = [], llama.context.through

    def noted(decode: Any, n_tokens: int) -> None:
        through(decode, n_tokens)
        n_bytes.append(llama.kv_bytes)

    llama.context.through = noted
    for _ in range(4):  # until the model is known, more is repeated
        assert llama.compress(TOKENS).n_kept.sum() == 3 * 128
        llama.reset()
    n_rows_most = max(n_bytes) / sum(layer.n_bytes_row for layer in llama.kv_layers)
    assert n_rows_most <= 512 * 1.02  # llama.cpp's steps of 256 cells


@pytest.mark.parametrize("ratio", [0.1, 0.6])
def test_parts_are_checked_with_as_many_tokens_as_the_context_has_room_for(
    make_llama: Any, kept: Any, ratio: float
) -> None:
    method = KVCompose(**OPTIONS | {"compression_ratio": ratio})
    teacher = make_llama(CONFIG, method, n_ctx=4096)
    for _ in range(2):
        teacher.compress(TOKENS)
        teacher.reset()
    report = make_llama(CONFIG, method, n_ctx=768).compress(TOKENS[:767])
    assert report.n_kept.sum() == int(3 * 767 * (1 - ratio))
    assert report.scoring.startswith("predicted")


def test_a_threshold_evicts_more_than_the_budget_asks_for(make_llama: Any, kept: Any) -> None:
    budget = {"compression_ratio": None, "n_kept": 128}
    llama = make_llama(CONFIG, KVCompose(**OPTIONS | budget), n_ctx=4096)
    for _ in range(2):
        llama.compress(TOKENS)
        llama.reset()
    n_kept = []
    for threshold in (0.0, 1.9, 9.0):
        llama.kv_compressor = KVCompose(**OPTIONS | budget, threshold=threshold, learn=False)
        n_kept.append(int(llama.compress(TOKENS).n_kept.sum()))
        assert llama.context.composed.rows.n_rows.sum() == n_kept[-1]
        assert len(list(zip(range(3), llama.generate(TOKENS[:5], reset=False), strict=False))) == 3
        llama.reset()
    assert n_kept[0] == 3 * 128 > n_kept[1] > n_kept[2] == 3 * 2  # the two sinks
