"""The requests of a method, as values: which queries score a context, and how each request is collected."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from ..errors import ConfigError
from ..kernels.types import FloatArray
from ..support.checks import check_choice, check_flag, check_integer, check_number, check_positive
from .collect import Attention, Scorer, collect_queries
from .evidence import Positions
from .pieces import Piece, pieces_at, spread
from .reader import Reader

#: number of tokens before a chunk that its continuation quotes, as in KVzip (kvpress, kvzip_press.py)
N_TAIL = 8


#: number of query tokens of a ``SpotCheck`` on top of the context at a time
CHUNK = 512

#: number of tokens in a piece of ``Repeat(fraction=...)``; each is long enough to be text
PIECE = 64


class Queries(ABC):
    """The tokens whose attention scores a context. Subclasses are frozen dataclasses."""

    #: whether the context itself is evaluated while it is scored, so that no earlier prefill can be reused
    scores_while_reading = False

    @abstractmethod
    def collect(self, scorer: Scorer, tokens: Sequence[int], suffix: Sequence[int]) -> Attention:
        """Prefills ``tokens`` and returns the attention that these queries pay to them.

        Args:
            suffix: tokens that follow the context in its prompt.
        """

    @property
    def label(self) -> str:
        """Returns the queries and their options for reports, without options that are off."""
        options = {name: value for name, value in asdict(self).items() if value not in ("", None, False)}  # type: ignore[call-overload]
        texts = (name if isinstance(value, (str, bool)) else f"{name}={value!r}" for name, value in options.items())
        return f"{type(self).__name__.lower()}({', '.join(texts)})"


@dataclass(frozen=True)
class Repeat(Queries):
    """The context itself, evaluated a second time on top of its cache.

    Attributes:
        chunk: number of query tokens on top of the context at a time; ``None``: all of them, in a cache of 2N cells.
        fraction: share of the context that is evaluated again, in pieces spread over all of it.
        instruction: text before every chunk, e.g. KVzip's; its tokens are queries too.
        continuation: text before every chunk but the first, followed by the 8 tokens before the chunk; empty: the
            ``instruction``.
        own: score a token only by the chunk that repeats it, as KVzip does; needs the whole context.
        in_place: evaluate every chunk and piece at the positions that it has in the whole repeat. So the distances to
            the context are those of the whole repeat, and its attention is nearly the same. False: each begins directly
            after the context, and the pieces form one text.
    Raises:
        ConfigError: an option is out of range. The requests below raise it too.
    """

    chunk: int | None = 512
    fraction: float = 1.0
    instruction: str = ""
    continuation: str = ""
    own: bool = False
    in_place: bool = False

    def __post_init__(self) -> None:
        _check_chunk(self.chunk)
        check_number("fraction", self.fraction)
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction={self.fraction} is not in (0, 1]")
        for name in ("instruction", "continuation"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not a text")
        check_flag("in_place", self.in_place)
        check_flag("own", self.own)
        if self.own and self.fraction != 1:
            raise ConfigError(f"own=True needs the whole context, fraction=1, not {self.fraction}")

    def collect(self, scorer: Scorer, tokens: Sequence[int], suffix: Sequence[int]) -> Attention:
        """Evaluates the context again on top of its cache, chunk by chunk."""
        words = scorer.tokens_of(self.instruction)
        later_words = scorer.tokens_of(self.continuation)
        places = spread(len(tokens), self.fraction, PIECE)
        query = [token for place in places for token in tokens[place.start : place.stop]]

        def introduction(first: int) -> list[int]:
            quoted = first > 0 and bool(later_words)
            return later_words + query[max(0, first - N_TAIL) : first] if quoted else words

        pieces = pieces_at(places, tokens) if self.in_place else [Piece(0, query)]
        attention = scorer.on_top(pieces, self.chunk, tokens, introduction, own=self.own, in_place=self.in_place)
        return replace(attention, repeated=_positions(places)) if self.is_at_its_places else attention

    @property
    def is_at_its_places(self) -> bool:
        """Returns whether every query has the position that it has in the whole repeat, and no text comes before it."""
        alone = not self.instruction and not self.continuation
        return alone and (self.in_place or (self.chunk is None and self.fraction == 1))


@dataclass(frozen=True)
class SpotCheck(Queries):
    """Pieces of the context, evaluated a second time in place; a sample of ``Repeat(in_place=True)``.

    Attributes:
        share: share of the context that is evaluated again, at least one piece.
        most: largest number of tokens that are evaluated again; None: no limit.
        piece: number of tokens in a piece.
        to_end: the last of several pieces is the end of the context. The first is always its beginning.
        least: smallest number of tokens that are evaluated again, if the context has as many.
    """

    share: float
    most: int | None = None
    piece: int = 128
    to_end: bool = True
    least: int = 1

    def __post_init__(self) -> None:
        check_number("share", self.share)
        if not 0 < self.share <= 1:
            raise ConfigError(f"share={self.share} is not in (0, 1]")
        check_integer("most", self.most, optional=True)
        check_integer("piece", self.piece)
        check_flag("to_end", self.to_end)
        check_integer("least", self.least)
        for name in ("most", "piece", "least"):
            check_positive(name, getattr(self, name))

    def collect(self, scorer: Scorer, tokens: Sequence[int], suffix: Sequence[int]) -> Attention:
        """Evaluates the pieces again on top of the context's cache."""
        # as many as of the whole context, although these may be only its beginning
        n_check = max(self.share * max(scorer.length, len(tokens)), self.least)
        n_check = n_check if self.most is None else min(n_check, self.most)
        share = min(1.0, n_check / len(tokens))
        places = spread(len(tokens), share, min(self.piece, self.most or self.piece), self.to_end)
        is_part = len(tokens) < scorer.length
        size = self.piece if is_part and self.share < 1 else max(CHUNK, self.piece)  # a ceiling has room for a piece
        attention = scorer.on_top(pieces_at(places, tokens), size, tokens, in_place=True)
        return replace(attention, repeated=_positions(places))


