"""Checks that the C API answers bad input with a status and a sentence, changes nothing, and never aborts."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from support import tiny
from support.llamas import last_logits

from kvcompose_gguf import CompositionPlan, ConfigError, KVCompose, StateError, UnsupportedError
from kvcompose_gguf.kernels.compose import gather_function
from kvcompose_gguf.llama_base import llama_cpp
from kvcompose_gguf.native import bindings
from kvcompose_gguf.native.session import KVSession

N = 300


@pytest.fixture
def llama(make_llama):
    llama = make_llama()
    llama.context.prefill(tiny.tokens(tiny.GQA, N))
    return llama


@pytest.fixture
def lib():
    return bindings.declare(llama_cpp.llama_cpp._lib)


def compose(lib, llama, n_tokens=N, n_kept=(4, 4, 4), rows=None, n_total=None, gather=None, n_tail=0) -> int:
    kept = np.array(n_kept, dtype=np.uint32)
    if rows is None:
        rows = np.concatenate([np.tile(np.arange(n, dtype=np.int32), 2) for n in n_kept])
    rows = np.ascontiguousarray(rows, dtype=np.int32)
    return lib.llama_kvc_compose(
        ctypes.cast(llama.ctx, ctypes.c_void_p),
        n_tokens,
        n_tail,
        len(kept),
        kept.ctypes.data_as(bindings.c_uint32_p),
        rows.ctypes.data_as(bindings.c_int32_p),
        rows.size if n_total is None else n_total,
        16,
        gather_function().address if gather is None else gather,  # type: ignore[attr-defined]
    )


ASCENDING = np.tile(np.arange(4), 6)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ({"n_kept": (4, 4)}, bindings.ERR_ARGUMENT, "3 layers"),
        ({"n_kept": (4, N + 1, 4)}, bindings.ERR_ARGUMENT, "of 300 rows"),
        ({"n_kept": (0, 0, 0)}, bindings.ERR_ARGUMENT, "nothing to keep"),
        ({"n_tokens": 0}, bindings.ERR_ARGUMENT, "nothing to keep"),
        ({"n_tokens": N - 1}, bindings.ERR_STATE, "300 tokens"),
        ({"rows": np.where(ASCENDING == 3, N, ASCENDING)}, bindings.ERR_ARGUMENT, "not in [0, 300)"),
        ({"rows": np.where(ASCENDING == 0, -1, ASCENDING)}, bindings.ERR_ARGUMENT, "not in [0, 300)"),
        ({"rows": ASCENDING[::-1]}, bindings.ERR_ARGUMENT, "not ascending"),
        ({"rows": np.zeros(24)}, bindings.ERR_ARGUMENT, "not ascending"),
        ({"n_total": 23}, bindings.ERR_ARGUMENT, "23 entries"),
        ({"rows": np.zeros(25), "n_kept": (4, 4, 4)}, bindings.ERR_ARGUMENT, "ascending"),
        ({"rows": np.append(ASCENDING, 0)}, bindings.ERR_ARGUMENT, "25 entries"),
        ({"gather": 0}, bindings.ERR_ARGUMENT, "NULL"),
        ({"n_tail": N}, bindings.ERR_ARGUMENT, "nothing to compose"),
        ({"n_tail": 5}, bindings.ERR_ARGUMENT, "with the last 5"),
        ({"n_tail": 2}, bindings.ERR_ARGUMENT, "head 0 does not keep its last 2 rows"),
    ],
)
def test_a_bad_compose_is_refused_and_changes_nothing(lib, llama, arguments, status, words):
    before = llama.session.state()
    assert compose(lib, llama, **arguments) == status
    assert words in lib.llama_kvc_last_error().decode()
    assert llama.session.state() == before
    llama.eval([7])
    want = tiny.NumpyLlama(tiny.GQA).forward([*tiny.tokens(tiny.GQA, N), 7])[0][-1]
    assert np.abs(last_logits(llama) - want).max() <= 1e-3


def test_null_and_wrong_sizes_are_arguments_too(lib, llama):
    ctx = ctypes.cast(llama.ctx, ctypes.c_void_p)
    info = bindings.CacheInfo()
    assert lib.llama_kvc_supported(None) == bindings.ERR_ARGUMENT
    assert lib.llama_kvc_get_cache(ctx, None, ctypes.sizeof(info)) == bindings.ERR_ARGUMENT
    assert lib.llama_kvc_get_cache(ctx, ctypes.byref(info), 4) == bindings.ERR_ARGUMENT
    assert lib.llama_kvc_get_layer(ctx, 99, ctypes.byref(bindings.LayerInfo()), 4) == bindings.ERR_ARGUMENT
    assert lib.llama_kvc_scores_begin(ctx, 5, 10, 1) == bindings.ERR_ARGUMENT
    assert lib.llama_kvc_scores_begin(ctx, 0, 0, 1) == bindings.ERR_ARGUMENT
    assert lib.llama_kvc_scores_begin(ctx, 0, 100000, 1) == bindings.ERR_ARGUMENT
    assert lib.llama_kvc_scores_get(ctx, 0, None, 0) == bindings.ERR_STATE
    assert lib.llama_kvc_scores_n_rows(ctx, 0, None) == bindings.ERR_STATE
    assert lib.llama_kvc_get_tensor(ctx, 0, 0, None, 0, 8) == bindings.ERR_ARGUMENT
    buffer = ctypes.create_string_buffer(8)
    assert lib.llama_kvc_get_tensor(ctx, 0, 1, buffer, 2**63, 2**63) == bindings.ERR_ARGUMENT


def test_scoring_twice_and_composing_while_scoring_are_refused(lib, llama):
    session = llama.session
    plan = CompositionPlan.keep_all(N, [2, 2, 2])
    with (
        session.scoring("max", N, 1 << 20),
        pytest.raises(StateError, match="on already"),
        session.scoring("max", N, 1 << 20),
    ):
        pass
    with session.scoring("max", N, 1 << 20), pytest.raises(StateError, match="scoring is on"):
        session.compose(plan)


@pytest.mark.parametrize("n_room", [1, 2**31, 2**32 - 300, 2**32 - 1])
def test_any_room_fits_the_context(llama, n_room):
    llama.session.compose(CompositionPlan(N, (np.zeros((2, 1), np.int32),) * 3), n_room)
    assert 2 <= llama.kv_cells(0).n_rows <= llama.n_ctx()
    llama.eval([7])


def test_a_plan_for_another_model_is_refused(llama):
    with pytest.raises(ConfigError, match="KV heads"):
        llama.session.compose(CompositionPlan.keep_all(N, [4, 4, 4]))


def test_tokens_inside_of_the_compressed_span_cannot_be_removed(llama):
    memory = llama._ctx.memory
    llama.session.compose(CompositionPlan(N, (np.zeros((2, 1), np.int32),) * 3))
    llama.eval(tiny.tokens(tiny.GQA, 20, seed=1))
    remove = llama_cpp.llama_memory_seq_rm
    assert not remove(memory, 0, N - 1, -1)
    assert not remove(memory, 0, 10, -1)
    assert not remove(memory, 0, N - 1, N + 5)
    assert llama.session.state().n_cells_used == 1 + 20
    assert remove(memory, 0, N + 10, -1)
    assert llama.session.state().n_cells_used == 1 + 10
    assert remove(memory, 0, N, -1)
    assert llama.session.state().n_cells_used == 1
    assert remove(memory, 0, -1, -1)
    assert llama.session.state().n_cells_used == 0


def test_shifting_dividing_and_copying_a_compressed_cache_do_nothing(llama):
    memory = llama._ctx.memory
    assert llama_cpp.llama_memory_can_shift(memory)
    llama.session.compose(CompositionPlan.keep_all(N, [2, 2, 2]))
    assert not llama_cpp.llama_memory_can_shift(memory)
    llama_cpp.llama_memory_seq_add(memory, 0, 10, -1, -10)
    llama_cpp.llama_memory_seq_div(memory, 0, 10, -1, 2)
    llama_cpp.llama_memory_seq_cp(memory, 0, 1, -1, -1)
    assert llama_cpp.llama_memory_seq_pos_max(memory, 0) == N - 1
    llama.eval([7])
    want = tiny.NumpyLlama(tiny.GQA).forward([*tiny.tokens(tiny.GQA, N), 7])[0][-1]
    assert np.abs(last_logits(llama) - want).max() <= 1e-3


def test_loading_a_full_state_restores_full_layers(llama):
    state = llama.save_state()
    full = llama.kv_bytes
    llama.session.compose(CompositionPlan(N, (np.zeros((2, 1), np.int32),) * 3))
    assert llama_cpp.llama_state_seq_get_size(llama.ctx, 0) == 0  # saved as a whole only
    assert llama.kv_bytes < full
    llama.load_state(state)
    assert [llama.kv_cells(il).n_rows for il in range(3)] == [512] * 3  # N tokens, rounded up
    assert llama.session.state().n_composed == 0
    llama.eval([7])
    want = tiny.NumpyLlama(tiny.GQA).forward([*tiny.tokens(tiny.GQA, N), 7])[0][-1]
    assert np.abs(last_logits(llama) - want).max() <= 1e-3


def test_contexts_that_cannot_be_compressed_are_named(make_llama):
    with pytest.raises(UnsupportedError, match="embeddings"):
        make_llama(method=KVCompose(n_kept=10), embedding=True)
    plain = make_llama(embedding=True)
    with pytest.raises(UnsupportedError):
        KVSession(plain.ctx)


def test_geometry_is_the_models(llama):
    layers = llama.session.layers
    assert [layer.il for layer in layers] == [0, 1, 2]
    assert all((layer.n_head, layer.n_head_kv, layer.n_embd_head_k) == (4, 2, 32) for layer in layers)
    assert all(layer.n_bytes_row == 2 * 2 * 32 * 4 for layer in layers)
    assert llama.session.state().n_cells == 1024
