"""Adds KV-cache compression to llama-cpp-python's ``Llama``: the cache shrinks after the prompt is read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import compression, kernels
from .access import changes_cache, reads_cache
from .ceiling import Ceiling
from .errors import ConfigError, UnsupportedError
from .llama_base import LlamaBase, Prompt, llama_cpp
from .methods.base import Method
from .methods.continuing import choice_of
from .plan.composed import Contents
from .plan.composition import CompositionPlan
from .plan.report import KVReport
from .scoring.evidence import Evidence
from .sessions.info import SessionInfo
from .sessions.live import load_context, save_context
from .support.progress import Meter, Progress

#: tokens that a method's contexts compute at once on the CPU: as fast as llama.cpp's 512, in a quarter of the memory
N_UBATCH = 128


class Llama(LlamaBase):
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
        weights_of: another ``Llama`` of the same file, to share its weights; close it last. None: load the weights.
        **kwargs: arguments of ``llama_cpp.Llama``. With a method and without a GPU, ``n_ubatch`` is 128 by default:
            llama.cpp's working memory grows with it and with the longest layer, and the CPU is as fast with 128.
    Attributes:
        context: the owner of the cache, for everything that is not here.
    Raises:
        ConfigError: ``weights_of`` has another file, or an option of the method is out of range.
        UnsupportedError: compression does not support this model, its cache or the other arguments.
    """

    def __init__(
        self,
        model_path: str,
        *,
        kv_compressor: Method | None = None,
        elastic: bool = True,
        weights_of: LlamaBase | None = None,
        **kwargs: Any,
    ) -> None:
        self._method: Method | None = None
        _check_method(kv_compressor)
        if kv_compressor is not None and not kwargs.get("n_gpu_layers") and not kwargs.get("embedding"):
            kwargs.setdefault("n_ubatch", N_UBATCH)
        super().__init__(model_path, elastic=elastic, weights_of=weights_of, **kwargs)
        try:
            self.kv_compressor = kv_compressor
        except Exception:
            self.close()
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Returns the constructor's arguments, as the original does; a pickled Llama has an empty cache."""
        return {**super().__getstate__(), "kv_compressor": self._method, "elastic": self.elastic}

    #
    # compression
    #

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
            method.check_budget(self.context.session.layers)  # raises if this context cannot be compressed
            kernels.warm_up()
        self.context.set_fast_attention(method is not None)
        self.context.ceiling = Ceiling(self.context, method) if method is not None and method.has_ceiling else None
        self._method = method

    @property
    def kv_report(self) -> KVReport | None:
        """Returns the figures of the compression; None while the cache is full and nobody asked to compress it."""
        return self.context.report

    @changes_cache
    def compress(self, context: Prompt, on_progress: Callable[[Progress], None] | None = None) -> KVReport:
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
        tokens = self.prompt_tokens(context)
        if not tokens:
            raise ConfigError("the context is empty: give at least one token")
        self.context.meter = Meter(on_progress, lambda: self.kv_bytes)
        try:
            return compression.compress(self.context, tokens, self.kv_compressor)
        finally:
            self.context.meter = Meter()

    @changes_cache
    def observe(self, context: Prompt, method: Method, suffix: Sequence[int] = ()) -> Evidence:
        """Prefills a context and returns the evidence that ``method.plan()`` needs; the cache stays full.

        Args:
            context: as for ``compress``; tokens that the cache holds already are not evaluated again.
            method: a method; use the one that ``for_model`` returns if it depends on the model.
            suffix: tokens that follow the context in its prompt.
        Raises:
            ContextLengthError: the context does not fit, or leaves no cell for the queries on top of it.
        """
        return compression.observe(self.context, self.prompt_tokens(context), method, suffix)

    @changes_cache
    def compose(self, plan: CompositionPlan, n_room: int = 256) -> None:
        """Applies ``plan`` to the cache, as ``Context.compose``; prompts that begin with its tokens continue."""
        self.context.compose(plan, choice_of(self._method), n_room)

    @changes_cache
    def prefill(self, context: Prompt) -> int:
        """Makes a full cache hold exactly ``context``; returns how many tokens had to be evaluated.

        Raises:
            ContextLengthError: the context does not fit into ``n_ctx``.
        """
        return self.context.prefill(self.prompt_tokens(context))

    @reads_cache
    def save_state(self) -> Any:
        """Returns a state like ``llama_cpp.Llama.save_state``, full or compressed; logits only with ``logits_all``."""
        contents = self.context.save()
        state: Any = llama_cpp.LlamaState(
            input_ids=self.input_ids.copy(),
            scores=self._scores[: self.n_tokens if self._logits_all else 0].copy(),
            n_tokens=self.n_tokens,
            llama_state=bytes(contents.state),
            llama_state_size=len(contents.state),
            seed=self._seed,
        )
        state.kv_composed, state.kv_report, state.kv_image = contents.composed, contents.report, contents.first_image
        return state

    @changes_cache
    def load_state(self, state: Any) -> None:
        """Restores a state like ``llama_cpp.Llama.load_state``, full or compressed, whatever the cache holds now.

        Raises:
            StateError: the state belongs to another model, or does not fit into this cache.
        """
        ours = [getattr(state, name, None) for name in ("kv_composed", "kv_report", "kv_image")]
        contents = Contents(state.input_ids[: state.n_tokens], state.llama_state, *ours)
        self.context.load(contents, choice_of(self._method))
        if self._logits_all:
            self.scores[: len(state.scores)] = state.scores
        self._seed = state.seed

    @reads_cache
    def save_session(self, path: str | Path, extra: Mapping[str, Any] | None = None) -> SessionInfo:
        """Writes a session file for ``load_session``; replaces an old file only when the new one is complete.

        Args:
            extra: the caller's own values, stored as JSON.
        Raises:
            StateError: the file cannot be written.
            ConfigError: ``extra`` is not JSON, or the cache is empty.
        """
        return save_context(self.context, self.identity, Path(path), extra or {})

    @changes_cache
    def load_session(self, path: str | Path) -> SessionInfo:
        """Loads a file of ``save_session``; its context continues under the current ``kv_compressor``.

        Raises:
            StateError: the file is missing or damaged, or was made with another model, cache type, setting or version.
                The cache is unchanged then; it is empty if llama.cpp itself refuses the rows, e.g. without memory for
                them.
        """
        return load_context(self.context, self.identity, Path(path), choice_of(self._method))

    #
    # generating
    #

    def generate(
        self, tokens: Sequence[int], *args: Any, reset: bool = True, **kwargs: Any
    ) -> Generator[int, Any, None]:
        """Yields tokens like ``llama_cpp.Llama.generate``, but compresses a long prompt before it samples the first.

        Raises:
            ConfigError: from the first ``next()``: the prompt is empty.
        """
        with self.access.look():
            steps: Generator[int, Any, None] = self.access.stream(
                self._generate(list(tokens), *args, reset=reset, **kwargs)
            )
            return steps

    def _generate(self, tokens: list[int], *args: Any, reset: bool, **kwargs: Any) -> Generator[int, Any, None]:
        if not tokens and (reset or not self.n_tokens):
            raise ConfigError("the prompt is empty: give at least one token")
        if reset and (self._method is not None or self.context.composed is not None):
            compression.prepare(self.context, tokens, self._method)
        yield from super().generate(tokens, *args, reset=reset, **kwargs)

    def _create_completion(self, prompt: Any, suffix: str | None = None, echo: bool = False, **kwargs: Any) -> Any:
        # the caller does not know the tokens yet; later its offsets would no longer agree with new ones
        composed = self.context.composed
        if composed is not None and suffix is None and not (echo and isinstance(prompt, str)):
            tokens = self.prompt_tokens(prompt)
            joined = self.context.vocabulary.joined(tokens, composed.tokens.tolist())
            if joined is not None and joined != tokens:
                prompt = joined
        return self.access.stream(super()._create_completion(prompt=prompt, suffix=suffix, echo=echo, **kwargs))


def _check_method(method: Any) -> None:
    if method is not None and not isinstance(method, Method):
        raise ConfigError(f"kv_compressor={method!r} is not a method: use e.g. KVCompose(compression_ratio=0.75)")