@dataclass(frozen=True)
class Prompts(Queries):
    """The user's texts, each evaluated on top of the context, ``chunk`` tokens at a time."""

    texts: Sequence[str]
    chunk: int | None = 512

    def __post_init__(self) -> None:
        is_list = isinstance(self.texts, (list, tuple))
        if not is_list or not self.texts or not all(isinstance(text, str) and text for text in self.texts):
            raise ConfigError(f"texts={self.texts!r} is not a list of texts")
        object.__setattr__(self, "texts", tuple(self.texts))  # equal requests must have equal hashes
        _check_chunk(self.chunk)

    def collect(self, scorer: Scorer, tokens: Sequence[int], suffix: Sequence[int]) -> Attention:
        """Evaluates each text on top of the context."""
        return scorer.on_top([Piece(0, scorer.tokens_of(text)) for text in self.texts], self.chunk, tokens)


@dataclass(frozen=True)
class Window(Queries):
    """The last ``size`` tokens of the prompt; they may lie after the context, in the question."""

    size: int

    def __post_init__(self) -> None:
        check_integer("size", self.size)
        check_positive("size", self.size)

    def collect(self, scorer: Scorer, tokens: Sequence[int], suffix: Sequence[int]) -> Attention:
        """Scores with the prompt's last tokens while they are read."""
        return scorer.of_window(self.size, tokens, suffix)


@dataclass(frozen=True)
class Prefill(Queries):
    """The context's own tokens during the prefill."""

    scores_while_reading = True

    def collect(self, scorer: Scorer, tokens: Sequence[int], suffix: Sequence[int]) -> Attention:
        """Evaluates the whole context, and scores it meanwhile."""
        return scorer.of_prefill(tokens)


@dataclass(frozen=True)
class AttentionRequest:
    """The attention that a method needs. Equal requests get equal answers.

    Attributes:
        queries: the query tokens.
        aggregation: over the queries: ``"max"``, or ``"mean"`` over those that can see the token.
    """

    queries: Queries
    aggregation: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        if not isinstance(self.queries, Queries):
            raise ConfigError(f"queries={self.queries!r} is not a Queries: use e.g. Repeat(), Window(64) or Prefill()")
        check_choice("aggregation", self.aggregation, ("max", "mean"))

    @property
    def label(self) -> str:
        """Returns the request for reports, e.g. ``"repeat(chunk=512, fraction=1.0) max"``."""
        return f"{self.queries.label} {self.aggregation}"

    def collect(
        self,
        reader: Reader,
        tokens: Sequence[int],
        suffix: Sequence[int] = (),
        tokenize: Callable[[str], Sequence[int]] | None = None,
        max_bytes: int = 64 << 20,
        length: int = 0,
    ) -> Attention:
        """Prefills ``tokens`` and returns the attention that this request asks for.

        Args:
            suffix: tokens that follow the context in its prompt; the last of them are the queries of ``Window``.
            tokenize: returns the tokens of a text, for ``Prompts`` and instructions.
            max_bytes: limit of the working memory, not counting the scores.
            length: length of the whole context, if ``tokens`` are only its beginning.
        Raises:
            ContextLengthError: the context leaves no cell for queries on top of it.
            ConfigError: there are no queries.
        """
        scorer = Scorer(reader, self.aggregation == "max", max_bytes, tokenize, length)
        return self.queries.collect(scorer, tokens, suffix)


@dataclass(frozen=True)
class StateRequest:
    """Query vectors of the last ``n_queries`` context tokens, and a function to rotate them."""

    n_queries: int

    def __post_init__(self) -> None:
        check_integer("n_queries", self.n_queries)
        check_positive("n_queries", self.n_queries)

    @property
    def label(self) -> str:
        """Returns the request for reports."""
        return str(self)

    def collect(self, reader: Reader, tokens: Sequence[int]) -> list[FloatArray]:
        """Evaluates the last context tokens again; returns ``Evidence.queries``."""
        return collect_queries(reader, self.n_queries, tokens)


def _positions(places: Sequence[range]) -> Positions:
    return np.concatenate([np.array(place, np.int32) for place in places])


def _check_chunk(chunk: int | None) -> None:
    check_integer("chunk", chunk, optional=True)
    check_positive("chunk", chunk)
