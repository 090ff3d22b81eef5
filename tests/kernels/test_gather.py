"""Gathers rows in memory of every layout, and compares them with plain indexing."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from support.arrays import assert_same

from kvcompose_gguf.kernels import compose, reference

POINTER = ctypes.c_void_p
# llama_kvc_gather_t of llama-kvc.h
GATHER_T = ctypes.CFUNCTYPE(None, POINTER, POINTER, POINTER, *[ctypes.c_int64] * 10)

N_ROWS, N_HEAD = 23, 3
SELECTIONS = {
    "a random third": np.sort(np.stack([np.random.default_rng(h).permutation(N_ROWS)[:8] for h in range(N_HEAD)])),
    "all": np.tile(np.arange(N_ROWS), (N_HEAD, 1)),
    "all but the first": np.tile(np.arange(1, N_ROWS), (N_HEAD, 1)),
    "the first few": np.tile(np.arange(4), (N_HEAD, 1)),
    "the last few": np.tile(np.arange(N_ROWS - 4, N_ROWS), (N_HEAD, 1)),
    "one each": np.array([[0], [11], [N_ROWS - 1]]),
    "none": np.empty((N_HEAD, 0)),
}
each_selection = pytest.mark.parametrize("selection", SELECTIONS)

# bytes of one head's row: the last is two q8_0 blocks, of 34 bytes for 32 elements
HEAD_BYTES = {"f16 of 64": 128, "f16 of 5": 10, "f32 of 16": 64, "q8_0 of 32": 34, "q8_0 of 64": 68}


def _memory(n_rows: int, n_bytes: int) -> np.ndarray:
    return np.random.default_rng(n_rows * n_bytes).integers(0, 256, (n_rows, n_bytes), np.uint8)


def _row_strides(n_head_bytes: int) -> tuple[int, int, int]:
    return N_HEAD * n_head_bytes, n_head_bytes, 0


def _transposed_strides(n_embd_head: int, n_element: int, n_rows: int) -> tuple[int, int, int]:
    return n_element, n_embd_head * n_rows * n_element, n_rows * n_element


def _gather(src, dst, cells, n_chunk, n_bytes, src_strides, dst_strides) -> None:  # type: ignore[no-untyped-def]
    """Runs the compiled gather and its twin on copies of ``dst``; asserts that every byte agrees."""
    function = GATHER_T(compose.gather_function().address)  # type: ignore[attr-defined]
    in_place = src is dst
    twin = dst.copy()
    flat = twin.ravel()  # a view: what the twin writes
    reference.gather(flat if in_place else src.ravel(), flat, cells, n_chunk, n_bytes, src_strides, dst_strides)
    function(
        src.ctypes.data, dst.ctypes.data, cells.ctypes.data, *cells.shape, n_chunk, n_bytes, *src_strides, *dst_strides
    )
    assert_same(dst, twin)


@each_selection
@pytest.mark.parametrize("head", HEAD_BYTES)
def test_gather_moves_each_heads_own_rows(head: str, selection: str) -> None:
    cells = SELECTIONS[selection].astype(np.int32)
    n_head_bytes, n_kept = HEAD_BYTES[head], cells.shape[1]
    src = _memory(N_ROWS, N_HEAD * n_head_bytes)
    dst = np.full((n_kept + 2, N_HEAD * n_head_bytes), 0xAB, np.uint8)  # two rows behind, to stay untouched

    strides = _row_strides(n_head_bytes)
    _gather(src, dst, cells, 1, n_head_bytes, strides, strides)

    assert (dst[n_kept:] == 0xAB).all()
    for h in range(N_HEAD):
        columns = slice(h * n_head_bytes, (h + 1) * n_head_bytes)
        assert_same(dst[:n_kept, columns], src[cells[h], columns])


@each_selection
@pytest.mark.parametrize("head", HEAD_BYTES)
def test_gather_of_rows_works_in_place(head: str, selection: str) -> None:
    cells = SELECTIONS[selection].astype(np.int32)
    n_head_bytes, n_kept = HEAD_BYTES[head], cells.shape[1]
    memory = _memory(N_ROWS, N_HEAD * n_head_bytes)
    expected = memory.copy()
    for h in range(N_HEAD):
        columns = slice(h * n_head_bytes, (h + 1) * n_head_bytes)
        expected[:n_kept, columns] = memory[cells[h], columns]

    strides = _row_strides(n_head_bytes)
    _gather(memory, memory, cells, 1, n_head_bytes, strides, strides)
    assert_same(memory, expected)


@each_selection
@pytest.mark.parametrize("n_element", [2, 4])
def test_gather_of_transposed_values_moves_elements_into_fewer_rows(n_element: int, selection: str) -> None:
    cells = SELECTIONS[selection].astype(np.int32)
    n_embd_head, n_kept = 6, cells.shape[1]
    n_rows_new = n_kept + 2
    src = _memory(N_HEAD * n_embd_head, N_ROWS * n_element)
    dst = np.full((N_HEAD * n_embd_head, n_rows_new * n_element), 0xAB, np.uint8)

    _gather(
        src, dst, cells, n_embd_head, n_element,
        _transposed_strides(n_embd_head, n_element, N_ROWS), _transposed_strides(n_embd_head, n_element, n_rows_new),
    )  # fmt: skip

    got = dst.reshape(N_HEAD, n_embd_head, n_rows_new, n_element)
    stored = src.reshape(N_HEAD, n_embd_head, N_ROWS, n_element)
    assert (got[:, :, n_kept:] == 0xAB).all()
    for h in range(N_HEAD):
        assert_same(got[h, :, :n_kept], stored[h][:, cells[h]])


@each_selection
@pytest.mark.parametrize("n_element", [2, 4])
def test_gather_of_transposed_values_works_in_place(n_element: int, selection: str) -> None:
    cells = SELECTIONS[selection].astype(np.int32)
    n_embd_head, n_kept = 6, cells.shape[1]
    memory = _memory(N_HEAD * n_embd_head, N_ROWS * n_element)
    stored = memory.copy().reshape(N_HEAD, n_embd_head, N_ROWS, n_element)
    expected = stored.copy()
    for h in range(N_HEAD):
        expected[h, :, :n_kept] = stored[h][:, cells[h]]

    strides = _transposed_strides(n_embd_head, n_element, N_ROWS)
    _gather(memory, memory, cells, n_embd_head, n_element, strides, strides)
    assert_same(memory, expected.reshape(memory.shape))
