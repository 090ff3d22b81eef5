"""``Llama``: llama-cpp-python's class with a KV cache that shrinks after the prompt."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import numpy as np

from . import kernels, seam
from .errors import ConfigError, ContextLengthError, StateError
from .geometry import KVCells
from .methods.kvcompose import KVCompose
from .native import library
from .native.session import KVSession
from .report import KVReport
from .scoring import collect_attention, value_norms

llama_cpp = library.load()

T = TypeVar("T")


class Llama(llama_cpp.Llama):  # type: ignore[misc, name-defined]
    """llama-cpp-python's ``Llama`` with KV-cache compression.

    A prompt is prefilled, scored and composed before its first token is sampled; prompts that begin with the
    compressed context continue on it. With ``kv_compressor=None`` this is the original class.

    Args:
        kv_compressor: the method and its options, or ``None``.
        **kwargs: as for ``llama_cpp.Llama``.
    Raises:
        UnsupportedError: this model, its cache or the other arguments cannot be combined with compression.
    """

    def __init__(self, model_path: str, *, kv_compressor: KVCompose | None = None, **kwargs: Any) -> None:
        self._stack = contextlib.ExitStack()  # what the original's close() closes, should this not get further
        self._method: KVCompose | None = None
        _check_method(kv_compressor)
        #: figures of the latest compression, None before the first
        self.kv_report: KVReport | None = None
        self._compressed: list[int] = []  # tokens of the compressed context, empty: the cache is a full one
        self._kv_session: KVSession | None = None
        super().__init__(model_path, **kwargs)
        try:
            self.kv_compressor = kv_compressor
        except Exception:
            self.close()
            raise

    @property
    def kv_compressor(self) -> KVCompose | None:
        """The method that the next prompt is compressed with; it may be changed at any time."""
        return self._method

    @kv_compressor.setter
    def kv_compressor(self, method: KVCompose | None) -> None:
        _check_method(method)
        if method is not None:
            self._session  # noqa: B018  (raises if this context cannot be compressed)
            kernels.warm_up()
        self._method = method

    @property
    def _session(self) -> KVSession:
        if self._kv_session is None:
            self._kv_session = KVSession(self.ctx)
        return self._kv_session

    #
    # compression
    #

    def compress(self, context: str | bytes | Sequence[int]) -> KVReport:
        """Prefill and compress a context now, without generating; prompts that begin with it continue on it.

        Args:
            context: text, tokenized as ``create_completion`` does, or token ids.
        Returns:
            The figures, also kept as ``kv_report``.
        Raises:
            ConfigError: no ``kv_compressor``, or an empty context.
            ContextLengthError: the context and at least one more token do not fit into ``n_ctx``.
        """
        if self.kv_compressor is None:
            raise ConfigError("compress() needs Llama(..., kv_compressor=KVCompose(...))")
        tokens = self._prompt_tokens(context)
        if not tokens:
            raise ConfigError("the context is empty")
        return self._compress(tokens, self.kv_compressor)

    def kv_cells(self, il: int) -> KVCells:
        """Rows of the ``il``-th cached layer: allocated, and used by a composite or a token."""
        return self._session.cells(il)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all K and V buffers, now."""
        return self._session.state().n_bytes

    def _compress(self, tokens: list[int], method: KVCompose) -> KVReport:
        """prefill -> scores -> plan -> compose"""
        n_tokens = len(tokens)
        if n_tokens >= self._n_ctx:
            raise ContextLengthError(f"{n_tokens} tokens do not fit into n_ctx={self._n_ctx} with room for an answer")

        session = self._session
        n_prefilled, prefill_seconds = _timed(lambda: self._prefill(tokens))
        kv_bytes_before = session.state().n_bytes
        kv_bytes_full = n_tokens * sum(layer.n_bytes_row for layer in session.layers)

        if n_tokens < method.min_tokens:
            n_kept = np.full(len(session.layers), n_tokens)
            self.kv_report = KVReport(
                n_tokens, n_kept, kv_bytes_full, kv_bytes_full, kv_bytes_before, kv_bytes_before,
                prefill_seconds, 0.0, 0.0, 0.0, n_prefilled, 0,
            )  # fmt: skip
            return self.kv_report

        (attention, chunk), score_seconds = _timed(lambda: self._attention(tokens, method))
        norms = value_norms(session, n_tokens) if method.add_v_norm else None
        plan, plan_seconds = _timed(lambda: method.plan(attention, session.layers, norms))
        try:
            _, compose_seconds = _timed(lambda: session.compose(plan, method.n_room))
        finally:  # Ctrl-C may arrive after the cache has changed
            self._compressed = tokens if session.state().n_composed else []

        self.kv_report = KVReport(
            n_tokens=n_tokens,
            n_kept=plan.n_kept,
            kv_bytes_full=kv_bytes_full,
            kv_bytes_kept=int(sum(n * layer.n_bytes_row for n, layer in zip(plan.n_kept, session.layers, strict=True))),
            kv_bytes_before=kv_bytes_before,
            kv_bytes=session.state().n_bytes,
            prefill_seconds=prefill_seconds,
            score_seconds=score_seconds,
            plan_seconds=plan_seconds,
            compose_seconds=compose_seconds,
            n_prefilled=n_prefilled,
            scoring_chunk=chunk,
        )
        return self.kv_report

    def _prefill(self, tokens: list[int]) -> int:
        """Bring exactly ``tokens`` into a full cache; returns how many had to be evaluated."""
        n_reused = 0 if self._compressed else seam.common_prefix(self._input_ids.tolist(), tokens)
        if n_reused == 0 or not self._ctx.kv_cache_seq_rm(-1, n_reused, -1):
            self.reset()
            n_reused = 0
        self.n_tokens = n_reused
        self._requires_eval = True
        if n_reused < len(tokens):
            self.eval(tokens[n_reused:])
        return len(tokens) - n_reused

    def _attention(self, tokens: list[int], method: KVCompose) -> tuple[list[Any], int]:
        queries = [tokens] if method.scoring == "repeat" else [self._tokens(text) for text in method.prompts]
        self._requires_eval = True  # the logits will be another decode's
        return collect_attention(
            self._session, _Decoder(self), queries, len(tokens), method.agg_task, method.scoring_chunk,
            method.max_score_bytes,
        )  # fmt: skip

    #
    # tokens
    #

    def _tokens(self, text: str | bytes) -> list[int]:
        """Tokens of a text that follows another one."""
        raw = text.encode() if isinstance(text, str) else text
        return list(super().tokenize(raw, add_bos=False, special=True))

    def _prompt_tokens(self, prompt: str | bytes | Sequence[int]) -> list[int]:
        """Tokens of a prompt, as ``create_completion`` makes them: BOS if the model wants one."""
        if not isinstance(prompt, (str, bytes)):
            return [int(token) for token in prompt]
        bos = [self.token_bos()] if self._model.add_bos_token() and self.token_bos() != -1 else []
        return bos + self._tokens(prompt)

    def _piece(self, token: int) -> bytes:
        return bytes(self._model.detokenize([token], special=False))

    def _at_seam(self, tokens: list[int]) -> list[int] | None:
        """``tokens`` so that they begin with the compressed context, or None if they do not continue it."""
        return seam.join(
            self._compressed, tokens, self._piece, lambda text: super(Llama, self).tokenize(text, False, False)
        )

    #
    # llama_cpp.Llama
    #

    def generate(
        self, tokens: Sequence[int], *args: Any, reset: bool = True, **kwargs: Any
    ) -> Generator[int, Any, None]:
        """As ``llama_cpp.Llama.generate``; a long prompt is compressed before its first token is sampled."""
        if self.kv_compressor is not None and reset:
            self._prepare(list(tokens), self.kv_compressor)
        yield from super().generate(tokens, *args, reset=reset, **kwargs)

    def _prepare(self, tokens: list[int], method: KVCompose) -> None:
        """Leave a cache that holds the compressed beginning of ``tokens``, for generate() to go on from."""
        if self._compressed:
            # the last token's logits are needed, so at least one has to be left to evaluate
            if len(tokens) > len(self._compressed) and tokens[: len(self._compressed)] == self._compressed:
                return
            self.reset()
        n_context = len(tokens) - max(1, method.keep_last)
        if n_context >= method.min_tokens:
            self._compress(tokens[:n_context], method)

    def _create_completion(self, prompt: Any, suffix: str | None = None, echo: bool = False, **kwargs: Any) -> Any:
        # only here are a prompt's tokens still unknown to the caller, whose offsets have to agree with them
        if self._compressed and suffix is None and not (echo and isinstance(prompt, str)):
            tokens = self._prompt_tokens(prompt)
            joined = self._at_seam(tokens)
            if joined is not None and joined != tokens:
                prompt = joined
        return super()._create_completion(prompt=prompt, suffix=suffix, echo=echo, **kwargs)

    def eval(self, tokens: Sequence[int]) -> None:
        """As ``llama_cpp.Llama.eval``; never compresses."""
        if 0 < self.n_tokens < len(self._compressed):
            raise StateError(
                f"position {self.n_tokens} lies inside of {len(self._compressed)} compressed tokens: reset() first"
            )
        if self._compressed and self.n_tokens == 0:
            self.reset()
        super().eval(tokens)

    def reset(self) -> None:
        """Forget everything; a compressed cache becomes a full one again."""
        super().reset()
        if self._compressed:
            self._compressed = []
            self._ctx.kv_cache_clear()

    def __getstate__(self) -> dict[str, Any]:
        """For pickling: the arguments that make the same object, as in the original; without its cache."""
        return {**super().__getstate__(), "kv_compressor": self.kv_compressor}

    def save_state(self) -> Any:
        """As ``llama_cpp.Llama.save_state``; a compressed cache is saved as it is."""
        state = super().save_state()
        state.kv_compressed = list(self._compressed)
        return state

    def load_state(self, state: Any) -> None:
        """As ``llama_cpp.Llama.load_state``; full and compressed states may follow each other.

        Raises:
            StateError: the state is of another model, or its cache does not fit into this one.
        """
        if state.n_tokens >= self._n_ctx:
            raise StateError(f"the state has {state.n_tokens} tokens, too many for a context of n_ctx={self._n_ctx}")
        self.reset()
        try:
            super().load_state(state)
        except RuntimeError as error:
            self.n_tokens = 0
            raise StateError(f"the state cannot be loaded into this context: {error}") from error
        self._compressed = list(getattr(state, "kv_compressed", []))


def _check_method(method: Any) -> None:
    if method is not None and not isinstance(method, KVCompose):
        raise ConfigError(f"kv_compressor={method!r} is not a KVCompose")


class _Decoder:
    """The scoring pass's view of a Llama (scoring.Decoder)."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        self.n_batch = llama.n_batch

    def decode(self, tokens: Sequence[int], pos: int) -> None:
        llama = self._llama
        llama._batch.set_batch(batch=tokens, n_past=pos, logits_all=False)
        llama._batch.batch.logits[len(tokens) - 1] = False  # no output: the model's head is not computed
        llama._ctx.decode(llama._batch)

    def remove(self, pos: int) -> None:
        self._llama._ctx.kv_cache_seq_rm(-1, pos, -1)


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start
