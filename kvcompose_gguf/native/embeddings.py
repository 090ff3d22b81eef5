"""Makes embedding vectors with a ``llama_context`` that was created for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import NativeError
from ..kernels.types import FloatArray
from . import library

#: llama.cpp's kinds of pooling (enum llama_pooling_type), without those of rerankers
POOLING = {"none": 0, "mean": 1, "cls": 2, "last": 3}


def embed(ctx: Any, tokens: Sequence[int], is_pooled: bool) -> FloatArray:
    """Returns the vectors of a text that the context sees alone, float32 ``(1 or n_tokens, n_embd)``.

    Args:
        ctx: the ``llama_context``. The text has to fit into one batch of it.
        is_pooled: the context pools: the text has one vector. If not, every token has one.
    Raises:
        NativeError: llama.cpp could not decode the text.
    """
    llama_cpp = library.load()
    memory = llama_cpp.llama_get_memory(ctx)
    if memory is not None:  # embedding models with non-causal attention have none
        llama_cpp.llama_memory_clear(memory, True)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        status = llama_cpp.llama_decode(ctx, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if status != 0:
        raise NativeError(f"llama_decode returned {status}")
    n_embd = llama_cpp.llama_model_n_embd(llama_cpp.llama_get_model(ctx))
    n_rows = 1 if is_pooled else len(tokens)
    pointer = llama_cpp.llama_get_embeddings_seq(ctx, 0) if is_pooled else llama_cpp.llama_get_embeddings(ctx)
    vectors: FloatArray = np.ctypeslib.as_array(pointer, (n_rows, n_embd)).copy()
    return vectors
