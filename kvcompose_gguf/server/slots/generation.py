"""Runs one generation in one slot: prompt -> tokens -> text, as in llama-server (process_token, server-context.cpp)."""

from __future__ import annotations

import re
import time
from dataclasses import replace

from ...errors import ContextLengthError
from ...methods import Method
from ...support.text_stream import TextStream
from .sampling import Chosen, Sampler
from .slot import Slot, Task
from .slot_llama import Continuation
from .steps import Emit, End, Generation, Progress, StopType, Timings, Token


def generate(slot: Slot, what: Generation, emit: Emit) -> End:
    """Read a prompt and continue it.

    Args:
        emit: called with every step, in the slot's thread.
    Returns:
        The end. The caller passes it on after the slot was released.
    Raises:
        ContextLengthError: the prompt leaves no room for a token.
        ConfigError: the grammar cannot be parsed.
        Cancelled: the job was cancelled.
    """
    llama, n_ctx = slot.llama, slot.llama.n_ctx()
    start = llama.continuation(what.tokens, what.method, what.reuse)
    what = replace(what, tokens=start.tokens)
    if len(what.tokens) >= n_ctx:
        raise ContextLengthError(
            f"request ({len(what.tokens)} tokens) exceeds the available context size ({n_ctx} tokens), "
            "try increasing it"
        )
    task = slot.task = Task(slot.task.id if slot.task else -1, what)
    sampler = Sampler(llama, what.sampling, what.n_probs, what.post_sampling_probs)
    try:
        clock = _Clock()
        cache_n = _Reading(slot, start, emit, clock, task).read(what.method)
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
    """Reads a prompt into the cache and emits its progress."""

    def __init__(self, slot: Slot, start: Continuation, emit: Emit, clock: _Clock, task: Task) -> None:
        self._slot, self._start, self._emit, self._clock, self._task = slot, start, emit, clock, task
        self._processed = self._n_known = start.n_cached

    def read(self, method: Method | None) -> int:
        """Read the prompt; returns how many of its tokens were in the cache."""
        self._tell()
        self._slot.on_decode = self._decoded
        cache_n = self._slot.llama.read(self._start, method)
        self._slot.on_decode = lambda n_tokens: None
        return cache_n

    def _decoded(self, n_tokens: int) -> None:
        processed = min(self._slot.llama.n_tokens + n_tokens, len(self._start.tokens))
        if processed > self._processed:  # a scoring pass reads tokens again
            self._processed = processed
            self._tell()

    def _tell(self) -> None:
        total = len(self._start.tokens)
        self._task.n_cached, self._task.n_processed = self._n_known, self._processed - self._n_known
        self._emit(Progress(total, self._n_known, self._processed, self._clock.elapsed_ms, self._slot.llama.kv_bytes))


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
        shown = stream.add(b"" if is_end else llama.piece(chosen.token, special=chosen.token in what.preserved))
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
            shown += stream.end()  # the text held back for a stop string
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
    """Stops a generation at a line with too little indentation (``n_indent``)."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._at = 0  # position of the newline before the next line to check
        self._end: int | None = None

    def allows(self, text: str) -> bool:
        """Returns whether every line after the first is indented enough. Empty lines do not count."""
        if self._n <= 0:
            return True
        while (at := text.find("\n", self._at)) >= 0:
            first = re.compile(r"[^ \t]").search(text, at + 1)
            self._at = at
            if first is None:
                return True  # the line has no text yet
            n_spaces = first.start() - at - 1
            if first[0] != "\n" and n_spaces < self._n:
                self._end = first.start()
                return False
            self._at = at + 1
        self._at = len(text)
        return True

    def cut(self, text: str) -> str:
        """Returns ``text`` without the line that ended it."""
        return text if self._end is None else text[: self._end]
