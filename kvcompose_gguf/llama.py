"""Adds KV-cache compression to llama-cpp-python's ``Llama``: the cache shrinks after the prompt is read."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from . import __version__, kernels, sessions
from .access import Access, changes_cache, inherits, reads_cache, reads_model, seal
from .errors import ConfigError, ContextLengthError, NativeError, StateError, UnsupportedError
from .methods.base import Method, choice_of
from .models.identity import Identity, model_id
from .native import bindings, library, states
from .native.rows import ContextRows, write_values
from .native.session import KVSession, start_small
from .plan import seam
from .plan.composed import Composed
from .plan.composition import CompositionPlan
from .plan.geometry import KVCells, LayerGeometry
from .plan.report import KVReport
from .scoring.collect import Attention, Reader
from .scoring.evidence import Evidence
from .scoring.requests import AttentionRequest
from .sessions import SessionInfo, Snapshot
from .support.progress import Meter, Progress

llama_cpp = library.load()

T = TypeVar("T")

#: context options that change the rotation of the keys
_ROPE_SETTINGS = (
    "rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast",
    "yarn_beta_slow", "yarn_orig_ctx",
)  # fmt: skip

#: cells of an empty elastic cache, and free cells that it reserves after a prompt
START_CELLS = 256


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
class Llama(llama_cpp.Llama):  # type: ignore[misc, name-defined]
    """llama-cpp-python's ``Llama`` with KV-cache compression.

    It prefills, scores and composes a prompt before it samples the first token. A later prompt that begins with the
    compressed context continues from it. With ``kv_compressor=None`` it behaves like the original class.

    Several threads may share one object: a call that uses the cache waits for the calls of other threads. While a
    stream is open, calls that change the cache raise ``StateError``; exhaust the stream or ``close()`` it first. After
    ``close()``, or after the end of a ``with`` block, every public attribute raises ``StateError``.

    Args:
        kv_compressor: the method with its options; ``None``: keep the full cache.
        elastic: allocate memory only for the tokens that the cache holds. The cache then grows in steps, shrinks when
            it is composed and is small again after ``reset()``. False: allocate all of ``n_ctx``, as the original does.
        **kwargs: arguments of ``llama_cpp.Llama``.
    Raises:
        UnsupportedError: compression does not support this model, its cache or the other arguments.
    """

    n_tokens: int  # from llama_cpp.Llama: number of tokens in the cache
    _kv_session: KVSession | None = None

    def __init__(
        self, model_path: str, *, kv_compressor: Method | None = None, elastic: bool = True, **kwargs: Any
    ) -> None:
        self._access = Access()
        self._stack = contextlib.ExitStack()  # the original's close() needs it, even if __init__ fails early
        self._method: Method | None = None
        _check_method(kv_compressor)
        #: figures of the cache's compression; None while the cache is full and nobody asked to compress it
        self.kv_report: KVReport | None = None
        self._composed: Composed | None = None  # None: the cache is full
        self._meter = Meter()
        self._own_identity: Identity | None = None
        # embed() empties the cache before every batch, so an elastic cache would shrink and grow each time
        self._elastic = elastic and not kwargs.get("embedding", False)
        self._n_seen = 0  # tokens that eval() has evaluated; image handlers decode without it
        with start_small(START_CELLS if self._elastic else 0):
            super().__init__(model_path, **kwargs)
        try:
            self.kv_compressor = kv_compressor
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Waits for running calls, then frees the context and the model; all later calls raise StateError."""
        with self._access.closing() as first:
            if not first:
                return
            if self._kv_session is not None:
                self._kv_session.close()
            super().close()
            for name in ("_ctx", "_model", "_batch"):  # tokenizers, generators and other objects may hold them
                if name in self.__dict__:
                    seal(self.__dict__[name])
        seal(self)

    def __enter__(self) -> Llama:
        with self._access.look():
            return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def kv_compressor(self) -> Method | None:
        """Returns the method that compresses the next prompt, or None.

        You can change it at any time. A prompt that another method has compressed is then read again for the new
        method; with ``None`` it is read into a full cache.
        """
        return self._method

    @kv_compressor.setter
    @changes_cache
    def kv_compressor(self, method: Method | None) -> None:
        _check_method(method)
        if method is not None:
            if method.simulated:
                raise UnsupportedError(f"{type(method).__name__} is only simulated: run it with kvcompose eval")
            method = method.for_model(Path(self.model_path))
            method.check_budget(self._session.layers)  # raises if this context cannot be compressed
            self._session.set_fast_attention(True)
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

    @changes_cache
    def compress(
        self, context: str | bytes | Sequence[int], on_progress: Callable[[Progress], None] | None = None
    ) -> KVReport:
        """Prefills and compresses a context now, without generating; prompts that begin with it continue from it.

        Args:
            context: text, tokenized as ``create_completion`` does it, or token ids.
            on_progress: called at the start of each step, and after every batch of tokens that is read or scored.
        Returns:
            The figures, also kept as ``kv_report``.
        Raises:
            ConfigError: ``kv_compressor`` is None, or the context is empty.
            ContextLengthError: the context and at least one more token do not fit into ``n_ctx``.
        """
        if self.kv_compressor is None:
            raise ConfigError("kv_compressor is None: set a method first, e.g. KVCompose(compression_ratio=0.75)")
        tokens = self._prompt_tokens(context)
        if not tokens:
            raise ConfigError("the context is empty: give at least one token")
        self._meter = Meter(on_progress)
        try:
            return self._compress(tokens, self.kv_compressor)
        finally:
            self._meter = Meter()

    @property
    @reads_cache
    def session(self) -> KVSession:
        """Returns numpy access to rows, scores and probes; do not use it while another thread decodes."""
        return self._session

    @reads_cache
    def decoder(self) -> Reader:
        """Returns the interface through which scoring uses this model."""
        return _Decoder(self)

    @property
    @reads_model
    def n_ctx_train(self) -> int:
        """Returns the context length, in tokens, that the model was trained for."""
        return int(self._model.n_ctx_train())

    @property
    @reads_cache
    def kv_layers(self) -> tuple[LayerGeometry, ...]:
        """Returns the layers that compression covers, in order."""
        return self._session.layers

    @changes_cache
    def prefill(self, context: str | bytes | Sequence[int]) -> int:
        """Makes a full cache hold exactly ``context``; returns how many tokens had to be evaluated.

        Raises:
            ContextLengthError: the context does not fit into ``n_ctx``.
        """
        return self._prefill(self._prompt_tokens(context))

    @changes_cache
    def write_values(self, values: Sequence[npt.NDArray[np.float32]]) -> None:
        """Replaces the values of the first rows; takes float32 ``(n_head_kv, n_rows, n_embd_head_v)`` per layer."""
        if len(values) > len(self.kv_layers):
            raise ConfigError(f"values has {len(values)} layers; give at most the {len(self.kv_layers)} of the cache")
        for ikv, rows in enumerate(values):
            write_values(self._session, ikv, rows)

    @changes_cache
    def observe(self, context: str | bytes | Sequence[int], method: Method, suffix: Sequence[int] = ()) -> Evidence:
        """Prefills a context and returns the evidence that ``method.plan()`` needs; the cache stays full.

        Args:
            context: as for ``compress``; tokens that the cache holds already are not evaluated again.
            method: a method; use the one that ``for_model`` returns if it depends on the model.
            suffix: tokens that follow the context in its prompt.
        Raises:
            ContextLengthError: the context does not fit, or leaves no cell for the queries on top of it.
        """
        tokens = self._prompt_tokens(context)
        return self._evidence(tokens, self._attention(tokens, method.attention_request, suffix, method), method)

    @changes_cache
    def compose(self, plan: CompositionPlan, n_room: int = 256) -> None:
        """Applies ``plan`` to the cache; prompts that begin with its tokens continue from it.

        Args:
            n_room: free cells to leave after the composites; the cache grows beyond them when needed.
        Raises:
            ConfigError: the plan does not fit this cache.
            StateError: the cache does not hold exactly the plan's tokens, or is composed already.
        """
        if self._composed is not None:
            raise StateError(f"the cache is compressed already, from {self.n_context} tokens: call reset() first")
        tokens = tuple(self._input_ids[: plan.n_tokens].tolist())
        windows = states.save_windows(self.ctx, self._session.state())
        composed = Composed(tokens, choice_of(self._method), plan.bits(), windows)
        try:
            self._session.compose(plan, n_room)
        finally:  # Ctrl-C may arrive after the cache has changed
            self._composed = composed if self._session.state().n_composed else None

    @property
    def n_context(self) -> int:
        """Returns the number of tokens of the compressed context, which cannot be cut; 0: the cache is full."""
        return 0 if self._composed is None else len(self._composed.tokens)

    @property
    def _compressed(self) -> list[int]:
        """Returns the tokens of the compressed context; empty: the cache is full."""
        return [] if self._composed is None else list(self._composed.tokens)

    @reads_cache
    def kv_cells(self, il: int) -> KVCells:
        """Returns how many rows of the ``il``-th cached layer are allocated, and how many are in use."""
        return self._session.cells(il)

    @property
    @reads_cache
    def kv_bytes(self) -> int:
        """Returns the current bytes of all K and V buffers, except those of sliding-window layers."""
        return self._session.state().n_bytes

    def _compress(self, tokens: list[int], method: Method, suffix: Sequence[int] = ()) -> KVReport:
        """Runs prefill -> scores -> plan -> compose; ``suffix`` follows the context in its prompt."""
        n_tokens = len(tokens)
        if n_tokens >= self._n_ctx:
            raise ContextLengthError(f"{n_tokens} tokens and one more do not fit into n_ctx={self._n_ctx}: raise n_ctx")

        session = self._session
        compressing = n_tokens >= method.min_tokens
        attention = self._attention(tokens, method.attention_request if compressing else None, suffix, method)
        kv_bytes_before = session.state().n_bytes
        n_kept = np.full(len(session.layers), n_tokens)
        forced = (0, 0)
        state_seconds = score_seconds = plan_seconds = compose_seconds = 0.0
        if compressing:
            evidence, state_seconds = _timed(lambda: self._evidence(tokens, attention, method))
            scores, score_seconds = _timed(lambda: method.scores(evidence))
            plan, plan_seconds = _timed(lambda: method.plan(evidence, scores))
            _, compose_seconds = _timed(lambda: self.compose(plan, method.n_room))
            n_kept, forced = plan.n_kept, method.forced(session.layers, n_tokens)

        self.kv_report = KVReport(
            n_tokens=n_tokens,
            n_kept=n_kept,
            n_sink=forced[0],
            n_recent=forced[1],
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
        """Prefills ``tokens`` and returns the attention that ``request`` asks for."""
        if request is None:
            n_prefilled, seconds = _timed(lambda: self._prefill(tokens))
            return Attention([], n_prefilled, seconds, 0.0, 0)
        try:
            return request.collect(self.decoder(), tokens, suffix, self._tokens, method.max_score_bytes)
        finally:
            self._requires_eval = True  # the last logits belong to another decode

    def _evidence(self, tokens: list[int], attention: Attention, method: Method) -> Evidence:
        """Returns the data that ``method`` reads; ``tokens`` must be in a full cache."""
        request = method.state_request
        queries = [] if request is None else request.collect(self.decoder(), tokens)
        rows = ContextRows(self._session, len(tokens))
        return Evidence(len(tokens), self._session.layers, attention.layers, attention.n_window, rows, queries)

    def _prefill(self, tokens: list[int], keep_prefix: bool = True) -> int:
        """Makes a full cache hold exactly ``tokens``; returns how many had to be evaluated."""
        if len(tokens) > self._n_ctx:
            raise ContextLengthError(f"{len(tokens)} tokens do not fit into n_ctx={self._n_ctx}: raise n_ctx")
        n_reused = 0 if self._composed or not keep_prefix else seam.common_prefix(self._input_ids.tolist(), tokens)
        if n_reused < self.n_tokens and self._session.state().n_cells_swa:
            n_reused = 0  # sliding windows cannot go back: they have dropped the tokens before them
        if n_reused == 0 or not self._ctx.kv_cache_seq_rm(-1, n_reused, -1):
            self.reset()
            n_reused = 0
        self.n_tokens = n_reused
        self._requires_eval = True
        self._meter.begin("reading", len(tokens) - n_reused)
        if n_reused < len(tokens):
            self.eval(tokens[n_reused:])
        return len(tokens) - n_reused

    def _back_to_context(self) -> None:
        """Removes the tokens after the compressed context and restores the sliding windows as they were at its end."""
        assert self._composed is not None
        assert self._composed.windows is not None
        n_context, self.n_tokens = self.n_context, 0  # after an error below, the cache counts as empty
        self._ctx.kv_cache_seq_rm(-1, n_context, -1)
        states.load_windows(self.ctx, self._composed.windows)
        self.n_tokens = n_context

    @contextlib.contextmanager
    def _on_top(self, pos: int) -> Iterator[None]:
        windows = states.save_windows(self.ctx, self._session.state())
        n_tokens, self.n_tokens = self.n_tokens, 0  # as above
        try:
            yield
        finally:
            self._ctx.kv_cache_seq_rm(-1, pos, -1)
            if windows is not None:
                states.load_windows(self.ctx, windows)
            self.n_tokens = n_tokens

    #
    # tokens
    #

    def _tokens(self, text: str | bytes) -> list[int]:
        """Returns the tokens of a text that follows another text."""
        raw = text.encode() if isinstance(text, str) else text
        return list(super().tokenize(raw, add_bos=False, special=True))

    def _prompt_tokens(self, prompt: str | bytes | Sequence[int]) -> list[int]:
        """Returns the tokens of a prompt as ``create_completion`` makes them, with BOS if the model wants it."""
        if not isinstance(prompt, (str, bytes)):
            return [int(token) for token in prompt]
        bos = [self.token_bos()] if self.adds_bos else []
        return bos + self._tokens(prompt)

    @reads_model
    def piece(self, token: int, special: bool = False) -> bytes:
        """Returns the bytes of a token; a control token has none, but its name with ``special``."""
        size = 64
        while True:  # the bindings' detokenize() drops tokens of more than 32 bytes
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._model.vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def _at_seam(self, tokens: list[int], context: Sequence[int] | None = None) -> list[int] | None:
        """Returns ``tokens`` rewritten to begin with ``context``, or the compressed one; None if they diverge."""
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
        """Yields tokens like ``llama_cpp.Llama.generate``, but compresses a long prompt before it samples the first.

        Raises:
            ConfigError: from the first ``next()``: the prompt is empty.
        """
        with self._access.look():
            return self._access.stream(self._generate(list(tokens), *args, reset=reset, **kwargs))

    def _generate(self, tokens: list[int], *args: Any, reset: bool, **kwargs: Any) -> Generator[int, Any, None]:
        if not tokens and (reset or not self.n_tokens):
            raise ConfigError("the prompt is empty: give at least one token")
        if reset and (self._method is not None or self._composed is not None):
            self._prepare(tokens, self._method)
        yield from super().generate(tokens, *args, reset=reset, **kwargs)

    def _prepare(self, tokens: list[int], method: Method | None) -> None:
        """Makes the cache hold the compressed beginning of ``tokens``, from which generate() continues."""
        if self._composed is not None:
            n_context = self.n_context
            # sampling needs the last token's logits, so at least one token must be left to evaluate
            continues = len(tokens) > n_context and tuple(tokens[:n_context]) == self._composed.tokens
            if continues and self._composed.choice == choice_of(method):
                if self._composed.windows is not None:
                    n_same = seam.common_prefix(self._input_ids.tolist(), tokens)
                    if n_same < self.n_tokens:
                        self._back_to_context()
                return
            self.reset()
        if self.n_tokens > self._n_seen:
            return  # part of the prompt is not text, so its tokens cannot be evaluated again
        self.kv_report = None
        if method is None:
            return
        n_context = len(tokens) - max(1, method.keep_last)
        if n_context >= method.min_tokens:
            self._compress(tokens[:n_context], method, tokens[n_context:])

    def _create_completion(self, prompt: Any, suffix: str | None = None, echo: bool = False, **kwargs: Any) -> Any:
        # the caller does not know the tokens yet; later its offsets would no longer agree with new ones
        if self._composed is not None and suffix is None and not (echo and isinstance(prompt, str)):
            tokens = self._prompt_tokens(prompt)
            joined = self._at_seam(tokens)
            if joined is not None and joined != tokens:
                prompt = joined
        return self._access.stream(super()._create_completion(prompt=prompt, suffix=suffix, echo=echo, **kwargs))

    @changes_cache
    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluates ``tokens`` like ``llama_cpp.Llama.eval``; never compresses."""
        self._begin_eval(len(tokens))
        for first in range(0, len(tokens), self.n_batch):
            part = tokens[first : first + self.n_batch]
            super().eval(part)
            self._n_seen = self.n_tokens
            self._meter.add(len(part))

    def _begin_eval(self, n: int) -> None:
        if 0 < self.n_tokens < self.n_context:
            where = f"position {self.n_tokens} is inside the compressed context of {self.n_context} tokens"
            raise StateError(f"{where}: call reset() first")
        if self._composed is not None and self.n_tokens == 0:
            self.reset()
        if self._elastic and n > START_CELLS and self._composed is None:
            self._reserve(self.n_tokens + n + START_CELLS)

    @changes_cache
    def eval_logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Evaluates ``tokens`` after the cached ones and returns the logits after each, float32 ``(n, n_vocab)``.

        Raises:
            ContextLengthError: the tokens do not fit into ``n_ctx``.
        """
        if self.n_tokens + len(tokens) > self._n_ctx:
            raise ContextLengthError(f"{self.n_tokens} + {len(tokens)} tokens do not fit into n_ctx={self._n_ctx}")
        self._begin_eval(len(tokens))
        self._requires_eval = True  # after an interruption, the last logits may belong to another token
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

    @changes_cache
    def truncate(self, n_tokens: int) -> None:
        """Removes all tokens after the first ``n_tokens``.

        Raises:
            StateError: the cache has fewer tokens, or ``n_tokens`` is inside the compressed context, or the model has
                sliding windows, which no longer hold the tokens before them (``can_truncate``).
        """
        if not self.n_context <= n_tokens <= self.n_tokens:
            raise StateError(f"n_tokens={n_tokens} is not in [{self.n_context}, {self.n_tokens}]")
        if n_tokens < self.n_tokens and (not self.can_truncate or not self._ctx.kv_cache_seq_rm(-1, n_tokens, -1)):
            raise StateError(f"n_tokens={n_tokens}: this cache cannot remove only its last tokens: call reset()")
        self.n_tokens = n_tokens
        self._requires_eval = True

    @property
    @reads_model
    def adds_bos(self) -> bool:
        """Returns whether the tokens of a text begin with BOS."""
        return bool(self._model.add_bos_token()) and self.token_bos() != -1

    @property
    @reads_cache
    def can_truncate(self) -> bool:
        """Returns whether ``truncate`` can remove any number of tokens; with sliding windows it cannot."""
        return not self._session.state().n_cells_swa

    @reads_model
    def is_end(self, token: int) -> bool:
        """Returns whether ``token`` ends a generation: end of text, end of turn, …"""
        return bool(llama_cpp.llama_vocab_is_eog(self._model.vocab, token))

    def _reserve(self, n_cells: int) -> None:
        """Allocates ``n_cells`` at once; a context that cannot be compressed, or lacks the memory, grows in steps."""
        with contextlib.suppress(UnsupportedError, NativeError):
            self._session.reserve(min(n_cells, self._session.state().n_cells))

    @changes_cache
    def reset(self) -> None:
        """Empties the cache; a compressed cache becomes a full one again, and an elastic cache becomes small."""
        super().reset()
        self._n_seen = 0
        self.kv_report = None
        if self._composed is not None or self._elastic:
            self._composed = None
            self._ctx.kv_cache_clear()
        if self._elastic:
            self._reserve(0)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the constructor's arguments, as the original does; a pickled Llama has an empty cache."""
        return {**super().__getstate__(), "kv_compressor": self._method, "elastic": self._elastic}

    @reads_cache
    def save_state(self) -> Any:
        """Returns a state like ``llama_cpp.Llama.save_state``, full or compressed; logits only with ``logits_all``."""
        data = states.save(self.ctx).tobytes()
        state: Any = llama_cpp.LlamaState(
            input_ids=self.input_ids.copy(),
            scores=self._scores[: self.n_tokens if self._logits_all else 0].copy(),
            n_tokens=self.n_tokens,
            llama_state=data,
            llama_state_size=len(data),
            seed=self._seed,
        )
        state.kv_composed, state.kv_report = self._composed, self.kv_report
        return state

    @changes_cache
    def load_state(self, state: Any) -> None:
        """Restores a state like ``llama_cpp.Llama.load_state``, full or compressed, whatever the cache holds now.

        Raises:
            StateError: the state belongs to another model, or does not fit into this cache.
        """
        self._restore(
            state.input_ids[: state.n_tokens],
            state.llama_state,
            getattr(state, "kv_composed", None),
            getattr(state, "kv_report", None),
            choice_of(self._method),
        )
        if self._logits_all:
            self.scores[: len(state.scores)] = state.scores
        self._seed = state.seed

    def _restore(
        self,
        tokens: Sequence[int] | npt.NDArray[np.integer],
        data: bytes | npt.NDArray[np.uint8],
        composed: Composed | None,
        report: KVReport | None,
        choice: str | None,
    ) -> None:
        """Fills the cache from saved bytes.

        Args:
            choice: the ``Composed.choice`` under which a compressed context continues; None: the saved one.
        """
        if len(tokens) >= self._n_ctx:
            raise StateError(f"the state has {len(tokens)} tokens, too many for a context of n_ctx={self._n_ctx}")
        self.reset()
        states.load(self.ctx, data)
        self.input_ids[: len(tokens)] = tokens
        self.n_tokens = self._n_seen = len(tokens)
        self._requires_eval = True
        if composed is not None and choice is not None:
            composed = replace(composed, choice=choice)
        self._composed = composed
        self.kv_report = report

    @reads_cache
    def save_session(self, path: str | Path, extra: Mapping[str, Any] | None = None) -> SessionInfo:
        """Writes a session file for ``load_session``; replaces an old file only when the new one is complete.

        Args:
            extra: the caller's own values, stored as JSON.
        Raises:
            StateError: the file cannot be written.
            ConfigError: ``extra`` is not JSON, or the cache is empty.
        """
        return sessions.save(self._snapshot(extra or {}), Path(path))

    @changes_cache
    def load_session(self, path: str | Path) -> SessionInfo:
        """Loads a file of ``save_session``; its context continues under the current ``kv_compressor``.

        Raises:
            StateError: the file is missing or damaged, or was made with another model, cache type, setting or version.
                The cache is unchanged then; it is empty if llama.cpp itself refuses the rows, e.g. without memory for
                them.
        """
        return self._load_session(Path(path), choice_of(self._method))

    @changes_cache
    def _load_session(self, path: Path, choice: str | None, name: str = "") -> SessionInfo:
        """Does what ``load_session`` does, but continues under ``choice``; None: only under the saved choice."""
        name = name or str(path)
        with sessions.opened(path, name) as (saved, info):
            self.identity.check_loads(saved.identity, name)
            if len(saved.tokens) >= self._n_ctx:
                raise StateError(f"{name} has {len(saved.tokens)} tokens, n_ctx={self._n_ctx} is too small: raise it")
            if not 0 <= saved.tokens.min(initial=0) <= saved.tokens.max(initial=0) < self.n_vocab():
                raise StateError(f"{name} has tokens that are not in the vocabulary of this model")
            self._restore(saved.tokens, saved.state, saved.composed, saved.report, choice)
            return info

    def _snapshot(self, extra: Mapping[str, Any], allow_empty: bool = False) -> Snapshot:
        """Returns the cache and its metadata, as a value to save."""
        if not self.n_tokens and not allow_empty:
            raise ConfigError("the cache is empty: evaluate a prompt before you save it")
        kv_bytes = 0
        with contextlib.suppress(UnsupportedError):  # the model supports saving, but not compression
            kv_bytes = self._session.state().n_bytes
        tokens = self._input_ids.astype(np.int32)
        data = states.save(self.ctx)
        return Snapshot(self.identity, tokens, data, self._composed, self.kv_report, kv_bytes, dict(extra))

    @property
    @reads_model
    def identity(self) -> Identity:
        """Returns what the cached rows depend on: the model, context options and versions."""
        if self._own_identity is None:
            self._own_identity = identity_of(self)
        return self._own_identity


def _check_method(method: Any) -> None:
    if method is not None and not isinstance(method, Method):
        raise ConfigError(f"kv_compressor={method!r} is not a method: use e.g. KVCompose(compression_ratio=0.75)")


def identity_of(llama: Llama) -> Identity:
    """Returns what the cached rows of ``llama`` depend on: the model, context options and versions."""
    params, kinds = llama.context_params, GGMLQuantizationType
    settings = {
        "type_k": kinds(params.type_k).name.lower(),
        "type_v": kinds(params.type_v).name.lower(),
        "flash_attn": params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
        "swa_full": bool(params.swa_full),
        "lora_path": llama.lora_path,
        "lora_scale": llama.lora_scale if llama.lora_path else None,
        "kv_overrides": repr(llama.kv_overrides) if llama.kv_overrides else None,
        **{name: getattr(params, name) for name in _ROPE_SETTINGS},
    }
    versions = {
        "kvcompose-gguf": __version__,
        "llama.cpp": bindings.declare(llama_cpp.llama_cpp._lib).llama_kvc_commit().decode(),
        "llama-cpp-python": llama_cpp.__version__,
    }
    return Identity(Path(llama.model_path).name, model_id(Path(llama.model_path)), settings, versions)


class _Decoder:
    """Implements ``scoring.collect.Reader`` for a Llama."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        self.session = llama._session
        self.n_batch = llama.n_batch
        self.meter = llama._meter
        self.n_ubatch = int(llama_cpp.llama_n_ubatch(llama.ctx))

    def prefill(self, tokens: Sequence[int], keep_prefix: bool = True) -> int:
        return self._llama._prefill(list(tokens), keep_prefix)

    def decode(self, tokens: Sequence[int], pos: int) -> None:
        llama = self._llama
        llama._batch.set_batch(batch=tokens, n_past=pos, logits_all=False)
        llama._batch.batch.logits[len(tokens) - 1] = False  # no output, so the output layer is not computed
        llama._ctx.decode(llama._batch)
        self.meter.add(len(tokens))

    def on_top(self, pos: int) -> contextlib.AbstractContextManager[None]:
        return self._llama._on_top(pos)


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start
