"""Questions about documents among others."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .task import Draft, Recipe, Task
from .texts import Texts


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
