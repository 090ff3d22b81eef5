"""Compares physically smaller caches with masking: both compute the same."""

from __future__ import annotations

import numpy as np
import pytest
from support import tiny
from support.llamas import F16, F32, Q8_0, decode_one_by_one, last_logits
from support.plans import random_plan
from support.tiny import NumpyLlama

from kvcompose_gguf import CompositionPlan, KVCompose

N = 300


def masked(config: tiny.TinyConfig, context: list[int], plan: CompositionPlan) -> NumpyLlama:
    """Returns the numpy model after the context; later tokens cannot see what the plan drops."""
    visible: list[np.ndarray | None] = []
    for cells in plan.rows:
        mask = np.zeros((config.n_head_kv, N), dtype=bool)
        np.put_along_axis(mask, cells, True, axis=1)
        visible.append(mask)
    model = NumpyLlama(config, visible)
    model.forward(context)
    return model


@pytest.mark.parametrize("n_kept", [[40, 200, 7], [300, 1, 150], [64, 64, 64], [0, 300, 20]], ids=str)
@pytest.mark.parametrize(
    ("config", "flash_attn"),
    # flash attention rounds f32 keys and values to f16 (llama-graph.cpp, build_attn_mha): smaller attention outputs there
    [(tiny.GQA, False), (tiny.MHA, False), (tiny.GQA_SOFT, True), (tiny.MHA_SOFT, True)],
    ids=["grouped-query", "multi-head", "grouped-query-flash", "multi-head-flash"],
)
def test_compacted_equals_masked(make_llama, config, flash_attn, n_kept):
    context, after = tiny.tokens(config, N), tiny.tokens(config, 24, seed=1)
    plan = random_plan(N, n_kept, config.n_head_kv)
    want = masked(config, context, plan).forward(after)[0]

    llama = make_llama(config, flash_attn=flash_attn)
    llama.context.prefill(context)
    llama.session.compose(plan)
    got = decode_one_by_one(llama, after)

    error = np.abs(got - want).max()
    print(f"largest difference {error:.2e}")
    assert error <= 1e-3, f"largest difference {error:.2e}"
    full = NumpyLlama(config)
    full.forward(context)
    if min(n_kept) < 200:
        effect = np.abs(full.forward(after)[0] - want).max()
        assert effect > 50 * error, f"the plan changes logits by {effect:.2e} only, the test could not fail"


def test_a_batch_after_composing_equals_single_tokens(make_llama):
    context, after = tiny.tokens(tiny.GQA, N), tiny.tokens(tiny.GQA, 50, seed=2)
    plan = random_plan(N, [50, 100, 10], tiny.GQA.n_head_kv)
    llama = make_llama()
    llama.context.prefill(context)
    llama.session.compose(plan)
    llama.eval(after)
    want = masked(tiny.GQA, context, plan).forward(after)[0][-1]
    assert np.abs(last_logits(llama) - want).max() <= 1e-3


@pytest.mark.parametrize("flash_attn", [False, True], ids=["transposed-v", "flash"])
@pytest.mark.parametrize("n_batch", [1, 64], ids=["token-by-token", "batches"])
def test_the_cache_grows_when_its_room_is_used_up(make_llama, flash_attn, n_batch):
    context, after = tiny.tokens(tiny.GQA, N), tiny.tokens(tiny.GQA, 600, seed=4)
    plan = random_plan(N, [50, 200, 9], tiny.GQA.n_head_kv)
    llama = make_llama(flash_attn=flash_attn, n_batch=64)
    llama.context.prefill(context)
    llama.session.compose(plan, n_room=16)
    rows_before = [llama.kv_cells(il).n_rows for il in range(3)]
    for start in range(0, len(after), n_batch):
        llama.eval(after[start : start + n_batch])
    rows = [llama.kv_cells(il).n_rows for il in range(3)]
    assert all(now > before for now, before in zip(rows, rows_before, strict=True))
    assert np.ptp([llama.kv_cells(il).n_rows_used for il in range(3)]) == 191  # layers stay apart by what they kept
    want = masked(tiny.GQA, context, plan).forward(after)[0][-1]
    error = np.abs(last_logits(llama) - want).max()
    assert error <= (1e-3 if not flash_attn else 1e-2), f"largest difference {error:.2e}"


