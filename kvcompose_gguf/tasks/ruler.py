"""Reimplements the 13 tasks of RULER's synthetic.yaml (arXiv 2404.06654), and adds one needle at a chosen depth.

Wording, counts and answer lengths follow NVIDIA/RULER c3f5e3b (scripts/synthetic.yaml, scripts/data/synthetic/). As in
kvpress's version of the data set, the question is not part of the context. The line break before the question belongs
to the question, and the space before the answer prefix belongs to the prefix. Differences from RULER:

* a haystack is filled to the target in steps of one unit (word, line, document), not of 25 or 500;
* all keys and values of a sample differ; the worked example of ``vt`` has 10 lines of noise at any length, and the
  worked example of ``cwe`` shares no word with the list;
* ``qa`` draws its questions at random instead of in file order, and with a short target it may leave out some of
  HotpotQA's ten paragraphs, but never those with the facts.
"""

from __future__ import annotations

import itertools
import math
import random
import string
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .samples import Sample
from .texts import Texts

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [percent / 100 for percent in (round(100 * i / 39) for i in range(40))]  # RULER's depths for needles in essays


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
    """A kind of question. To add one, derive a class and add an entry to :data:`TASKS`.

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
        keys = [_new(self.key, rng, texts, used) for _ in range(self.n_keys)]
        values = [tuple(_new(self.value, rng, texts, used) for _ in range(self.n_values)) for _ in keys]
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
                lines.append(self._line(_new(self.key, hay_rng, texts, used), _new(self.value, hay_rng, texts, used)))
            return lines[:n]

        one = self.n_queries * self.n_values == 1
        what = self.value[:-1] if one else self.value
        intro = f"A special magic {what} is" if one else f"Some special magic {what} are"
        asks, verb = ("What is the", "is") if one else ("What are all the", "are")

        def build(n: int) -> Draft:
            units = _inserted(haystack(n), list(zip(depths, needles, strict=True)))
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
            + "\n".join(_inserted([NOISE] * n, list(zip(depths, lines, strict=True)))),
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
            f" Answer: According to the chain(s) of variable assignment in the text above, {len(chain)} variables are"
            f" assigned the value {value}, they are: ",
            tuple(chain),
            depths[0],
        )


@dataclass(frozen=True)
class CommonWords(Task):
    """A numbered list in which ten words occur more often than the others, after a worked example."""

    def recipe(self, seed: str, n_tokens: int, texts: Texts, depth: float | None) -> Recipe:
        rng = random.Random(seed)
        # RULER's two settings: occurrences of common and of other words in the list, then the same for the example
        often, seldom, n_shown, shown_often, shown_seldom = (6, 1, 20, 3, 1) if n_tokens < 4096 else (30, 3, 40, 10, 3)
        most = n_tokens // (2 * seldom)  # a word takes at least one token, and so does its number
        words, used = rng.sample(texts.words, len(texts.words)), set(texts.words)
        words += [_new("words", rng, texts, used) for _ in range(50 + most - len(words))]  # hyphenated words
        shown, common, others = words[:n_shown], words[40:50], words[50 : 50 + most]
        question, prefix = (
            "\nQuestion: What are the 10 most common words in the above list?",
            " Answer: The top 10 words that appear most often in the list are:",
        )
        intro = (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones"
            " that appear most often.\n"
        )

        def numbered(listed: Sequence[str]) -> str:
            return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))

        def shuffled(many: Sequence[str], n_many: int, few: Sequence[str], n_few: int) -> str:
            listed = [*many] * n_many + [*few] * n_few
            random.Random(seed + "/order").shuffle(listed)
            return numbered(listed)

        example = intro + shuffled(shown[:10], shown_often, shown[10:], shown_seldom) + question + prefix
        example += f" {numbered(shown[:10])}\n"

        def build(n: int) -> Draft:
            context = example + intro + shuffled(common, often, others[:n], seldom)
            return Draft(context, question, prefix, tuple(common))

        return Recipe(build, 1, len(others))


@dataclass(frozen=True)
class FrequentWords(Task):
    """Coded words; the k-th occurs in proportion to 1/k². The first is noise, the next three are the answer."""

    def recipe(self, seed: str, n_tokens: int, texts: Texts, depth: float | None) -> Recipe:
        rng = random.Random(seed)
        coded: dict[str, None] = {"...": None}
        while len(coded) < max(5, (n_tokens - self.max_tokens) // 50):
            coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
        ranked = list(coded)

        def build(n: int) -> Draft:
            counts = (int(n / (math.pi**2 / 6) / rank**2) for rank in range(1, len(ranked) + 1))
            words = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
            random.Random(seed + "/order").shuffle(words)
            return Draft(
                "Read the following coded text and track the frequency of each coded word. Find the three most"
                f" frequently appeared coded words. {' '.join(words)}",
                "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most"
                " frequently appeared words in the above coded text?",
                " Answer: According to the coded text above, the three most frequently appeared words are:",
                tuple(ranked[1:4]),
            )

        return Recipe(build, 80, 2 * n_tokens)  # from 80 on, rounding cannot make the fifth as frequent as the fourth


@dataclass(frozen=True)
class Documents(Task):
    """A question about one document (``n_hops=1``) or two, among others: first related documents, then any."""

    n_hops: int = 1

    def recipe(self, seed: str, n_tokens: int, texts: Texts, depth: float | None) -> Recipe:
        questions = texts.questions(self.n_hops)
        run, _, index = seed.rpartition("/")
        # every index gets its own question while there are enough
        order = random.Random(run).sample(range(len(questions.items)), len(questions.items))
        asked, rng = questions.items[order[int(index) % len(order)]], random.Random(seed)
        near = rng.sample(asked.near, len(asked.near))
        n_all, taken = len(questions.documents), {*asked.needed, *near}
        others = [i for i in rng.sample(range(n_all), min(n_all, n_tokens // 8)) if i not in taken]
        chosen = [*asked.needed, *near, *others]
        task = (
            "Answer the question based on the given documents. Only give me the answer and do not output any other"
            " words.\n\n"
        )

        def build(n: int) -> Draft:
            listed = chosen[:n]
            random.Random(seed + "/order").shuffle(listed)
            texts = (f"Document {i}:\n{questions.documents[number]}" for i, number in enumerate(listed, 1))
            return Draft(
                f"{task}The following are given documents.\n\n" + "\n\n".join(texts),
                f"\n\n{task}Question: {asked.text}",
                " Answer:",
                asked.answers,
                min(listed.index(number) for number in asked.needed) / n,
            )

        return Recipe(build, len(asked.needed), len(chosen))


TASKS: dict[str, Task] = {
    "niah_single_1": Needles(128, haystack="noise"),
    "niah_single_2": Needles(128),
    "niah_single_3": Needles(128, value="uuids"),
    "niah_multikey_1": Needles(128, n_keys=4),
    "niah_multikey_2": Needles(128, haystack="needle"),
    "niah_multikey_3": Needles(128, haystack="needle", key="uuids", value="uuids"),
    "niah_multivalue": Needles(128, n_values=4),
    "niah_multiquery": Needles(128, n_keys=4, n_queries=4),
    "vt": VariableTracking(30),
    "cwe": CommonWords(120),
    "fwe": FrequentWords(50),
    "qa_1": Documents(32, "string_match_part"),
    "qa_2": Documents(32, "string_match_part", n_hops=2),
    # not in RULER: niah_single_2 with a short answer, for heat maps of depth and length
    "passkey": Needles(32),
}
RULER_TASKS = tuple(TASKS)[:13]


def make_sample(
    task: str,
    n_tokens: int,
    index: int,
    seed: int,
    count_tokens: Callable[[str], int],
    texts: Texts,
    *,
    depth: float | None = None,
) -> Sample:
    """Returns sample ``index`` of a task, with the largest haystack that keeps it within ``n_tokens``.

    Keys, values and questions depend on task, seed and index, but not on the length.

    Args:
        task: a name in :data:`TASKS`.
        n_tokens: prompt and longest answer together, as RULER counts.
        index: number of the sample, from 0.
        count_tokens: returns the number of tokens of a text, including anything that the caller adds around it.
        depth: depth of the needle in [0, 1], for tasks with one needle; None draws it.

    Raises:
        ConfigError: the task does not exist, an argument is out of range, or ``n_tokens`` is too small for the task.
    """
    if task not in TASKS:
        raise ConfigError(f"task={task!r}; allowed: {', '.join(TASKS)}")
    if index < 0:
        raise ConfigError(f"index={index}; allowed: 0 or more")
    kind = TASKS[task]
    if depth is not None and not kind.takes_depth:
        able = ", ".join(name for name, other in TASKS.items() if other.takes_depth)
        raise ConfigError(f"depth={depth} with task={task!r}; allowed only with {able}")
    if depth is not None and not 0 <= depth <= 1:
        raise ConfigError(f"depth={depth}; allowed: 0 to 1")
    recipe = kind.recipe(f"{seed}/{task}/{index}", n_tokens, texts, depth)

    def size(n: int) -> int:
        draft = recipe.build(n)
        return count_tokens(draft.context + draft.question + draft.answer_prefix) + kind.max_tokens

    n, n_used = _largest(size, n_tokens, recipe.least, recipe.most)
    if n_used > n_tokens:
        raise ConfigError(f"n_tokens={n_tokens}, the least for sample {index} of task={task!r} is {n_used}")
    draft = recipe.build(n)
    return Sample(
        **vars(draft),
        task=task,
        index=index,
        max_tokens=kind.max_tokens,
        metric=kind.metric,
        n_tokens=n_used - kind.max_tokens,
    )


def _largest(size: Callable[[int], int], limit: int, least: int, most: int) -> tuple[int, int]:
    """Returns the largest n in [least, most] with ``size(n) <= limit``and its size, or those of ``least``.

    ``size`` grows almost in proportion to n, so guessing along its slope needs half the calls of bisection.
    """
    low, low_size, high, guess = least, size(least), most + 1, min(least + 16, most)
    if low_size > limit:
        return low, low_size
    point, point_size = low, low_size  # slope: from ``low`` to here, the last size above the limit
    for n_calls in itertools.count(2):
        if high - low <= 1:
            break
        n = size(guess)
        if n <= limit:
            low, low_size = guess, n
        else:
            high = point = guess
            point_size = n
        slope = max(1e-3, (point_size - low_size) / (point - low))
        guess = low + int((limit - low_size) / slope) if n_calls < 9 else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
    return low, low_size


def _inserted(units: Sequence[str], items: Sequence[tuple[float, str]]) -> list[str]:
    """Returns ``units`` with every (depth, text) inserted; depth is the share of units before the text, in [0, 1]."""
    together = list(units)
    for depth, text in sorted(items, key=lambda item: item[0], reverse=True):  # last first: earlier indices stay valid
        together.insert(int(len(units) * depth), text)
    return together


def _new(kind: str, rng: random.Random, texts: Texts, used: set[str]) -> str:
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
