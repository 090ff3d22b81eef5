"""Gathers cache rows with a C function that numba compiles. The native library calls it on the ggml tensors' memory.

Ctrl-C cannot interrupt native code, so a compose is all or nothing. Rows are moved as bytes, so nothing is quantized
again, and every KV type that stores a head in whole quantization blocks works.
"""

from __future__ import annotations

import functools

from numba import carray, cfunc, types

_SIGNATURE = types.void(
    types.CPointer(types.uint8),  # src
    types.CPointer(types.uint8),  # dst
    types.CPointer(types.int32),  # rows
    types.int64,  # n_head
    types.int64,  # n_kept
    types.int64,  # n_chunk
    types.int64,  # n_bytes
    types.int64,  # src_row
    types.int64,  # src_head
    types.int64,  # src_chunk
    types.int64,  # dst_row
    types.int64,  # dst_head
    types.int64,  # dst_chunk
)


@functools.cache
def gather_function() -> object:
    """Returns the compiled ``llama_kvc_gather_t`` (llama-kvc.h); pass its ``.address`` to the library.

    It also works in place (``src == dst``): the rows of a head ascend, so row j is written after it was read.
    """

    @cfunc(_SIGNATURE, cache=True)
    def gather(  # type: ignore[no-untyped-def]
        src, dst, rows, n_head, n_kept, n_chunk, n_bytes,
        src_row, src_head, src_chunk, dst_row, dst_head, dst_chunk,
    ):  # fmt: skip
        index = carray(rows, (n_head, n_kept))
        for h in range(n_head):
            for c in range(n_chunk):
                s0 = h * src_head + c * src_chunk
                d0 = h * dst_head + c * dst_chunk
                for j in range(n_kept):
                    s = s0 + index[h, j] * src_row
                    d = d0 + j * dst_row
                    for b in range(n_bytes):
                        dst[d + b] = src[s + b]

    return gather
