"""Composes a cache that is composed already: it answers as masked attention, whatever was kept before."""

from __future__ import annotations

import numpy as np
import pytest
from support import tiny
from support.llamas import F16, F32, Q8_0, decode_one_by_one, last_logits
from support.tiny import NumpyLlama

from kvcompose_gguf import CompositionPlan, ConfigError, StateError
from kvcompose_gguf.plan.rows import Rows

CHUNK = 40
N_COMPOSES = 10


def new_rows(config: tiny.TinyConfig, first: int, n: int) -> Rows:
    return Rows.of_tokens([np.zeros((config.n_head_kv, n), np.float32)] * config.n_layer, first)


def random_choice(rows: Rows, n_tokens: int, n_kept: list[int], rng: np.random.Generator, n_tail: int = 0) -> CompositionPlan:  # fmt: skip
    """Returns a plan in which every head keeps its own random rows, and the last ``n_tail``."""
    layers = []
    for positions, n in zip(rows.positions, n_kept, strict=True):
        n_rows = positions.shape[1]
        tail = np.arange(n_rows - n_tail, n_rows)
        heads = [np.sort(rng.choice(n_rows - n_tail, min(n, n_rows) - n_tail, replace=False)) for _ in positions]
        layers.append(np.stack([np.concatenate([head, tail]) for head in heads]).astype(np.int32))
    return CompositionPlan(n_tokens, tuple(layers), tuple(rows.n_rows), n_tail)


def masks(rows: Rows, n_tokens: int) -> list[np.ndarray | None]:
    """Returns which of the tokens each head holds, for each layer bool ``(n_head_kv, n_tokens)``."""
    out: list[np.ndarray | None] = []
    for positions in rows.positions:
        mask = np.zeros((len(positions), n_tokens), dtype=bool)
        np.put_along_axis(mask, positions.astype(np.int64), True, axis=1)
        out.append(mask)
    return out


@pytest.mark.parametrize(
    ("cache", "tolerance"),
    [
        pytest.param({"type_k": F32, "type_v": F32, "flash_attn": False}, 1e-3, id="f32-transposed-v"),
        pytest.param({"type_k": F16, "type_v": F16, "flash_attn": False}, 1e-3, id="f16-transposed-v"),
        pytest.param({"type_k": F16, "type_v": F16, "flash_attn": True}, 1e-3, id="f16-flash"),
    ],
)
def test_ten_composes_in_a_row_equal_masked_attention(make_llama, cache, tolerance):
    config, rng = tiny.GQA_SOFT, np.random.default_rng(1)
    llama, model = make_llama(config, n_ctx=1024, **cache), NumpyLlama(config)
    rows, n_tokens = new_rows(config, 0, 0), 0
    for number in range(N_COMPOSES):
        chunk = tiny.tokens(config, CHUNK, seed=number)
        llama.eval(chunk)
        model.forward(chunk)
        rows, n_tokens = rows.followed_by(new_rows(config, n_tokens, CHUNK)), n_tokens + CHUNK
        # the largest layer is another one each time, so layers grow and shrink
        n_kept = np.roll([50, 20, 7], number).tolist()
        plan = random_choice(rows, n_tokens, n_kept, rng)
        llama.context.compose(plan, n_room=16 if number % 2 else CHUNK, rows=rows)
        rows = rows.kept(plan)
        model.visible = masks(rows, n_tokens)
        assert llama.session.n_rows_used() == rows.n_rows.tolist()
        assert llama.context.composed.rows.end == llama.n_context == n_tokens
    after = tiny.tokens(config, 24, seed=99)
    got, want = decode_one_by_one(llama, after), model.forward(after)[0]
    error = np.abs(got - want).max()
    assert error <= tolerance, f"largest difference {error:.2e}"
    full = NumpyLlama(config)
    full.forward([token for number in range(N_COMPOSES) for token in tiny.tokens(config, CHUNK, seed=number)])
    effect = np.abs(full.forward(after)[0] - want).max()
    assert effect > 20 * error, f"eviction changes logits by {effect:.2e} only, the test could not fail"


