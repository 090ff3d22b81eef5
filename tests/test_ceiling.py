"""Budgets that hold while a prompt is read, while an answer is written, and over the turns of a conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.llamas import greedy, last_logits
from support.tiny import NumpyLlama

from kvcompose_gguf import KVCompose, Progress
from kvcompose_gguf.errors import ContextLengthError
from kvcompose_gguf.methods import KeyDiff, KNorm, SnapKV, StreamingLLM
from kvcompose_gguf.plan.rows import Rows

CONFIG = tiny.GQA
TOKENS = tiny.tokens(CONFIG, 900, seed=21)
#: 300 rows a layer on average, composed when there are 64 more
OPTIONS: dict[str, Any] = {
    "n_kept": 300, "chunk": 64, "n_fresh": 16, "n_answer": 40, "min_tokens": 100, "keep_last": 8, "n_sink": 2,
    "allocation": "global",
}  # fmt: skip
RATIO: dict[str, Any] = {**OPTIONS, "n_kept": None, "compression_ratio": 0.6}


class Watched:
    """A Llama on a tiny model that notes every compose, and the largest number of bytes of its cache."""

    def __init__(self, llama: Any) -> None:
        self.llama, self.n_evaluated, self.peak = llama, 0, 0
        self.composed: list[tuple[int, Rows]] = []
        compose, context = llama.context.compose, llama.context

        def noted(plan: Any, choice: str = "", n_room: int = 256, rows: Rows | None = None) -> None:
            self.look()
            compose(plan, choice, n_room, rows)
            self.composed.append((plan.n_tokens, context.composed.rows))

        def through(decode: Any, n_tokens: int) -> None:
            decode()
            self.n_evaluated += n_tokens
            self.look()

        context.compose, context.through = noted, through

    def look(self) -> None:
        self.peak = max(self.peak, self.llama.kv_bytes)

    @property
    def n_rows_most(self) -> float:
        """Rows a layer, on average, that the cache ever had memory for."""
        return self.peak / int(sum(layer.n_bytes_row for layer in self.llama.kv_layers))

    def logits(self) -> np.ndarray:
        """Returns what numpy computes for the last token, with masks in place of every compose."""
        model, tokens, n_done = NumpyLlama(CONFIG), self.llama.context.tokens, 0
        for n_tokens, rows in self.composed:
            model.forward(tokens[n_done:n_tokens])
            model.visible = []
            for positions in rows.positions:
                mask = np.zeros((len(positions), n_tokens), dtype=bool)
                np.put_along_axis(mask, positions.astype(np.int64), True, axis=1)
                model.visible.append(mask)
            n_done = n_tokens
        logits: np.ndarray = model.forward(tokens[n_done:])[0][-1]
        return logits


@pytest.fixture
def watched(make_llama: Any) -> Any:
    return lambda method, **kwargs: Watched(make_llama(CONFIG, method, **({"n_batch": 64, "n_ctx": 2048} | kwargs)))


METHODS = [
    KNorm(**OPTIONS),
    KeyDiff(**OPTIONS),
    StreamingLLM(**OPTIONS),
    KNorm(**RATIO),
    StreamingLLM(
        **RATIO,
    ),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}-{m.n_kept or m.compression_ratio}")
def test_a_long_prompt_is_composed_again_and_again_while_it_is_read(watched: Any, method: Any) -> None:
    seen = watched(method)
    report = seen.llama.compress(TOKENS)
    n_rows = int(method.n_composites(seen.llama.kv_layers, len(TOKENS)) / 3)
    assert report.n_composed == len(seen.composed) > 5
    assert report.n_kept.sum() == n_rows * 3 == sum(seen.llama.session.n_rows_used())
    assert seen.n_evaluated == report.n_prefilled == len(TOKENS)
    # a full cache grows in steps of 256 cells
    assert seen.n_rows_most <= max(n_rows + method.chunk, 512) * 1.02
    assert seen.llama.n_context == len(TOKENS)
    seen.llama.eval(tiny.tokens(CONFIG, 10, seed=3))
    assert np.abs(last_logits(seen.llama) - seen.logits()).max() <= 1e-3


def test_what_is_kept_has_the_best_scores_of_all_that_was_read(watched: Any) -> None:
    """Whatever was evicted on the way has a lower score than what is left, except for the newest tokens on the way."""
    seen = watched(StreamingLLM(**{**OPTIONS, "allocation": "uniform"}))
    seen.llama.compress(TOKENS)
    want = [0, 1, *range(900 - 298, 900)]
    for positions in seen.llama.context.composed.rows.positions:
        assert positions.tolist() == [want] * CONFIG.n_head_kv


@pytest.mark.parametrize("n_prompt", [90, 250, 900])
def test_a_long_answer_stays_below_the_budget_and_a_chunk(watched: Any, n_prompt: Any) -> None:
    seen = watched(KNorm(**OPTIONS))
    said = greedy(seen.llama, TOKENS[:n_prompt], 700)
    assert len(said) == 700
    assert seen.n_rows_most <= 512 * 1.02
    assert sum(seen.llama.session.n_rows_used()) <= 3 * (300 + 64)
    assert seen.llama.context.tokens == [*TOKENS[:n_prompt], *said][: n_prompt + 699]
    assert np.abs(last_logits(seen.llama) - seen.logits()).max() <= 1e-3
    held = seen.llama.context.composed
    newest = np.arange(held.rows.end - 40, held.rows.end)
    for positions in held.rows.positions:  # the newest tokens are in every head, and can be removed
        assert (positions[:, -40:] == newest).all()
    assert len(held.tokens) == held.rows.end - 40
    assert seen.llama.kv_report.n_composed == len(seen.composed)
    assert seen.llama.kv_report.n_tokens == held.rows.end


@pytest.mark.parametrize(("n_kept", "part"), [(300, 64), (40, 40), (10, 16)])
def test_a_part_sees_at_least_as_many_old_rows_as_fit_below_the_ceiling(watched: Any, n_kept: int, part: int) -> None:
    seen = watched(KNorm(**{**OPTIONS, "n_kept": n_kept}))
    seen.llama.compress(TOKENS)
    *on_the_way, last = [(n_tokens, int(rows.n_rows.sum())) for n_tokens, rows in seen.composed]
    assert {n_rows for _, n_rows in on_the_way[:-1]} == {3 * (n_kept + 64 - part)}
    assert set(np.diff([n_tokens for n_tokens, _ in on_the_way])) == {part}
    assert last == (900, 3 * n_kept)


@pytest.mark.parametrize("is_known", [True, False])
def test_the_ceiling_holds_although_nothing_is_kept_of_what_was_learnt(
    watched: Any, is_known: bool, tmp_path: Path
) -> None:
    """``KVCOMPOSE_LEARN=off``: the context knows what its first part taught, but not after a session was loaded."""
    seen = watched(KVCompose(**OPTIONS))
    seen.llama.compress(TOKENS[:600])
    n_before = seen.n_evaluated
    if not is_known:
        seen.llama.save_session(tmp_path / "a.kvc")
        seen.llama.load_session(tmp_path / "a.kvc")
    said = greedy(seen.llama, TOKENS[:640], 300)
    assert sum(seen.llama.session.n_rows_used()) <= 3 * (300 + 64)
    n_context, rows = seen.composed[-1]
    assert n_context > 800
    answers = [head[head > 640] for of_layer in rows.positions for head in of_layer]
    has_gaps = any((np.diff(answer) > 1).any() for answer in answers)
    assert has_gaps == is_known  # else the tokens that are missing are the oldest of the answer
    assert seen.n_evaluated - n_before == 40 + len(said) - 1


@pytest.mark.parametrize("method", [KNorm, KVCompose])
def test_a_batch_larger_than_the_ceiling_can_be_evaluated_at_once(watched: Any, method: Any) -> None:
    seen = watched(method(**{**OPTIONS, "n_kept": 40, "chunk": 600}), n_batch=1024)
    seen.llama.eval(TOKENS)
    assert seen.llama.n_tokens == 900
    assert seen.llama.n_context > 0
    assert seen.n_rows_most <= 640 * 1.02


def test_progress_tells_the_bytes_below_the_ceiling(watched: Any) -> None:
    seen, told = watched(KNorm(**OPTIONS)), list[Progress]()
    seen.llama.compress(TOKENS, told.append)
    assert told[-1].n_done == told[-1].n_total == 900
    assert 0 < told[0].kv_bytes <= max(progress.kv_bytes for progress in told) == seen.peak


def test_a_conversation_reads_only_what_is_new(watched: Any) -> None:
    seen, conversation = watched(KNorm(**OPTIONS)), list(TOKENS[:600])
    for turn in range(12):
        conversation += tiny.tokens(CONFIG, 50, seed=turn)
        before = seen.n_evaluated
        said = greedy(seen.llama, conversation, 30)
        # all but the last token of an answer are evaluated
        n_new = len(conversation) if not turn else 50 + 1
        assert seen.n_evaluated - before == n_new + 29, turn
        conversation += said
    assert seen.llama.context.tokens == conversation[:-1]
    assert np.abs(last_logits(seen.llama) - seen.logits()).max() <= 1e-3
    assert seen.n_rows_most <= 512 * 1.02


def test_a_conversation_that_has_doubled_is_compressed_again_without_reading_it_again(watched: Any) -> None:
    seen, conversation = watched(KNorm(**RATIO)), list(TOKENS[:400])
    greedy(seen.llama, conversation, 4)
    assert seen.llama.n_context == 392
    conversation = seen.llama.context.tokens + tiny.tokens(CONFIG, 500, seed=5)
    before = seen.n_evaluated
    greedy(seen.llama, conversation, 4)
    assert seen.n_evaluated - before == 500 + 3
    n_context = len(conversation) - 8
    assert seen.llama.n_context == n_context
    assert seen.llama.context.composed.rows.n_rows.sum() == int(3 * n_context * 0.4)
    assert np.abs(last_logits(seen.llama) - seen.logits()).max() <= 1e-3


def test_an_answer_can_be_taken_back_as_far_as_its_newest_tokens(watched: Any) -> None:
    seen = watched(KNorm(**OPTIONS))
    said = greedy(seen.llama, TOKENS, 200)
    context = seen.llama.context
    n_context, end = len(context.composed.tokens), context.composed.rows.end
    assert n_context > len(TOKENS)
    other = [*TOKENS, *said][: end - 20] + tiny.tokens(CONFIG, 30, seed=8)
    before = seen.n_evaluated
    greedy(seen.llama, other, 3)
    assert seen.n_evaluated - before == 30 + 2
    assert context.composed.rows.end == end - 20

    # before them, it is read again
    before = seen.n_evaluated
    greedy(seen.llama, [*other[: n_context - 1], 7, 8], 3)
    assert seen.n_evaluated - before == n_context + 1 + 2


@pytest.mark.parametrize(("n_answer", "n_kept"), [(40, 300), (1024, 300), (1024, 100)])
def test_the_newest_tokens_of_an_answer_take_at_most_a_quarter_of_the_budget(
    watched: Any, n_answer: int, n_kept: int
) -> None:
    seen = watched(KNorm(**{**OPTIONS, "n_kept": n_kept, "n_answer": n_answer}))
    greedy(seen.llama, TOKENS, 400)
    composed = seen.llama.context.composed
    assert composed.rows.end - len(composed.tokens) == min(n_answer, n_kept // 4)


def test_a_context_that_lost_its_newest_tokens_can_be_compressed_again(watched: Any) -> None:
    seen = watched(KNorm(**OPTIONS))
    said = greedy(seen.llama, TOKENS, 200)
    context = seen.llama.context
    end = context.composed.rows.end
    shorter = [*TOKENS, *said][: end - 30] + tiny.tokens(CONFIG, 5, seed=8)
    before = seen.n_evaluated
    report = seen.llama.compress(shorter)
    assert seen.n_evaluated - before == 5
    # 30 rows of every head are gone, and do not come back
    assert report.n_kept.sum() == 3 * (300 - 30 + 5)
    assert seen.llama.session.n_rows_used() == report.n_kept.tolist()


def test_a_full_cache_does_not_grow_beyond_its_ceiling_after_it_was_emptied(watched: Any) -> None:
    """llama.cpp's caches grow by a quarter at a time, here from 2,304 to 3,072 cells."""
    seen = watched(KNorm(**{**OPTIONS, "n_kept": 2400, "chunk": 512}), n_ctx=4096)
    tokens = tiny.tokens(CONFIG, 2500, seed=4)
    for _ in range(2):
        seen.llama.reset()
        seen.peak = 0
        for first in range(0, 2500, 50):
            seen.llama.eval(tokens[first : first + 50])
        assert seen.n_rows_most <= (2400 + 512) * 1.02


