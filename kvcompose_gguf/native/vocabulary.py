"""Wraps a model's vocabulary: tokens of texts, texts of tokens."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from ..plan import seam
from . import library


class Vocabulary:
    """The vocabulary of one model.

    Args:
        model: the bindings' ``LlamaModel``; it must outlive this object.
        tokenizer: the bindings' tokenizer of the model.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    @property
    def n_tokens(self) -> int:
        """Returns the number of tokens in the vocabulary."""
        return int(self._model.n_vocab())

    @property
    def bos(self) -> list[int]:
        """Returns the tokens that a prompt begins with: BOS if the model wants it, else none."""
        bos = int(self._model.token_bos())
        return [bos] if self._model.add_bos_token() and bos != -1 else []

    def tokens(self, text: str | bytes, special: bool = True) -> list[int]:
        """Returns the tokens of a text that follows another text.

        Args:
            special: read the names of control tokens as such tokens; False: as text.
        """
        raw = text.encode() if isinstance(text, str) else text
        return list(self._tokenizer.tokenize(raw, False, special))

    def joined(self, tokens: Sequence[int], context: Sequence[int]) -> list[int] | None:
        """Returns a prompt's tokens, changed to begin with ``context``; None: the texts differ.

        A tokenizer may merge text across the end of the context (``plan.seam``).
        """
        return seam.join(context, tokens, self.piece, lambda text: self.tokens(text, special=False))

    def piece(self, token: int, special: bool = False) -> bytes:
        """Returns the bytes of a token; a control token has none, but its name with ``special``."""
        size = 64
        while True:  # the bindings' detokenize() drops tokens of more than 32 bytes
            buffer = ctypes.create_string_buffer(size)
            n = library.load().llama_token_to_piece(self._model.vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def is_end(self, token: int) -> bool:
        """Returns whether ``token`` ends a generation: end of text, end of turn, …"""
        return bool(library.load().llama_vocab_is_eog(self._model.vocab, token))
