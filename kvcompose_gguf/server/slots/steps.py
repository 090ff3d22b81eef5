"""What a generation is asked, and the steps that it tells: values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ...methods import Method
from ...plan.report import KVReport
from .sampling import Chosen, Sampling

#: tokens that memory is reserved for if the length of an answer is not limited
N_UNBOUNDED = 1024

StopType = Literal["none", "eos", "word", "limit"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The inputs of a generation.

    Attributes:
        tokens: the prompt's tokens.
        sampling: options of the samplers.
        method: the method that compresses the prompt. None: no compression.
        n_predict: maximum number of tokens. -1: as many as fit. 0 means 1.
        n_indent: stop at a line that is indented by fewer spaces.
        t_max_predict_ms: stop at the first line end after this time. -1: no limit.
        stops: stop strings.
        preserved: control tokens that are part of the text, e.g. those around a tool call.
        ignore_eos: reported in the answer's settings. ``sampling`` forbids the end tokens.
        reuse: whether the prompt may continue what is in the cache.
        n_probs: number of most probable tokens to report for every token.
        post_sampling_probs: report probabilities after the samplers, not before them.
    """

    tokens: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    method: Method | None = None
    n_predict: int = -1
    n_indent: int = 0
    t_max_predict_ms: int = -1
    stops: tuple[str, ...] = ()
    preserved: frozenset[int] = frozenset()
    ignore_eos: bool = False
    reuse: bool = True
    n_probs: int = 0
    post_sampling_probs: bool = False

    def n_most(self, n_ctx: int) -> int:
        """Returns for how many tokens to reserve memory: ``N_UNBOUNDED`` for an answer without a limit."""
        n_predict = N_UNBOUNDED if self.n_predict < 0 else self.n_predict
        return min(n_ctx, len(self.tokens) + n_predict)


@dataclass(frozen=True)
class Progress:
    """A part of the prompt was read: ``processed`` of ``total`` tokens. ``cache`` of them were in the cache before.

    The cache takes ``kv_bytes`` bytes now.
    """

    total: int
    cache: int
    processed: int
    time_ms: int
    kv_bytes: int

    @property
    def timings(self) -> Timings:
        """The timings so far."""
        n = self.processed - self.cache
        seconds = self.time_ms / 1000 if n else 0.0
        return Timings(cache_n=self.cache, prompt_n=n, prompt_seconds=seconds, predicted_n=0, predicted_seconds=0.0)


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token was generated.

    Attributes:
        text: text that can be shown now, of this token and of earlier ones.
        chosen: the token and its probabilities.
        n_decoded: number of tokens so far, including this one.
        timings: the timings so far.
    """

    text: str
    chosen: Chosen
    n_decoded: int
    timings: Timings


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Token counts and seconds of a generation.

    Attributes:
        cache_n: prompt tokens that were in the cache.
        prompt_n: prompt tokens that were evaluated.
        prompt_seconds: seconds until the first token was sampled, including compression.
        predicted_n: tokens generated.
        predicted_seconds: seconds from the first generated token to the last.
    """

    cache_n: int
    prompt_n: int
    prompt_seconds: float
    predicted_n: int
    predicted_seconds: float


@dataclass(frozen=True, kw_only=True)
class End:
    """The result of a generation.

    Attributes:
        text: the whole text.
        tokens: the tokens with their probabilities.
        shown: for every token, the text that could be shown when it came.
        stop_type: why the generation ended.
        stopping_word: the stop string that was found, or empty.
        truncated: whether the context was full.
        n_cached: tokens in the cache now.
        seed: the samplers' seed.
        timings: the timings.
        report: the report of the context's compression, which an earlier request may have done. None: not compressed.
    """

    text: str
    tokens: tuple[Chosen, ...]
    shown: tuple[str, ...]
    stop_type: StopType
    stopping_word: str
    truncated: bool
    n_cached: int
    seed: int
    timings: Timings
    report: KVReport | None


Emit = Callable[[Progress | Token], None]
