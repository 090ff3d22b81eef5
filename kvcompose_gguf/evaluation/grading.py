"""Grades answers to one sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..plan.geometry import LayerGeometry
from ..plan.trial import Trial
from ..tasks.answering import Reply
from ..tasks.samples import Sample
from . import metrics
from .records import FULL, Answer


@dataclass(frozen=True, eq=False)
class Grader:
    """Grades the answers to one sample against its references and the answer from the full cache.

    Attributes:
        type_kv: name of the cache type.
        layers: the cached layers.
        n_tokens: tokens of the context.
        full: the answer from the full cache.
    """

    sample: Sample
    type_kv: str
    layers: Sequence[LayerGeometry]
    n_tokens: int
    full: Reply

    def of_full(self, seconds: float) -> Answer:
        """Returns the answer from the full cache as a record."""
        return self._grade(FULL, 0.0, self.full, seconds, np.full(len(self.layers), self.n_tokens))

    def of_trial(self, method: str, ratio: float, trial: Trial, reply: Reply, seconds: float) -> Answer:
        """Returns the answer from the cache of ``trial`` as a record."""
        return self._grade(method, ratio, reply, seconds, trial.n_kept)

    def _grade(self, method: str, ratio: float, reply: Reply, seconds: float, n_kept: np.ndarray) -> Answer:
        sample = self.sample
        rows = [float(n) * layer.n_bytes_row for n, layer in zip(n_kept, self.layers, strict=True)]
        return Answer(
            sample.task, sample.index, self.type_kv, method, ratio,
            score=metrics.METRICS[sample.metric](reply.text, sample.references),
            exact=metrics.exact_match(_exact_part(reply.text, sample), sample.references, any_of=sample.any_of),
            kl=float(metrics.kl_divergence(self.full.logits, reply.logits).mean()),
            same_top=float(metrics.same_top(self.full.logits, reply.logits).mean()),
            depth=sample.depth, n_tokens=self.n_tokens, n_kept=tuple(round(float(n)) for n in n_kept),
            kv_bytes=round(sum(rows)), seconds=seconds, answer=reply.text,
            alike=metrics.look_alike(reply.text, sample.references, any_of=sample.any_of),
        )  # fmt: skip


def _exact_part(text: str, sample: Sample) -> str:
    """Returns the part of ``text`` that exact match reads: the first line with a word, or all of a list."""
    lines = [line for line in text.splitlines() if any(map(str.isalnum, line))]
    return lines[0] if lines and (sample.any_of or len(sample.references) == 1) else text
