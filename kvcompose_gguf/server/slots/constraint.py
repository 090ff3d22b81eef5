"""A grammar that an answer has to follow, from its beginning or from a tool call on (common/sampling.cpp)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ...native.sampler import Candidates, Grammar


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """A grammar that an answer has to follow.

    Attributes:
        grammar: GBNF.
        begin: tokens at the end of the prompt, which the grammar describes, too.
        patterns, tokens: regular expressions and tokens that let the grammar begin; both empty: it holds all the time.
    """

    grammar: str
    begin: tuple[int, ...] = ()
    patterns: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()

    @property
    def is_lazy(self) -> bool:
        """Whether the answer is free until something lets the grammar begin."""
        return bool(self.patterns or self.tokens)


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """How a model thinks before it answers.

    Attributes:
        mark: tokens that begin its thoughts.
        ends: tokens that end them, in each way that ends them.
        begin: tokens at the end of the prompt, which may begin thoughts.
        n_most: so many tokens may be thought. None: any number.
        closing: what is said when there are more: a message, if there is one, and one of ``ends``.
    """

    mark: tuple[int, ...]
    ends: tuple[tuple[int, ...], ...]
    begin: tuple[int, ...] = ()
    n_most: int | None = None
    closing: tuple[int, ...] = ()


class Thoughts:
    """Follows the tokens of an answer into the model's thoughts and out of them (common/reasoning-budget.cpp).

    Attributes:
        is_inside: whether the model is thinking.
    """

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        self._n_mark = max(map(len, (thinking.mark, *thinking.ends)))
        self._seen: list[int] = []
        self._n_thought = self._n_forced = 0
        self.is_inside = False
        for token in thinking.begin:
            self.accept(token)

    @property
    def forced(self) -> int | None:
        """The token that has to come next, because the model has thought enough. None: any may come."""
        n_most, closing = self._thinking.n_most, self._thinking.closing
        if not self.is_inside or n_most is None or self._n_thought < n_most or self._n_forced == len(closing):
            return None
        return closing[self._n_forced]

    def accept(self, token: int) -> tuple[int, ...]:
        """Goes on by one token; returns the mark that ended the thoughts with it, or an empty one."""
        self._n_forced += token == self.forced
        self._seen = [*self._seen, token][-self._n_mark :]
        if not self.is_inside:
            self.is_inside = self._ends_with(self._thinking.mark)
            return ()
        self._n_thought += 1
        end = next((mark for mark in self._thinking.ends if self._ends_with(mark)), ())
        self.is_inside = not end
        return end

    def _ends_with(self, mark: tuple[int, ...]) -> bool:
        return tuple(self._seen[-len(mark) :]) == mark


class Guide:
    """What one generation has to follow: a grammar, and a limit of its thoughts.

    Raises:
        ConfigError: the grammar cannot be parsed, or does not allow the end of the prompt.
    """

    def __init__(self, model: Any, constraint: Constraint | None, thinking: Thinking | None) -> None:
        self._thoughts = None if thinking is None else Thoughts(thinking)
        self._grammar: Grammar | None = None
        self._is_lazy = constraint is not None and constraint.is_lazy
        if constraint is None:
            return
        self._grammar = Grammar(model, constraint.grammar, constraint.patterns, constraint.tokens)
        try:
            for token in () if self._is_lazy else constraint.begin:
                self._grammar.accept(token)
        except ConfigError as error:
            self.close()
            raise ConfigError("the grammar does not allow the beginning of the assistant's message") from error

    def close(self) -> None:
        """Free the grammar."""
        if self._grammar is not None:
            self._grammar.close()
            self._grammar = None

    @property
    def is_free(self) -> bool:
        """Whether there is no grammar that holds."""
        return self._grammar is None or self._is_asleep

    @property
    def forced(self) -> int | None:
        """The token that has to come next. None: there is a choice."""
        return None if self._thoughts is None else self._thoughts.forced

    def apply(self, candidates: Candidates) -> None:
        """See ``Grammar.apply``."""
        if self._grammar is not None:
            self._grammar.apply(candidates)

    def allows(self, token: int) -> bool:
        """Returns whether ``token`` may be the next one."""
        return self._is_asleep or self._grammar is None or self._grammar.allows(token)

    def accept(self, token: int) -> None:
        """Tell the grammar, and the thoughts, the next token."""
        was_asleep = self._is_asleep
        mark = () if self._thoughts is None else self._thoughts.accept(token)
        for each in mark if was_asleep else (token,):  # what ends thoughts may let the grammar begin
            self._tell(each)

    @property
    def _is_asleep(self) -> bool:
        """A lazy grammar cannot begin within thoughts."""
        return self._is_lazy and self._thoughts is not None and self._thoughts.is_inside

    def _tell(self, token: int) -> None:
        if self._grammar is None:
            return
        try:
            self._grammar.accept(token)
        except ConfigError:
            if not self._is_lazy:
                raise
            self.close()  # what looked like a tool call is none; the answer stays free
