"""Wraps llama.cpp's own functions of one context: decode, remove tokens, read logits, save and load the memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import NativeError, StateError
from . import library

Bytes = npt.NDArray[np.uint8]

#: the tokens of a decode whose logits are computed
Outputs = Literal["none", "last", "all"]


class Decoder:
    """The memory and the outputs of one ``llama_context``.

    Only ``context.Context`` may call what changes the memory.

    Args:
        ctx, batch: the bindings' ``LlamaContext`` and ``LlamaBatch``; they must outlive this object.
        n_vocab: size of the vocabulary.
    """

    def __init__(self, ctx: Any, batch: Any, n_vocab: int) -> None:
        self._ctx, self._batch, self._n_vocab = ctx, batch, n_vocab

    @property
    def handle(self) -> Any:
        """Returns the ``llama_context`` pointer."""
        return self._ctx.ctx

    @property
    def n_ubatch(self) -> int:
        """Returns the largest number of tokens that are computed at once."""
        return int(library.load().llama_n_ubatch(self.handle))

    @property
    def n_ctx_train(self) -> int:
        """Returns the number of positions that the model was trained for."""
        llama_cpp = library.load()
        return int(llama_cpp.llama_model_n_ctx_train(llama_cpp.llama_get_model(self.handle)))

    def decode(self, tokens: Sequence[int], pos: int, outputs: Outputs) -> None:
        """Evaluates ``tokens`` at positions ``pos, pos + 1, …``.

        Args:
            outputs: the tokens whose logits are computed.
        Raises:
            NativeError: llama.cpp failed.
        """
        self._batch.set_batch(batch=tokens, n_past=pos, logits_all=outputs == "all")
        if outputs == "none":
            self._batch.batch.logits[len(tokens) - 1] = False  # the bindings always ask for the last one
        self._decode_batch(f"{len(tokens)} tokens at position {pos}")

    def logits(self, n_rows: int) -> npt.NDArray[np.float32]:
        """Returns the latest decode's logits, float32 ``(n_rows, n_vocab)``: a view, which the next decode changes."""
        return np.ctypeslib.as_array(library.load().llama_get_logits(self.handle), (n_rows, self._n_vocab))

    def embed(self, tokens: Sequence[int], n_embd: int, pooled: bool) -> npt.NDArray[np.float32]:
        """Empties the memory, evaluates a text, and returns its vectors.

        Args:
            pooled: return one vector for the text; False: one for each token.
        Returns:
            float32 ``(1 or n_tokens, n_embd)``.
        Raises:
            NativeError: llama.cpp failed.
        """
        self.clear()
        self._batch.reset()
        self._batch.add_sequence(tokens, 0, True)
        self._decode_batch(f"a text of {len(tokens)} tokens")
        if pooled:
            pointer = library.load().llama_get_embeddings_seq(self.handle, 0)
        else:
            pointer = library.load().llama_get_embeddings(self.handle)
        return np.ctypeslib.as_array(pointer, (1 if pooled else len(tokens), n_embd)).copy()

    def _decode_batch(self, what: str) -> None:
        try:
            self._ctx.decode(self._batch)
        except RuntimeError as error:  # the bindings raise it with llama.cpp's number
            raise NativeError(f"llama.cpp cannot evaluate {what}: {error}") from error

    def remove(self, first: int) -> bool:
        """Removes all tokens from position ``first`` on; returns False, and does nothing, if the memory cannot."""
        return bool(self._ctx.kv_cache_seq_rm(-1, first, -1))

    def clear(self) -> None:
        """Removes all tokens and zeroes the memory."""
        self._ctx.kv_cache_clear()

    @property
    def n_bytes_state(self) -> int:
        """Returns the number of bytes that ``state`` has."""
        return int(library.load().llama_state_get_size(self.handle))

    def state(self) -> Bytes:
        """Returns the whole state, uint8 ``(n_bytes,)``."""
        data = np.empty(self.n_bytes_state, dtype=np.uint8)
        n_bytes = library.load().llama_state_get_data(self.handle, _pointer(data), data.size)
        return data[:n_bytes]

    def load_state(self, state: bytes | Bytes) -> None:
        """Restores what ``state`` returned, straight from its memory.

        Raises:
            StateError: the state belongs to another model, or does not fit.
        """
        data = np.frombuffer(state, dtype=np.uint8)
        if library.load().llama_state_set_data(self.handle, _pointer(data), data.size) != data.size:
            raise StateError("the state is damaged or does not fit this context: use the same model and options")

    def partial_state(self) -> bytes:
        """Returns the state of the layers that cannot go back: sliding windows and recurrent memory."""
        flags = library.load().LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        data = np.empty(library.load().llama_state_seq_get_size_ext(self.handle, 0, flags), dtype=np.uint8)
        n_bytes = library.load().llama_state_seq_get_data_ext(self.handle, _pointer(data), data.size, 0, flags)
        return data[:n_bytes].tobytes()

    def load_partial_state(self, state: bytes) -> None:
        """Restores what ``partial_state`` returned.

        Raises:
            NativeError: llama.cpp refuses the state.
        """
        flags = library.load().LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        data = np.frombuffer(state, dtype=np.uint8)
        if library.load().llama_state_seq_set_data_ext(self.handle, _pointer(data), data.size, 0, flags) != data.size:
            raise NativeError(
                "llama.cpp cannot restore the windows and recurrent layers to the end of the context: call reset()"
            )


@dataclass(frozen=True)
class Decode:
    """A call of ``Decoder.decode`` that was not made yet; call it to make it.

    Attributes:
        decoder: whose memory takes the tokens.
        tokens, pos, outputs: the arguments of ``Decoder.decode``.
    """

    decoder: Decoder
    tokens: Sequence[int]
    pos: int
    outputs: Outputs

    def __call__(self) -> None:
        self.decoder.decode(self.tokens, self.pos, self.outputs)

    @property
    def is_step(self) -> bool:
        """Whether this is one token of an answer, which ``joint.decode_joint`` takes."""
        return len(self.tokens) == 1 and self.outputs != "none"


def _pointer(data: Bytes) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
