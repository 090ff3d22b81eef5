"""Answers of an evaluation, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kvcompose_gguf.evaluation.records import Answer, SampleCost

SETTINGS = {"tasks": ["a", "b"], "ratios": [0.5, 0.75], "seed": 0}

ENVIRONMENT = {"model": "tiny.gguf", "date": "2026-01-01", "cpu": "a CPU"}


def answer(task: str, index: int, method: str, ratio: float, score: float, **others: Any) -> Answer:
    values: dict[str, Any] = {
        "type_kv": "f16", "exact": 0.0, "kl": None, "same_top": None, "depth": None, "n_tokens": 100,
        "n_kept": None, "kv_bytes": 1000, "seconds": 1.0, "answer": "12\u2028\n",
    }  # fmt: skip
    return Answer(task=task, index=index, method=method, ratio=ratio, score=score, **(values | others))


def answers_of(scores: Sequence[float], task: str = "a", index: int = 0, **others: Any) -> list[Answer]:
    """Returns answers to one sample: the full cache, then KVCompose and SnapKV at 0.5 and 0.75."""
    columns = [("full", 0.0), ("KVCompose", 0.5), ("KVCompose", 0.75), ("SnapKV", 0.5), ("SnapKV", 0.75)]
    return [answer(task, index, *column, score, **others) for column, score in zip(columns, scores, strict=True)]


def cost_of(sample: Iterable[Answer], seconds: float = 2.0) -> SampleCost:
    first = next(iter(sample))
    return SampleCost(first.task, first.index, first.type_kv, 100, seconds, {"repeat": 3.0, "window": 0.25}, 9.0)


#: two samples of a and one of b, so that the mean over samples differs from the mean over tasks
SMALL = [
    answers_of([1.0, 1.0, 0.0, 0.5, 0.0], "a", 0),
    answers_of([1.0, 0.5, 0.5, 0.5, 0.0], "a", 1),
    answers_of([0.5, 0.5, 0.25, 0.0, 0.0], "b", 0),
]


def flat(samples: Iterable[Iterable[Answer]]) -> list[Answer]:
    return [one for sample in samples for one in sample]


def random_answers(n_of_task: dict[str, int], seed: int = 0) -> list[Answer]:
    rng = np.random.default_rng(seed)
    return [
        replace(one, score=float(rng.random()), exact=float(rng.integers(2)), kl=float(rng.random()),
                same_top=float(rng.random()), seconds=float(rng.random()), n_kept=tuple(rng.integers(0, 100, 2).tolist()))
        for task, n in n_of_task.items() for i in range(n) for one in answers_of([0] * 5, task, i)
    ]  # fmt: skip


def needles() -> list[Answer]:
    """Two depths with two samples each; only the full cache finds all needles."""
    return [
        replace(one, depth=depth)
        for index, (depth, scores) in enumerate(
            [(0.0, [1, 1, 0, 0, 0]), (0.0, [1, 0, 0, 0, 0]), (0.5, [1, 1, 1, 0, 0]), (0.5, [1, 1, 0, 1, 0])]
        )
        for one in answers_of(scores, "passkey", index)
    ]


CONFIG = {"settings": SETTINGS, "environment": ENVIRONMENT, "resumed": []}
