"""Tasks that hide a few lines in noise: needles, and chains of variables."""

from __future__ import annotations

import itertools
import random
import string
from dataclasses import dataclass

from ..errors import ConfigError
from .task import Draft, Recipe, Task, inserted, new_name
from .texts import Texts

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [percent / 100 for percent in (round(100 * i / 39) for i in range(40))]  # RULER's depths for needles in essays


@dataclass(frozen=True)
class Needles(Task):
    """Magic numbers or uuids, each with a key, hidden in a haystack.

    Attributes:
        haystack: ``noise`` (the same sentences on every line), ``essay`` (prose) or ``needle`` (lines with other keys).
        key, value: ``words``, ``numbers`` or ``uuids``.
        n_keys, n_values: number of keys, and of values for each key; every pair is a needle.
        n_queries: number of keys in the question.
    """

    haystack: str = "essay"
    key: str = "words"
    value: str = "numbers"
    n_keys: int = 1
    n_values: int = 1
    n_queries: int = 1

    def __post_init__(self) -> None:
        kinds = ("words", "numbers", "uuids")
        for name, allowed in (("haystack", ("noise", "essay", "needle")), ("key", kinds), ("value", kinds)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if not 1 <= self.n_queries <= self.n_keys or not 1 <= self.n_keys * self.n_values <= len(DEPTHS):
            raise ConfigError(
                f"n_keys={self.n_keys}, n_values={self.n_values}, n_queries={self.n_queries}; allowed: 1 to n_keys"
                f" queries and up to {len(DEPTHS)} needles"
            )

    @property
    def takes_depth(self) -> bool:
        """Returns True for a single needle, also if the haystack has lines of the same form."""
        return self.n_keys * self.n_values == 1

    def recipe(self, seed: str, n_tokens: int, texts: Texts, depth: float | None) -> Recipe:
        rng, hay_rng = random.Random(seed), random.Random(seed + "/haystack")
        used: set[str] = set()
        keys = [new_name(self.key, rng, texts, used) for _ in range(self.n_keys)]
        values = [tuple(new_name(self.value, rng, texts, used) for _ in range(self.n_values)) for _ in keys]
        needles = [self._line(key, value) for key, key_values in zip(keys, values, strict=True) for value in key_values]
        if depth is not None:
            depths = [depth]
        elif self.haystack == "essay":
            depths = rng.sample(DEPTHS, len(needles))
        else:
            depths = [rng.random() for _ in needles]
        asked = rng.sample(range(self.n_keys), self.n_queries)
        queried = [keys[i] for i in asked]
        query = ", ".join(queried[:-1]) + ", and " + queried[-1] if len(queried) > 1 else queried[0]
        first = min(depths[i * self.n_values + j] for i in asked for j in range(self.n_values))
        lines: list[str] = []  # lines of a ``needle`` haystack, generated as larger sizes need them

        def haystack(n: int) -> list[str]:
            if self.haystack == "essay":
                return texts.prose(n)
            if self.haystack == "noise":
                return [NOISE] * n
            while len(lines) < n:
                key, value = (new_name(kind, hay_rng, texts, used) for kind in (self.key, self.value))
                lines.append(self._line(key, value))
            return lines[:n]

        one = self.n_queries * self.n_values == 1
        what = self.value[:-1] if one else self.value
        intro = f"A special magic {what} is" if one else f"Some special magic {what} are"
        asks, verb = ("What is the", "is") if one else ("What are all the", "are")

        def build(n: int) -> Draft:
            units = inserted(haystack(n), list(zip(depths, needles, strict=True)))
            return Draft(
                f"{intro} hidden within the following text. Make sure to memorize it. I will quiz you about the {what}"
                " afterwards.\n" + (" " if self.haystack == "essay" else "\n").join(units),
                f"\n{asks} special magic {what} for {query} mentioned in the provided text?",
                f" The special magic {what} for {query} mentioned in the provided text {verb}",
                tuple(value for i in asked for value in values[i]),
                first,
            )

        return Recipe(build, 1, n_tokens)

    def _line(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value} for {key} is: {value}."


@dataclass(frozen=True)
class VariableTracking(Task):
    """A chain of assignments in noise, after a worked example. The question: which variables have the value?"""

    n_hops: int = 4

    def recipe(self, seed: str, n_tokens: int, texts: Texts, depth: float | None) -> Recipe:
        value, other = (str(number) for number in random.Random(seed + "/values").sample(range(10000, 100000), 2))
        shown = self._draft(random.Random(seed + "/example"), 3, other, 10)
        example = f"{shown.context}{shown.question}{shown.answer_prefix}{' '.join(shown.references)}\n\n"
        return Recipe(lambda n: self._draft(random.Random(seed), 5, value, n, example), 1, n_tokens)

    def _draft(self, rng: random.Random, n_letters: int, value: str, n: int, example: str = "") -> Draft:
        names: dict[str, None] = {}
        while len(names) <= self.n_hops:
            names["".join(rng.choices(string.ascii_uppercase, k=n_letters))] = None
        chain = list(names)
        lines = [f"VAR {chain[0]} = {value}"] + [f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(chain)]
        depths = sorted(rng.random() for _ in lines)
        return Draft(
            f"{example}Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            + "\n".join(inserted([NOISE] * n, list(zip(depths, lines, strict=True)))),
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
            f" Answer: According to the chain(s) of variable assignment in the text above, {len(chain)} variables are"
            f" assigned the value {value}, they are: ",
            tuple(chain),
            depths[0],
        )