@pytest.mark.parametrize("method", [KNorm(**OPTIONS), None], ids=["the-same-method", "no-method"])
def test_an_error_between_two_composes_leaves_nothing_that_is_continued(watched: Any, method: Any) -> None:
    seen = watched(KNorm(**OPTIONS))
    through, calls = seen.llama.context.through, []

    def failing(decode: Any, n_tokens: int) -> None:
        calls.append(n_tokens)
        if len(calls) == 9:
            raise MemoryError
        through(decode, n_tokens)

    seen.llama.context.through = failing
    with pytest.raises(MemoryError):
        seen.llama.compress(TOKENS)
    assert seen.composed
    seen.llama.context.through = through
    seen.llama.kv_compressor = method
    del seen.composed[:]
    before = seen.n_evaluated
    assert greedy(seen.llama, [*TOKENS, *TOKENS[:8]], 3)
    assert seen.n_evaluated - before == len(TOKENS) + 8 + 2
    assert np.abs(last_logits(seen.llama) - seen.logits()).max() <= 1e-3


def test_a_method_that_needs_the_whole_prompt_reads_it_as_before(watched: Any) -> None:
    seen = watched(SnapKV(**{**OPTIONS, "window": 16, "n_recent": 0}))
    assert seen.llama.context.ceiling is None
    report = seen.llama.compress(TOKENS)
    assert (report.n_composed, len(seen.composed)) == (1, 1)
    assert seen.n_rows_most >= len(TOKENS)


