"""Tasks that ask which words of a list are the most frequent."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

from .task import Draft, Recipe, Task, new_name
from .texts import Texts


@dataclass(frozen=True)
class CommonWords(Task):
    """A numbered list in which ten words occur more often than the others, after a worked example."""

    def recipe(self, seed: str, n_tokens: int, texts: Texts, depth: float | None) -> Recipe:
        rng = random.Random(seed)
        # RULER's two settings: occurrences of common and of other words in the list, then the same for the example
        often, seldom, n_shown, shown_often, shown_seldom = (6, 1, 20, 3, 1) if n_tokens < 4096 else (30, 3, 40, 10, 3)
        most = n_tokens // (2 * seldom)  # a word takes at least one token, and so does its number
        words, used = rng.sample(texts.words, len(texts.words)), set(texts.words)
        words += [new_name("words", rng, texts, used) for _ in range(50 + most - len(words))]  # hyphenated words
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
