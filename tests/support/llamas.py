"""What tests do with a Llama: cache types, logits, greedy tokens, stored rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from kvcompose_gguf import Llama  # loads the library, which the pure tests do without
    from kvcompose_gguf.native.decoder import Decode

F32, F16, BF16, Q8_0 = 0, 1, 30, 8
#: every type that llama.cpp stores keys and values in
TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2, "iq4_nl": 20}
PLAIN_TYPES = {name: TYPES[name] for name in ("f32", "f16", "bf16")}
ONE_THREAD = {"n_threads": 1, "n_threads_batch": 1}


def last_logits(llama: Llama) -> np.ndarray:
    """Returns the logits of the latest decode's last token, float32 (n_vocab,)."""
    return np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),)).copy()


def greedy(llama: Llama, prompt: list[int], n: int) -> list[int]:
    """Returns the next ``n`` greedy tokens."""
    out: list[int] = []
    for token in llama.generate(prompt, temp=0.0):
        out.append(token)
        if len(out) == n:
            return out
    return out


def decode_one_by_one(llama: Any, ids: list[int]) -> np.ndarray:
    rows = []
    for token in ids:
        llama.eval([token])
        rows.append(last_logits(llama))
    return np.stack(rows)


def step(llama: Any, token: int = 1) -> Decode:
    """Returns the decode of one token behind the context, which was not made yet."""
    from kvcompose_gguf.native.decoder import Decode

    return Decode(llama.context.decoder, [token], llama.n_tokens, "last")


def stored_rows(llama: Any, il: int, which: str) -> np.ndarray:
    """Returns uint8 (n_head_kv, n_rows, bytes of a head), for plain and transposed tensors."""
    layer, cells = llama.session.layers[il], llama.session.cells(il)
    raw = llama.session.stored(il, which)
    if which == "v" and layer.v_trans:
        n_el = len(raw) // (layer.n_head_kv * layer.n_embd_head_v * cells.n_rows)
        raw = raw.reshape(layer.n_head_kv, layer.n_embd_head_v, cells.n_rows, n_el).transpose(0, 2, 1, 3)
        return raw.reshape(layer.n_head_kv, cells.n_rows, -1)
    return raw.reshape(cells.n_rows, layer.n_head_kv, -1).transpose(1, 0, 2)
