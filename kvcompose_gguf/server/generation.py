"""One generation on one slot: prompt -> tokens -> text, as in llama-server (process_token, server-context.cpp)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from ..errors import ContextLengthError
from ..methods import Method
from ..report import KVReport
from .sampling import Chosen, Sampler, Sampling
from .slots import Slot, Task
from .text import TextStream

#: tokens that memory is reserved for if an answer may be as long as it likes
N_UNBOUNDED = 1024

StopType = Literal["none", "eos", "word", "limit"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What is to be generated.

    Attributes:
        tokens: of the prompt.
        sampling: how tokens are chosen.
        method: that compresses the prompt, or None.
        n_predict: most tokens, -1: as many as fit; 0 is as 1.
        n_indent: a line of fewer spaces than this ends it.
        t_max_predict_ms: a line that ends later than this ends it; -1: never.
        stops: texts that end it.
        ignore_eos: for the answer's settings; ``sampling`` forbids end tokens already.
        reuse: what the cache has of the prompt need not be evaluated.
        n_probs: most probable tokens that are told for every token.
        post_sampling_probs: after the samplers, not before.
    """

    tokens: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    method: Method | None = None
    n_predict: int = -1
    n_indent: int = 0
    t_max_predict_ms: int = -1
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    reuse: bool = True
    n_probs: int = 0
    post_sampling_probs: bool = False

    def n_most(self, n_ctx: int) -> int:
        """Tokens of the prompt and the answer, of which an unbounded one is taken to have at most ``N_UNBOUNDED``."""
        n_predict = N_UNBOUNDED if self.n_predict < 0 else self.n_predict
        return min(n_ctx, len(self.tokens) + n_predict)


@dataclass(frozen=True)
class Progress:
    """Part of a prompt was read: ``processed`` of ``total`` tokens, ``cache`` of which were there before."""

    total: int
    cache: int
    processed: int
    time_ms: int

    @property
    def timings(self) -> Timings:
        """So far."""
        n = self.processed - self.cache
        seconds = self.time_ms / 1000 if n else 0.0
        return Timings(cache_n=self.cache, prompt_n=n, prompt_seconds=seconds, predicted_n=0, predicted_seconds=0.0)


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token was generated.

    Attributes:
        text: that may be shown now, of this token and of those before it.
        chosen: the token and its probabilities.
        n_decoded: tokens so far, with this one.
        timings: so far.
    """

    text: str
    chosen: Chosen
    n_decoded: int
    timings: Timings


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Numbers of tokens and seconds.

    Attributes:
        cache_n: tokens of the prompt that were in the cache.
        prompt_n: tokens of the prompt that were evaluated.
        prompt_seconds: until the first token was sampled, compression included.
        predicted_n: tokens generated.
        predicted_seconds: from the first to the last of them.
    """

    cache_n: int
    prompt_n: int
    prompt_seconds: float
    predicted_n: int
    predicted_seconds: float