def test_the_tail_stays_plain_tokens_that_can_be_removed(make_llama):
    config, rng = tiny.GQA, np.random.default_rng(2)
    llama, model = make_llama(), NumpyLlama(config)
    tokens = tiny.tokens(config, 120)
    llama.eval(tokens)
    model.forward(tokens)
    rows = new_rows(config, 0, 120)
    plan = random_choice(rows, 120, [60, 40, 31], rng, n_tail=30)
    llama.context.compose(plan, rows=rows)
    assert (llama.n_context, llama.n_tokens) == (90, 120)
    with pytest.raises(StateError, match="not in"):
        llama.truncate(89)

    llama.truncate(100)
    rows = rows.kept(plan).until(100)
    assert llama.context.composed.rows.n_rows.tolist() == rows.n_rows.tolist() == [40, 20, 11]
    model.visible = masks(rows, 100)
    model.truncate(100)
    after = tiny.tokens(config, 20, seed=3)
    llama.eval(after)
    want = model.forward(after)[0][-1]
    assert np.abs(last_logits(llama) - want).max() <= 1e-3

    # and again, with other tokens behind
    rows = rows.followed_by(new_rows(config, 100, 20))
    again = random_choice(rows, 120, [20, 20, 20], rng, n_tail=5)
    llama.context.compose(again, rows=rows)
    model.visible = masks(rows.kept(again), 120)
    llama.eval(after)
    assert np.abs(last_logits(llama) - model.forward(after)[0][-1]).max() <= 1e-3


def test_a_plan_for_other_rows_is_refused_and_changes_nothing(make_llama):
    llama = make_llama()
    llama.eval(tiny.tokens(tiny.GQA, 100))
    rows = new_rows(tiny.GQA, 0, 100)
    plan = random_choice(rows, 100, [50, 40, 30], np.random.default_rng(4), n_tail=10)
    llama.context.compose(plan, rows=rows)
    with pytest.raises(ConfigError, match="rows"):
        llama.context.compose(plan, rows=rows.kept(plan))
    with pytest.raises(StateError, match="compressed already"):
        llama.context.compose(plan)
    with pytest.raises(ConfigError, match=r"n_kept\[0\] = 100 of 50 rows"):
        llama.session.compose(CompositionPlan.keep_all(100, [2, 2, 2]))
    held = rows.kept(plan)
    longer = random_choice(held, 100, [20, 20, 20], np.random.default_rng(5), n_tail=11)
    with pytest.raises(StateError, match="the last 11 tokens are not plain tokens: 90 of 100 are composed"):
        llama.context.compose(longer, rows=held)
    assert llama.session.n_rows_used() == [50, 40, 30]
    assert (llama.n_context, llama.n_tokens) == (90, 100)


@pytest.mark.parametrize("cache", [{"type_k": Q8_0, "type_v": Q8_0}, {"type_k": 2, "type_v": 2}], ids=["q8_0", "q4_0"])
def test_quantized_rows_are_moved_byte_by_byte_each_time(make_llama, cache):
    config, rng = tiny.WIDE, np.random.default_rng(6)
    llama = make_llama(config, flash_attn=True, **cache)

    def stored(which: str, l: int) -> np.ndarray:
        n_rows = llama.kv_cells(l).n_rows
        return llama.session.stored(l, which).reshape(n_rows, config.n_head_kv, -1).copy()

    rows, n_tokens = new_rows(config, 0, 0), 0
    for number in range(4):
        llama.eval(tiny.tokens(config, 30, seed=number))
        rows, n_tokens = rows.followed_by(new_rows(config, n_tokens, 30)), n_tokens + 30
        plan = random_choice(rows, n_tokens, np.roll([40, 9, 20], number).tolist(), rng)
        before = {(which, l): stored(which, l) for which in "kv" for l in range(config.n_layer)}
        llama.context.compose(plan, rows=rows)
        for (which, l), old in before.items():
            new, kept = stored(which, l), plan.rows[l]
            for h, head in enumerate(kept):
                np.testing.assert_array_equal(new[: len(head), h], old[head, h])
        rows = rows.kept(plan)


def test_a_session_saved_between_two_composes_goes_on_bit_for_bit(make_llama, tmp_path):
    config, rng = tiny.GQA, np.random.default_rng(7)
    llama, other = make_llama(), make_llama()
    llama.eval(tiny.tokens(config, 90))
    rows = Rows.of_tokens([rng.random((2, 90), np.float32) for _ in range(3)])
    plan = random_choice(rows, 90, [50, 30, 20], rng, n_tail=10)
    llama.context.compose(plan, rows=rows)
    llama.save_session(tmp_path / "a.kvc")
    other.load_session(tmp_path / "a.kvc")
    results = []
    for each in (llama, other):
        held = each.context.composed.rows
        assert (each.n_context, each.n_tokens, held.end) == (80, 90, 90)
        each.eval(tiny.tokens(config, 20, seed=1))
        held = held.followed_by(new_rows(config, 90, 20))
        each.context.compose(random_choice(held, 110, [30, 30, 30], np.random.default_rng(8)), rows=held)
        results.append((decode_one_by_one(each, tiny.tokens(config, 8, seed=2)), each.context.composed.rows))
    (logits, mine), (theirs, same) = results
    np.testing.assert_array_equal(logits, theirs)
    for a, b in zip((*mine.positions, *mine.scores), (*same.positions, *same.scores), strict=True):
        np.testing.assert_array_equal(a, b)
