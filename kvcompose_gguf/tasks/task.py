"""The base of all tasks: a kind of question, and how to build its samples in any size."""

from __future__ import annotations

import random
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .texts import Texts


@dataclass(frozen=True)
class Draft:
    """A sample of a given size, before its tokens are counted; the attributes are those of :class:`Sample`."""

    context: str
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    depth: float | None = None


@dataclass(frozen=True)
class Recipe:
    """Builds one sample in any size from ``least`` to ``most`` units of its haystack."""

    build: Callable[[int], Draft]
    least: int
    most: int


@dataclass(frozen=True)
class Task(ABC):
    """A kind of question. To add one, derive a class and add an entry to ``ruler.TASKS``.

    Attributes:
        max_tokens: longest answer, in tokens.
        metric: ``string_match_all`` or ``string_match_part``.
    """

    max_tokens: int
    metric: str = "string_match_all"

    @property
    def takes_depth(self) -> bool:
        """Returns whether the caller can choose the depth of the needle."""
        return False

    @abstractmethod
    def recipe(self, seed: str, n_tokens: int, texts: Texts, depth: float | None) -> Recipe:
        """Returns the recipe of the sample for ``seed``; its question must not depend on the size that is built later.

        Args:
            seed: ``<seed>/<task>/<index>``; every random number must come from it.
            n_tokens: target for prompt and answer, for tasks whose settings depend on the length.
            depth: depth of the needle; None draws it.
        """


def inserted(units: Sequence[str], items: Sequence[tuple[float, str]]) -> list[str]:
    """Returns ``units`` with every (depth, text) inserted; depth is the share of units before the text, in [0, 1]."""
    together = list(units)
    for depth, text in sorted(items, key=lambda item: item[0], reverse=True):  # last first: earlier indices stay valid
        together.insert(int(len(units) * depth), text)
    return together


def new_name(kind: str, rng: random.Random, texts: Texts, used: set[str]) -> str:
    """Returns a random word, 7-digit number or uuid that is not in ``used``, and adds it to ``used``."""
    for _ in range(1000):
        if kind == "words":
            made = f"{rng.choice(texts.adjectives)}-{rng.choice(texts.nouns)}"
        elif kind == "numbers":
            made = str(rng.randint(1_000_000, 9_999_999))
        else:
            made = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if made not in used:
            used.add(made)
            return made
    raise ConfigError(
        f"texts={texts.name!r} has {len(texts.adjectives)} adjectives and {len(texts.nouns)} nouns, too few for"
        f" {len(used)} words and keys"
    )
