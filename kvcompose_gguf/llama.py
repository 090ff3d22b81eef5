"""``Llama``: llama-cpp-python's class with a KV cache that shrinks after the prompt."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from . import kernels, seam, states
from .errors import ConfigError, ContextLengthError, NativeError, StateError, UnsupportedError
from .geometry import KVCells, LayerGeometry
from .methods.base import Method
from .native import library
from .native.session import KVSession, start_small
from .plan import CompositionPlan
from .queries import AttentionRequest, Evidence, QueryStates
from .report import KVReport
from .rows import cached_rows, write_values
from .scoring import Attention, Decoder, collect_attention, collect_queries

llama_cpp = library.load()

T = TypeVar("T")

#: cells of an empty elastic cache, and those that are kept free behind a prompt
START_CELLS = 256


class Llama(llama_cpp.Llama):  # type: ignore[misc, name-defined]
    """llama-cpp-python's ``Llama`` with KV-cache compression.

    A prompt is prefilled, scored and composed before its first token is sampled; prompts that begin with the
    compressed context continue on it. With ``kv_compressor=None`` this is the original class.

    Args:
        kv_compressor: the method and its options, or ``None``.
        elastic: the cache has memory for what it holds and not for all of ``n_ctx``: it grows in steps, shrinks when
            composed and is small again after ``reset()``. False: all of it from the start, as in the original.
        **kwargs: as for ``llama_cpp.Llama``.
    Raises:
        UnsupportedError: this model, its cache or the other arguments cannot be combined with compression.
    """

    n_tokens: int  # of llama_cpp.Llama: tokens in the cache

    def __init__(
        self, model_path: str, *, kv_compressor: Method | None = None, elastic: bool = True, **kwargs: Any
    ) -> None:
        self._stack = contextlib.ExitStack()  # what the original's close() closes, should this not get further
        self._method: Method | None = None
        _check_method(kv_compressor)
        #: figures of the latest compression, None before the first
        self.kv_report: KVReport | None = None
        self._compressed: list[int] = []  # tokens of the compressed context, empty: the cache is a full one
        self._kv_session: KVSession | None = None
        self._swa_state: Any = None  # of the sliding-window layers at the end of the compressed context
        # embed() empties the cache before every batch: it would shrink and grow each time
        self._elastic = elastic and not kwargs.get("embedding", False)
        self._n_seen = 0  # tokens that came through eval(): image handlers decode past it
        with start_small(START_CELLS if self._elastic else 0):
            super().__init__(model_path, **kwargs)
        try:
            self.kv_compressor = kv_compressor
        except Exception:
            self.close()
            raise

    @property
    def kv_compressor(self) -> Method | None:
        """The method that the next prompt is compressed with; it may be changed at any time."""
        return self._method

    @kv_compressor.setter
    def kv_compressor(self, method: Method | None) -> None:
        _check_method(method)
        if method is not None:
            if method.simulated:
                raise UnsupportedError(f"{type(method).__name__} is only simulated: kvcompose eval")
            method = method.for_model(Path(self.model_path))
            self._session.set_fast_attention(True)  # raises if this context cannot be compressed
            kernels.warm_up()
        elif self._kv_session is not None:
            self._session.set_fast_attention(False)
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

    @property
    def session(self) -> KVSession:
        """The context as numpy sees it: rows, scores, probes."""
        return self._session

    def decoder(self) -> Decoder:
        """What scoring needs of this model."""
        return _Decoder(self)

    @property
    def n_ctx_train(self) -> int:
        """Tokens that the model was made for."""
        return int(self._model.n_ctx_train())

    @property
    def kv_layers(self) -> tuple[LayerGeometry, ...]:
        """The layers that are compressed, in order."""
        return self._session.layers

    def prefill(self, context: str | bytes | Sequence[int]) -> int:
        """Bring exactly ``context`` into a full cache; returns how many tokens had to be evaluated.

        Raises:
            ContextLengthError: it does not fit into ``n_ctx``.
        """
        return self._prefill(self._prompt_tokens(context))

    def write_values(self, values: Sequence[npt.NDArray[np.float32]]) -> None:
        """Replace the values of first rows, for each layer float32 ``(n_head_kv, n_rows, n_embd_head_v)``."""
        if len(values) > len(self.kv_layers):
            raise ConfigError(f"values of {len(values)} layers, the cache has {len(self.kv_layers)}")
        for ikv, rows in enumerate(values):
            write_values(self._session, ikv, rows)

    def observe(self, context: str | bytes | Sequence[int], method: Method, suffix: Sequence[int] = ()) -> Evidence:
        """Prefill a context and collect what ``method`` asks to see, for ``method.plan()``; the cache stays full.

        Args:
            context: as for ``compress``; what the cache has of it already is not evaluated again.
            method: what ``for_model`` gives, if it has to know something about the model.
            suffix: tokens that follow it in its prompt.
        Raises:
            ContextLengthError: it does not fit, or leaves no cell for the queries on top of it.
        """
        tokens = self._prompt_tokens(context)
        return self._evidence(tokens, self._attention(tokens, method.attention_request, suffix, method), method)

    def compose(self, plan: CompositionPlan, n_room: int = 256) -> None:
        """Apply ``plan`` to the cache; prompts that begin with its tokens continue on it.

        Args:
            n_room: free cells to allocate behind the composites; the cache grows by itself beyond them.
        Raises:
            ConfigError: the plan does not fit this cache.
            StateError: the cache is not exactly the plan's tokens, or is composed already.
        """
        if self._compressed:
            raise StateError(f"the cache is compressed already, from {len(self._compressed)} tokens: reset() first")
        tokens = self._input_ids[: plan.n_tokens].tolist()
        swa_state = states.save_windows(self.ctx, self._session.state())
        try:
            self._session.compose(plan, n_room)
        finally:  # Ctrl-C may arrive after the cache has changed
            self._compressed = tokens if self._session.state().n_composed else []
            self._swa_state = swa_state

    def kv_cells(self, il: int) -> KVCells:
        """Rows of the ``il``-th cached layer: allocated, and used by a composite or a token."""
        return self._session.cells(il)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all K and V buffers, now; sliding-window layers, which stay as they are, do not count."""
        return self._session.state().n_bytes

    def _compress(self, tokens: list[int], method: Method, suffix: Sequence[int] = ()) -> KVReport:
        """prefill -> scores -> plan -> compose; ``suffix`` is what follows the context in its prompt."""
        n_tokens = len(tokens)
        if n_tokens >= self._n_ctx:
            raise ContextLengthError(f"{n_tokens} tokens do not fit into n_ctx={self._n_ctx} with room for an answer")

        session = self._session
        compressing = n_tokens >= method.min_tokens
        if compressing:
            method.check_budget(session.layers, n_tokens)
        attention = self._attention(tokens, method.attention_request if compressing else None, suffix, method)
        kv_bytes_before = session.state().n_bytes
        n_kept = np.full(len(session.layers), n_tokens)
        state_seconds = score_seconds = plan_seconds = compose_seconds = 0.0
        if compressing:
            evidence, state_seconds = _timed(lambda: self._evidence(tokens, attention, method))
            scores, score_seconds = _timed(lambda: method.scores(evidence))
            plan, plan_seconds = _timed(lambda: method.plan(evidence, scores))
            _, compose_seconds = _timed(lambda: self.compose(plan, method.n_room))
            n_kept = plan.n_kept

        self.kv_report = KVReport(
            n_tokens=n_tokens,
            n_kept=n_kept,
            kv_bytes_full=n_tokens * sum(layer.n_bytes_row for layer in session.layers),
            kv_bytes_kept=int(sum(n * layer.n_bytes_row for n, layer in zip(n_kept, session.layers, strict=True))),
            kv_bytes_before=kv_bytes_before,
            kv_bytes=session.state().n_bytes,
            prefill_seconds=attention.prefill_seconds,
            score_seconds=attention.score_seconds + state_seconds + score_seconds,
            plan_seconds=plan_seconds,
            compose_seconds=compose_seconds,
            n_prefilled=attention.n_prefilled,
            scoring_chunk=attention.chunk,
        )
        return self.kv_report

    def _attention(
        self, tokens: list[int], request: AttentionRequest | None, suffix: Sequence[int], method: Method
    ) -> Attention:
        """Prefill ``tokens`` and collect what ``request`` asks for."""
        if request is None:
            n_prefilled, seconds = _timed(lambda: self._prefill(tokens))
            return Attention([], n_prefilled, seconds, 0.0, 0)
        try:
            return collect_attention(
                self._session, self.decoder(), request, tokens, suffix, self._tokens, method.max_score_bytes
            )
        finally:
            self._requires_eval = True  # the logits are another decode's

    def _evidence(self, tokens: list[int], attention: Attention, method: Method) -> Evidence:
        """What ``method`` may look at, now that ``tokens`` are in a full cache."""
        session, n_tokens, states = self._session, len(tokens), None
        if method.state_request is not None:
            queries = collect_queries(session, self.decoder(), method.state_request, tokens)
            states = lambda l: QueryStates(queries[l], lambda rows, pos: session.rope(l, rows, pos))  # noqa: E731
        return Evidence(
            n_tokens,
            session.layers,
            attention.layers,
            attention.n_window,
            keys=lambda l: cached_rows(session, l, "k", n_tokens),
            values=lambda l: cached_rows(session, l, "v", n_tokens),
            states=states,
            unrotate=lambda l: lambda rows, pos: session.rope(l, rows, pos, inverse=True),
        )

    def _prefill(self, tokens: list[int], keep_prefix: bool = True) -> int:
        """Bring exactly ``tokens`` into a full cache; returns how many had to be evaluated."""
        if len(tokens) > self._n_ctx:
            raise ContextLengthError(f"{len(tokens)} tokens do not fit into n_ctx={self._n_ctx}")
        n_reused = 0 if self._compressed or not keep_prefix else seam.common_prefix(self._input_ids.tolist(), tokens)
        if n_reused < self.n_tokens and self._session.state().n_cells_swa:
            n_reused = 0  # sliding windows forget: going back needs tokens that they do not have any more
        if n_reused == 0 or not self._ctx.kv_cache_seq_rm(-1, n_reused, -1):
            self.reset()
            n_reused = 0
        self.n_tokens = n_reused
        self._requires_eval = True
        if n_reused < len(tokens):
            self.eval(tokens[n_reused:])
        return len(tokens) - n_reused

    def _back_to_context(self) -> None:
        """Forget what follows the compressed context, with the sliding windows as they were at its end."""
        n_context, self.n_tokens = len(self._compressed), 0  # if this does not get to its end, all is forgotten
        self._ctx.kv_cache_seq_rm(-1, n_context, -1)
        states.load_windows(self.ctx, self._swa_state)
        self.n_tokens = n_context

    @contextlib.contextmanager
    def _on_top(self, pos: int) -> Iterator[None]:
        swa_state = states.save_windows(self.ctx, self._session.state())
        n_tokens, self.n_tokens = self.n_tokens, 0  # as above
        try:
            yield
        finally:
            self._ctx.kv_cache_seq_rm(-1, pos, -1)
            if swa_state is not None:
                states.load_windows(self.ctx, swa_state)
            self.n_tokens = n_tokens

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
        bos = [self.token_bos()] if self.adds_bos else []
        return bos + self._tokens(prompt)

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of a token; of a control token none, or with ``special`` its name."""
        size = 64
        while True:  # the bindings' detokenize() loses tokens of more than 32 bytes
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._model.vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def _at_seam(self, tokens: list[int], context: Sequence[int] | None = None) -> list[int] | None:
        """``tokens`` so that they begin with ``context``, the compressed one, or None if they do not continue it."""
        return seam.join(
            self._compressed if context is None else context,
            tokens,
            self.piece,
            lambda text: super(Llama, self).tokenize(text, False, False),
        )

    #
    # llama_cpp.Llama
    #

    def generate(
        self, tokens: Sequence[int], *args: Any, reset: bool = True, **kwargs: Any
    ) -> Generator[int, Any, None]:
        """As ``llama_cpp.Llama.generate``; a long prompt is compressed before its first token is sampled."""
        if reset and (self.kv_compressor is not None or self._compressed):
            self._prepare(list(tokens), self.kv_compressor)
        yield from super().generate(tokens, *args, reset=reset, **kwargs)

    def _prepare(self, tokens: list[int], method: Method | None) -> None:
        """Leave a cache that holds the compressed beginning of ``tokens``, for generate() to go on from."""
        if self._compressed:
            # the last token's logits are needed, so at least one has to be left to evaluate
            if len(tokens) > len(self._compressed) and tokens[: len(self._compressed)] == self._compressed:
                if self._swa_state is not None and seam.common_prefix(self._input_ids.tolist(), tokens) < self.n_tokens:
                    self._back_to_context()
                return
            self.reset()
        if self.n_tokens > self._n_seen:
            return  # part of the prompt is no text: its tokens cannot be evaluated again
        if method is None:
            return
        n_context = len(tokens) - max(1, method.keep_last)
        if n_context >= method.min_tokens:
            self._compress(tokens[:n_context], method, tokens[n_context:])

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
        self._begin_eval(len(tokens))
        super().eval(tokens)
        self._n_seen = self.n_tokens

    def _begin_eval(self, n: int) -> None:
        if 0 < self.n_tokens < len(self._compressed):
            raise StateError(
                f"position {self.n_tokens} lies inside of {len(self._compressed)} compressed tokens: reset() first"
            )
        if self._compressed and self.n_tokens == 0:
            self.reset()
        if self._elastic and n > START_CELLS and not self._compressed:
            self._reserve(self.n_tokens + n + START_CELLS)

    def eval_logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Evaluate ``tokens`` behind what is in the cache, all at once: the logits after each, ``(n, n_vocab)``.

        Raises:
            ContextLengthError: they do not fit into ``n_ctx``.
        """
        if self.n_tokens + len(tokens) > self._n_ctx:
            raise ContextLengthError(f"{self.n_tokens} + {len(tokens)} tokens do not fit into n_ctx={self._n_ctx}")
        self._begin_eval(len(tokens))
        self._requires_eval = True  # the last logits may be another token's when this is interrupted
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        rows = np.empty((len(tokens), self.n_vocab()), dtype=np.float32)
        for first in range(0, len(tokens), self.n_batch):
            part = list(tokens[first : first + self.n_batch])
            self._batch.set_batch(batch=part, n_past=self.n_tokens, logits_all=True)
            self._ctx.decode(self._batch)
            logits = llama_cpp.llama_get_logits(self.ctx)
            rows[first : first + len(part)] = np.ctypeslib.as_array(logits, (len(part), self.n_vocab()))
            self.input_ids[self.n_tokens : self.n_tokens + len(part)] = part
            self.n_tokens += len(part)
        self._n_seen = self.n_tokens
        return rows

    def truncate(self, n_tokens: int) -> None:
        """Forget what follows the first ``n_tokens`` tokens.

        Raises:
            StateError: these are not in the cache, lie inside of a compressed context, or the model has sliding
                windows, which do not have what came before them any more (``can_truncate``).
        """
        if not len(self._compressed) <= n_tokens <= self.n_tokens:
            raise StateError(f"n_tokens={n_tokens} is not in [{len(self._compressed)}, {self.n_tokens}]")
        if n_tokens < self.n_tokens and (not self.can_truncate or not self._ctx.kv_cache_seq_rm(-1, n_tokens, -1)):
            raise StateError(f"what follows token {n_tokens} of {self.n_tokens} cannot be forgotten alone")
        self.n_tokens = n_tokens
        self._requires_eval = True

    @property
    def adds_bos(self) -> bool:
        """Whether a text's tokens begin with BOS."""
        return bool(self._model.add_bos_token()) and self.token_bos() != -1

    @property
    def can_truncate(self) -> bool:
        """Whether any number of last tokens can be forgotten: sliding windows do not have what came before them."""
        return not self._session.state().n_cells_swa

    def is_end(self, token: int) -> bool:
        """Whether ``token`` ends a generation: end of text, of turn, …"""
        return bool(llama_cpp.llama_vocab_is_eog(self._model.vocab, token))

    def _reserve(self, n_cells: int) -> None:
        """One step instead of several; contexts that cannot be compressed, or have no memory for it, grow in steps."""
        with contextlib.suppress(UnsupportedError, NativeError):
            self._session.reserve(min(n_cells, self._session.state().n_cells))

    def reset(self) -> None:
        """Forget everything; a compressed cache becomes a full one again, and an elastic one small."""
        super().reset()
        self._n_seen = 0
        if self._compressed or self._elastic:
            self._compressed = []
            self._swa_state = None
            self._ctx.kv_cache_clear()
        if self._elastic:
            self._reserve(0)

    def __getstate__(self) -> dict[str, Any]:
        """For pickling: the arguments that make the same object, as in the original; without its cache."""
        return {**super().__getstate__(), "kv_compressor": self.kv_compressor, "elastic": self._elastic}

    def save_state(self) -> Any:
        """As ``llama_cpp.Llama.save_state``; a compressed cache is saved as it is, logits with ``logits_all`` only."""
        state: Any = llama_cpp.LlamaState(
            input_ids=self.input_ids.copy(),
            scores=self._scores[: self.n_tokens if self._logits_all else 0].copy(),
            n_tokens=self.n_tokens,
            llama_state=(data := states.save(self.ctx)),
            llama_state_size=len(data),
            seed=self._seed,
        )
        state.kv_compressed = list(self._compressed)
        state.kv_swa = self._swa_state
        return state

    def load_state(self, state: Any) -> None:
        """As ``llama_cpp.Llama.load_state``; full and compressed states may follow each other.

        Raises:
            StateError: the state is of another model, or its cache does not fit into this one.
        """
        if state.n_tokens >= self._n_ctx:
            raise StateError(f"the state has {state.n_tokens} tokens, too many for a context of n_ctx={self._n_ctx}")
        self.reset()
        states.load(self.ctx, state.llama_state)
        if self._logits_all:
            self.scores[: len(state.scores)] = state.scores
        self.input_ids[: state.n_tokens] = state.input_ids[: state.n_tokens]
        self.n_tokens = self._n_seen = state.n_tokens
        self._seed = state.seed
        self._requires_eval = True
        self._compressed = list(getattr(state, "kv_compressed", []))
        self._swa_state = getattr(state, "kv_swa", None)


def _check_method(method: Any) -> None:
    if method is not None and not isinstance(method, Method):
        raise ConfigError(f"kv_compressor={method!r} is not a method, e.g. KVCompose(compression_ratio=0.75)")


class _Decoder:
    """The scoring pass's view of a Llama (scoring.Decoder)."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        self.n_batch = llama.n_batch
        self.n_ubatch = int(llama_cpp.llama_n_ubatch(llama.ctx))

    def prefill(self, tokens: Sequence[int], keep_prefix: bool) -> int:
        return self._llama._prefill(list(tokens), keep_prefix)

    def decode(self, tokens: Sequence[int], pos: int) -> None:
        llama = self._llama
        llama._batch.set_batch(batch=tokens, n_past=pos, logits_all=False)
        llama._batch.batch.logits[len(tokens) - 1] = False  # no output: the model's head is not computed
        llama._ctx.decode(llama._batch)

    def on_top(self, pos: int) -> contextlib.AbstractContextManager[None]:
        return self._llama._on_top(pos)


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start