def test_such_a_method_refuses_a_prompt_that_its_bytes_do_not_hold_and_loses_nothing(watched: Any) -> None:
    row = sum(layer.n_bytes_row for layer in watched(None).llama.kv_layers)
    seen = watched(KNorm(compression_ratio=0.5, min_tokens=100))
    expected = greedy(seen.llama, TOKENS, 5)
    seen.llama.kv_compressor = method = SnapKV(max_kv_bytes=700 * row, chunk=64, window=16, min_tokens=100)
    n_evaluated = seen.n_evaluated
    with pytest.raises(ContextLengthError, match="SnapKV with these options reads all 868 tokens before it evicts any"):
        greedy(seen.llama, TOKENS, 5)
    with pytest.raises(ContextLengthError, match="max_kv_bytes"):
        seen.llama.compress(TOKENS)
    seen.llama.kv_compressor = KNorm(compression_ratio=0.5, min_tokens=100)
    assert greedy(seen.llama, TOKENS, 5) == expected
    assert seen.n_evaluated - n_evaluated <= 36  # what was compressed before is still there
    seen.llama.kv_compressor = method
    assert seen.llama.compress(TOKENS[:764]).n_kept.sum() == 3 * 700  # budget and chunk hold it


def test_predicted_scores_keep_a_ceiling_too(watched: Any, kept: Any) -> None:
    method = KVCompose(**{**OPTIONS, "allocation": None})
    seen = watched(method)
    for _ in range(3):  # the first prompts teach
        seen.llama.compress(TOKENS)
        seen.llama.reset()
    del seen.composed[:]
    seen.peak = 0
    report = seen.llama.compress(TOKENS)
    assert report.scoring.startswith("predicted")
    assert report.n_composed == len(seen.composed) > 5
    assert report.n_kept.sum() == 900
    assert seen.n_rows_most <= 512 * 1.02
    greedy(seen.llama, [*TOKENS, 5, 6, 7], 300)
    assert sum(seen.llama.session.n_rows_used()) <= 3 * (300 + 64)
    assert np.abs(last_logits(seen.llama) - seen.logits()).max() <= 1e-3


def test_the_cpu_computes_fewer_tokens_at_once_for_a_method(make_llama: Any) -> None:
    method = KVCompose(n_kept=300)
    n_ubatch = [
        make_llama(CONFIG, **options).context.n_ubatch
        for options in ({}, {"method": method}, {"method": method, "n_ubatch": 256})
    ]
    assert n_ubatch == [512, 128, 256]