CACHES = [
    pytest.param({"type_k": F32, "type_v": F32, "flash_attn": False}, id="f32"),
    pytest.param({"type_k": F16, "type_v": F16, "flash_attn": False}, id="f16"),
    pytest.param({"type_k": F16, "type_v": F16, "flash_attn": True}, id="f16-flash"),
    pytest.param({"type_k": Q8_0, "type_v": F16, "flash_attn": False}, id="q8_0-k"),
    pytest.param({"type_k": Q8_0, "type_v": Q8_0, "flash_attn": True}, id="q8_0-flash"),
    pytest.param({"type_k": 2, "type_v": 2, "flash_attn": True}, id="q4_0-flash"),
]


@pytest.mark.parametrize("cache", CACHES)
def test_keeping_everything_changes_no_logits(make_llama, cache):
    context, after = tiny.tokens(tiny.WIDE, N), tiny.tokens(tiny.WIDE, 64, seed=5)
    llama = make_llama(tiny.WIDE, **cache)
    llama.context.prefill(context)
    want = decode_one_by_one(llama, after)
    llama.context.prefill(context)
    llama.session.compose(CompositionPlan.keep_all(N, [2, 2, 2]))
    assert llama.session.state().n_composed == N
    error = np.abs(decode_one_by_one(llama, after) - want).max()
    assert error <= 1e-3, f"largest difference {error:.2e}"


@pytest.mark.parametrize("cache", CACHES)
def test_rows_are_moved_byte_by_byte(make_llama, cache):
    config = tiny.WIDE
    llama = make_llama(config, **cache)
    llama.context.prefill(tiny.tokens(config, N))
    layer = llama.session.layers[1]
    plan = random_plan(N, [30, 77, 120], config.n_head_kv)

    def rows(which: str) -> np.ndarray:
        """(row, head, bytes) of layer 1, whatever the layout."""
        stored = llama.session.stored(1, which)
        n_rows = llama.kv_cells(1).n_rows
        if which == "v" and layer.v_trans:
            return stored.reshape(config.n_head_kv, config.n_embd_head, n_rows, -1).transpose(2, 0, 1, 3).reshape(
                n_rows, config.n_head_kv, -1
            )  # fmt: skip
        return stored.reshape(n_rows, config.n_head_kv, -1)

    before = {which: rows(which).copy() for which in "kv"}
    llama.session.compose(plan)
    for which in "kv":
        after = rows(which)
        for h in range(config.n_head_kv):
            np.testing.assert_array_equal(after[:77, h], before[which][plan.rows[1][h], h])


def test_layers_are_allocated_at_their_own_size(make_llama):
    llama = make_llama(n_ctx=2048, elastic=False)
    full = llama.kv_bytes
    llama.context.prefill(tiny.tokens(tiny.GQA, N))
    llama.session.compose(random_plan(N, [40, 200, 7], tiny.GQA.n_head_kv), n_room=100)
    cells = [llama.kv_cells(il) for il in range(3)]
    assert [c.n_rows_used for c in cells] == [40, 200, 7]
    assert [c.n_rows for c in cells] == [40 + 100, 200 + 100, 7 + 100]
    row = llama.session.layers[0].n_bytes_row
    assert llama.kv_bytes == sum(c.n_bytes for c in cells)
    assert sum(c.n_rows for c in cells) * row <= llama.kv_bytes <= sum(c.n_rows for c in cells) * row + 3 * 64
    assert full >= 3 * 2048 * row
    llama.reset()
    llama.eval(tiny.tokens(tiny.GQA, 10))
    assert llama.kv_bytes == full


def test_positions_go_on_where_the_context_ended(make_llama):
    llama = make_llama(method=KVCompose(n_kept=20, min_tokens=10))
    llama.compress(tiny.tokens(tiny.GQA, N))
    memory = llama._ctx.memory
    from kvcompose_gguf.llama_base import llama_cpp

    assert llama_cpp.llama_memory_seq_pos_max(memory, 0) == N - 1
    llama.eval([5])
    assert llama_cpp.llama_memory_seq_pos_max(memory, 0) == N
