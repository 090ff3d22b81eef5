"""Decodes one token for each of several contexts at once, which reads the model's weights once for all of them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from ..errors import NativeError
from . import bindings, library
from .decoder import Decode


def decode_joint(decodes: Sequence[Decode]) -> None:
    """Carries out decodes of one token each, of different contexts of one model, in one graph.

    Afterwards each context has the logits of its token, equal up to rounding to those of a decode of its own. After an
    error no context has the new token, so each may decode alone.

    Raises:
        UnsupportedError: a model with sliding windows, recurrent layers, latent attention or M-RoPE.
        ConfigError: a context occurs twice, has another model, or its position is not behind its last token.
        StateError: a cache is full, or a context is scoring.
        NativeError: llama.cpp failed.
    """
    lib = bindings.declare(library.load().llama_cpp._lib)
    n = len(decodes)
    contexts = (ctypes.c_void_p * n)(*(ctypes.cast(decode.decoder.handle, ctypes.c_void_p) for decode in decodes))
    tokens = (ctypes.c_int32 * n)(*(decode.tokens[0] for decode in decodes))
    pos = (ctypes.c_int32 * n)(*(decode.pos for decode in decodes))
    status = lib.llama_kvc_decode_joint(contexts, tokens, pos, n)
    if status != bindings.OK:
        raise bindings.EXCEPTIONS.get(status, NativeError)(lib.llama_kvc_last_error().decode())