@dataclass(frozen=True, kw_only=True)
class End:
    """A generation has ended.

    Attributes:
        text: all of it.
        tokens: and their probabilities.
        shown: what could be shown when each had come.
        stop_type, stopping_word: why it ended.
        truncated: the context was full.
        n_cached: tokens in the cache.
        seed: of the samplers.
        report: of the prompt's compression, if it has one; of an earlier request if the context was its.
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


def generate(slot: Slot, what: Generation, emit: Emit) -> End:
    """Read a prompt and continue it.

    Args:
        emit: is told of every step.
    Raises:
        ContextLengthError: the prompt leaves no room for a token.
        ConfigError: a grammar that cannot be read.
        Cancelled: the slot was told so.
    """
    llama, n_ctx = slot.llama, slot.llama.n_ctx()
    what = replace(what, tokens=tuple(llama.joined(what.tokens)))
    if len(what.tokens) >= n_ctx:
        raise ContextLengthError(
            f"request ({len(what.tokens)} tokens) exceeds the available context size ({n_ctx} tokens), "
            "try increasing it"
        )
    task = slot.task = Task(slot.task.id if slot.task else -1, what)
    sampler = Sampler(llama, what.sampling, what.n_probs, what.post_sampling_probs)
    try:
        clock = _Clock()
        cache_n = _Reading(slot, what, emit, clock, task).read()
        sampler.accept(what.tokens)
        return _continue(slot, what, emit, sampler, clock, cache_n, task)
    finally:
        sampler.close()
        slot.on_decode = lambda n_tokens: None


class _Clock:
    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first: float | None = None
        self._last = self._start

    def token(self) -> None:
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last

    def timings(self, cache_n: int, prompt_n: int, predicted_n: int) -> Timings:
        first = self._first if self._first is not None else self._last
        return Timings(
            cache_n=cache_n, prompt_n=prompt_n, prompt_seconds=first - self._start,
            predicted_n=predicted_n, predicted_seconds=self._last - first,
        )  # fmt: skip

    @property
    def elapsed_ms(self) -> int:
        return int(1000 * (time.perf_counter() - self._start))

    @property
    def since_first_ms(self) -> float:
        return 1000 * (time.perf_counter() - self._first) if self._first is not None else 0.0


class _Reading:
    """A prompt on its way into the cache."""

    def __init__(self, slot: Slot, what: Generation, emit: Emit, clock: _Clock, task: Task) -> None:
        self._slot, self._what, self._emit, self._clock, self._task = slot, what, emit, clock, task
        self._processed = self._n_known = slot.llama.n_continued(what.tokens, what.method) if what.reuse else 0

    def read(self) -> int:
        """Returns how many tokens were in the cache."""
        self._tell()
        self._slot.on_decode = self._decoded
        cache_n = self._slot.llama.read(self._what.tokens, self._what.method, self._what.reuse)
        self._slot.on_decode = lambda n_tokens: None
        return cache_n

    def _decoded(self, n_tokens: int) -> None:
        processed = min(self._slot.llama.n_tokens + n_tokens, len(self._what.tokens))
        if processed > self._processed:  # a scoring pass does not get on with the prompt
            self._processed = processed
            self._tell()

    def _tell(self) -> None:
        total = len(self._what.tokens)
        self._task.n_cached, self._task.n_processed = self._n_known, self._processed - self._n_known
        self._emit(Progress(total, self._n_known, self._processed, self._clock.elapsed_ms))


def _continue(
    slot: Slot, what: Generation, emit: Emit, sampler: Sampler, clock: _Clock, cache_n: int, task: Task
) -> End:
    llama, n_ctx = slot.llama, slot.llama.n_ctx()
    stream, tokens, texts = TextStream(what.stops), list[Chosen](), list[str]()
    n_prompt = len(what.tokens)
    stop_type: StopType = "none"
    truncated = False
    indent = _Indent(what.n_indent)

    def timings() -> Timings:
        return clock.timings(cache_n, n_prompt - cache_n, len(tokens))

    while stop_type == "none":
        chosen = sampler.sample()
        clock.token()
        tokens.append(chosen)
        task.n_decoded = len(tokens)
        is_end = llama.is_end(chosen.token)
        shown = stream.add(b"" if is_end else llama.piece(chosen.token))
        if stream.stop is not None:
            stop_type = "word"
        elif llama.n_tokens + 1 >= n_ctx:
            stop_type, truncated = "limit", True
        if stop_type == "none" and 0 <= what.n_predict <= len(tokens):
            stop_type = "limit"
        if stop_type == "none" and not indent.allows(stream.text):
            stop_type = "limit"
        if stop_type == "none" and 0 <= what.t_max_predict_ms < clock.since_first_ms and "\n" in shown:
            stop_type = "limit"
        if is_end and stop_type != "word":
            stop_type = "eos"
        if stop_type != "none":
            shown += stream.end()  # what might have become a stop text is none
        texts.append(shown)
        task.has_new_line |= "\n" in shown
        emit(Token(text=shown, chosen=chosen, n_decoded=len(tokens), timings=timings()))
        if stop_type == "none":
            llama.eval([chosen.token])
    return End(
        text=indent.cut(stream.text), tokens=tuple(tokens), shown=tuple(texts), stop_type=stop_type,
        stopping_word=stream.stop or "", truncated=truncated, n_cached=llama.n_tokens, seed=sampler.seed,
        timings=timings(), report=llama.kv_report if llama.n_context else None,
    )  # fmt: skip


class _Indent:
    """Lines of fewer spaces than the first ones end a generation."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._at = 0  # the newline that the next line to look at is behind
        self._end: int | None = None

    def allows(self, text: str) -> bool:
        """Whether no whole line but the first is indented by less; one that is empty does not count."""
        if self._n <= 0:
            return True
        while (at := text.find("\n", self._at)) >= 0:
            first = re.compile(r"[^ \t]").search(text, at + 1)
            self._at = at
            if first is None:
                return True  # the line has only begun
            n_spaces = first.start() - at - 1
            if first[0] != "\n" and n_spaces < self._n:
                self._end = first.start()
                return False
            self._at = at + 1
        self._at = len(text)
        return True

    def cut(self, text: str) -> str:
        """``text`` without the line that ended it."""
        return text if self._end is None else text[: self._end]
