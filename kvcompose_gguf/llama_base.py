"""The bindings' ``Llama`` with a cache that ``Context`` owns; the only file that uses the bindings' private members."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import __version__
from .access import Access, changes_cache, inherits, reads_cache, reads_model, seal
from .context import START_CELLS, Context
from .errors import ConfigError
from .models.identity import Identity, model_id
from .native import library, settings
from .native.decoder import Decoder
from .native.session import KVSession, start_small
from .native.vocabulary import Vocabulary
from .native.weights import shared_weights
from .plan.geometry import KVCells, LayerGeometry

llama_cpp = library.load()

#: a text, or its tokens
Prompt = str | bytes | Sequence[int]


@inherits(
    {
        changes_cache: (
            "__call__", "create_completion", "create_chat_completion", "create_chat_completion_openai_v1",
            "create_embedding", "embed", "sample",
        ),
        reads_model: (
            "__getstate__", "detokenize", "n_ctx", "n_embd", "n_vocab", "pooling_type", "token_bos", "token_eos",
            "token_nl", "tokenize", "tokenizer",
        ),
    }
)  # fmt: skip
class LlamaBase(llama_cpp.Llama):  # type: ignore[misc, name-defined]
    """llama-cpp-python's ``Llama``, with a ``context`` that knows what its cache holds.

    The bindings' own ``generate`` and ``embed`` also remove tokens themselves, and then set ``n_tokens``.

    Args:
        elastic: allocate memory only for the tokens that the cache holds.
        weights_of: another object of this class, to share its weights; it has to be closed last.
        **kwargs: arguments of ``llama_cpp.Llama``.
    Raises:
        ConfigError: ``weights_of`` has another file.
    Attributes:
        access: controls which thread may use the object.
        context: the owner of the cache.
    """

    context: Context

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Returns an object that can be closed, also if ``__init__`` fails early."""
        self = super().__new__(cls)
        self.access, self._stack = Access(), contextlib.ExitStack()
        return self

    def __init__(
        self, model_path: str, *, elastic: bool = True, weights_of: LlamaBase | None = None, **kwargs: Any
    ) -> None:
        self._own_identity: Identity | None = None
        # embed() empties the cache before every batch, so an elastic cache would shrink and grow each time
        self.elastic = elastic and not kwargs.get("embedding", False)
        if weights_of is not None and Path(weights_of.model_path).resolve() != Path(model_path).resolve():
            raise ConfigError(f"weights_of has {weights_of.model_path}, not {model_path}: share weights of one file")
        lender = None if weights_of is None else weights_of._model
        with start_small(START_CELLS if self.elastic else 0), shared_weights(lender):
            super().__init__(model_path, **kwargs)
        self.context = Context(
            Decoder(self._ctx, self._batch, self._n_vocab), Vocabulary(self._model, self.tokenizer_), self.access,
            n_ctx=self._n_ctx, n_batch=self.n_batch, elastic=self.elastic,
            clears=self._is_recurrent or self._is_hybrid, logits=self.scores if self._logits_all else None,
        )  # fmt: skip

    def close(self) -> None:
        """Waits for running calls, then frees the context and the model; all later calls raise StateError."""
        with self.access.closing() as first:
            if not first:
                return
            if "context" in self.__dict__:
                self.context.close()
            super().close()
            # tokenizers, generators and other objects may hold these
            for name in ("context", "_ctx", "_model", "_batch"):
                if name in self.__dict__:
                    seal(self.__dict__[name])
        seal(self)

    def __enter__(self) -> LlamaBase:
        with self.access.look():
            return self

    def __exit__(self, *error: object) -> None:
        self.close()

    #
    # the model
    #

    @property
    @reads_model
    def n_ctx_train(self) -> int:
        """Returns the context length, in tokens, that the model was trained for."""
        return int(self._model.n_ctx_train())

    @property
    @reads_model
    def adds_bos(self) -> bool:
        """Returns whether the tokens of a text begin with BOS."""
        return bool(self.context.vocabulary.bos)

    @reads_model
    def piece(self, token: int, special: bool = False) -> bytes:
        """Returns the bytes of a token; a control token has none, but its name with ``special``."""
        return self.context.vocabulary.piece(token, special)

    @reads_model
    def is_end(self, token: int) -> bool:
        """Returns whether ``token`` ends a generation: end of text, end of turn, …"""
        return self.context.vocabulary.is_end(token)

    @property
    @reads_model
    def identity(self) -> Identity:
        """Returns what the cached rows depend on: the model, context options and versions."""
        if self._own_identity is None:
            path, scale = Path(self.model_path), self.lora_scale if self.lora_path else None
            overrides = repr(self.kv_overrides) if self.kv_overrides else None
            stored = settings.stored_as(
                self.context_params, lora_path=self.lora_path, lora_scale=scale, kv_overrides=overrides
            )
            versions = {"kvcompose-gguf": __version__, **settings.versions()}
            self._own_identity = Identity(path.name, model_id(path), stored, versions)
        return self._own_identity

    @reads_model
    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """Returns the tokens of a prompt as ``create_completion`` makes them, with BOS if the model wants it."""
        if not isinstance(prompt, (str, bytes)):
            return [int(token) for token in prompt]
        vocabulary = self.context.vocabulary
        return vocabulary.bos + vocabulary.tokens(prompt)

    #
    # the cache
    #

    @property
    @reads_cache
    def session(self) -> KVSession:
        """Returns numpy access to rows, scores and probes; do not use it while another thread decodes."""
        return self.context.session

    @property
    @reads_cache
    def kv_layers(self) -> tuple[LayerGeometry, ...]:
        """Returns the layers that compression covers, in order."""
        return self.context.session.layers

    @property
    @reads_cache
    def kv_bytes(self) -> int:
        """Returns the current bytes of all K and V buffers, except those of sliding-window layers."""
        return self.context.session.state().n_bytes

    @reads_cache
    def kv_cells(self, il: int) -> KVCells:
        """Returns how many rows of the ``il``-th cached layer are allocated, and how many are in use."""
        return self.context.session.cells(il)

    @property
    def n_context(self) -> int:
        """Returns the number of tokens of the compressed context, which cannot be cut; 0: the cache is full."""
        return self.context.n_context

    #
    # the cache: see Context
    #

    @changes_cache
    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluates ``tokens`` like ``llama_cpp.Llama.eval``; compresses only to stay below a ceiling."""
        self.context.eval(tokens)

    @changes_cache
    def eval_logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Evaluates ``tokens`` after the cached ones and returns the logits after each, float32 ``(n, n_vocab)``."""
        return self.context.eval_logits(tokens)

    @changes_cache
    def truncate(self, n_tokens: int) -> None:
        """Removes all tokens after the first ``n_tokens``; raises StateError if this cache cannot."""
        self.context.truncate(n_tokens)

    @property
    @reads_cache
    def can_truncate(self) -> bool:
        """Returns whether ``truncate`` can remove any number of tokens; windows and recurrent layers cannot go back."""
        return self.context.can_truncate

    @changes_cache
    def reset(self) -> None:
        """Empties the cache; a compressed cache becomes a full one again, and an elastic cache becomes small."""
        self.context.reset()

    @changes_cache
    def write_values(self, values: Sequence[npt.NDArray[np.float32]]) -> None:
        """Replaces the values of the first rows; takes float32 ``(n_head_kv, n_rows, n_embd_head_v)`` per layer."""
        self.context.write_values(values)

    #
    # what the bindings' own code reads and sets; their constructor does so before there is a context
    #

    @property
    def n_tokens(self) -> int:
        """Returns the number of tokens in the cache."""
        return self.context.n_tokens

    @n_tokens.setter
    def n_tokens(self, n_tokens: int) -> None:
        if "context" in self.__dict__:
            self.context.adopt(n_tokens)

    @property
    def input_ids(self) -> npt.NDArray[np.int32]:
        """Returns the tokens, int32 ``(n_ctx,)``; the first ``n_tokens`` are in the cache."""
        return self.context.ids

    @input_ids.setter
    def input_ids(self, ids: npt.NDArray[np.int32]) -> None:
        if "context" in self.__dict__:
            raise AttributeError("input_ids cannot be replaced: use eval(), or write into the array")

    @property
    def _requires_eval(self) -> bool:
        return self.context.needs_eval

    @_requires_eval.setter
    def _requires_eval(self, requires: bool) -> None:
        if requires and "context" in self.__dict__:
            self.context.forget_logits()
