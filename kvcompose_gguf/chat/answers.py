"""An answer while the model writes it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..native.answer_stream import AnswerStream
from ..native.chat_library import AnswerParser, Rendered
from ..support.text_stream import TextStream

if TYPE_CHECKING:
    from ..llama import Llama


@dataclass(frozen=True)
class Piece:
    """Text that the model has just written; ``is_thought``: it is thinking, this is no part of the answer."""

    text: str
    is_thought: bool = False


@dataclass
class Answer:
    """What is known of an answer, and more of it with every piece.

    Attributes:
        question: what it answers.
        text: the answer so far.
        thoughts: what the model thought before it.
        n_prompt: tokens before the answer.
        n_tokens: tokens written.
        first_seconds: seconds until the first token, 0 before it.
        seconds: seconds from the first token to the last one.
        end: why it ended: the model had finished, the answer or the context had no more room, or the user stopped it.
    """

    question: str
    n_prompt: int
    text: str = ""
    thoughts: str = ""
    n_tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0
    end: Literal["finished", "max_tokens", "context", "stopped"] = "stopped"

    @property
    def tokens_per_second(self) -> float:
        """How fast it was written, 0 if there is no second token."""
        return (self.n_tokens - 1) / self.seconds if self.n_tokens > 1 and self.seconds else 0.0


class Writer:
    """Lets a model write an answer.

    Args:
        answer: what is filled in.
        rendered: the prompt that the answer follows.
        stops: texts that end the answer and are no part of it.
    """

    def __init__(self, llm: Llama, answer: Answer, rendered: Rendered, stops: Sequence[str]) -> None:
        self._llm, self._answer = llm, answer
        self._stream = TextStream([*stops, *rendered.stops])
        self._message = AnswerStream(AnswerParser(rendered, reasoning_format="auto", parse_tool_calls=False))
        self._preserved = [llm.tokenize(text.encode(), add_bos=False, special=True) for text in rendered.preserved]
        #: what the model wrote, without an end token
        self.tokens: list[int] = []

    @property
    def text(self) -> str:
        """Everything that was written, thoughts too."""
        return self._stream.text

    @property
    def is_cut(self) -> bool:
        """Whether the tokens say more than the answer, because a stop text ended it."""
        return self._stream.stop is not None

    def pieces(self, prompt: Sequence[int], n_most: int, **sampling: float) -> Iterator[Piece]:
        """Yield the answer to a prompt as it is written, at most ``n_most`` tokens; ``sampling`` is for generate()."""
        for token in self._generated(prompt, n_most, sampling):
            self.tokens.append(token)
            yield from self._add(self._stream.add(self._llm.piece(token, special=[token] in self._preserved)))
            if self.is_cut:
                self._answer.end = "finished"
                return
        yield from self.finish()

    def finish(self) -> list[Piece]:
        """Add what was held back to the answer, now that it has ended."""
        return [*self._add(self._stream.end()), *self._grow(self._message.end())]

    def _generated(self, prompt: Sequence[int], n_most: int, sampling: Mapping[str, Any]) -> Iterator[int]:
        answer = self._answer
        start = first = time.perf_counter()
        with contextlib.closing(self._llm.generate(prompt, **sampling)) as generated:
            for token in generated:
                now = time.perf_counter()
                if self._llm.is_end(token):
                    answer.end = "finished"
                    return
                first = first if answer.n_tokens else now
                answer.n_tokens += 1
                answer.first_seconds, answer.seconds = first - start, now - first
                yield token
                if answer.n_tokens == n_most:
                    answer.end = "max_tokens"
                    return

    def _add(self, text: str) -> list[Piece]:
        return self._grow(self._message.add(text)) if text else []

    def _grow(self, deltas: Sequence[Mapping[str, Any]]) -> list[Piece]:
        thoughts = "".join(delta.get("reasoning_content", "") for delta in deltas)
        text = "".join(delta.get("content", "") for delta in deltas)
        self._answer.thoughts += thoughts
        self._answer.text += text
        pieces = [Piece(thoughts, is_thought=True)] if thoughts else []
        return pieces + ([Piece(text)] if text else [])
