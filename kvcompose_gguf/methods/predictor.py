"""How ``KVCompose(scoring="learned")`` scores a prompt: what it repeats, what that teaches, and what it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..kernels.types import FloatArray
from ..measurements.learned import Learned, read_learned, update_learned
from ..scoring.evidence import Evidence
from ..scoring.requests import SpotCheck

#: number of prompts that teach a model's prediction before it is trusted
N_FIRST = 2

#: share of these prompts that is repeated, and the largest number of tokens
FIRST_SHARE, FIRST_MOST = 0.2, 1024

#: the same for later prompts, which only check the prediction
CHECK_SHARE, CHECK_MOST = 0.125, 256

#: share of a prompt if the prediction agreed so well with the latest ones
SURE_SHARE, SURE = 0.0625, 0.85


@dataclass(frozen=True)
class Predictor:
    """What is known of a model, and how the latest context was scored with it.

    Attributes:
        family: the model (``native.family.family_of``).
        known: what was learnt of it; None: it is read before the next prompt.
        note: how the latest context was scored, for reports; empty: none was.
    """

    family: str = ""
    known: Learned | None = None
    note: str = ""

    def informed(self, known: Learned | None = None) -> Predictor:
        """Returns this with what is known of the model: what it has, or ``known``, or what the user's cache has."""
        if self.known is not None:
            return self
        return replace(self, known=read_learned(self.family) if known is None else known)

    def check(self, share: float | None) -> SpotCheck | None:
        """Returns the pieces of a context that are repeated; None: none, everything is predicted.

        Args:
            share: the share that the user wants; None: as much as the prediction needs.
        """
        known = self.known or Learned()
        if known.n_prompts < N_FIRST:
            return SpotCheck(share) if share else SpotCheck(FIRST_SHARE, FIRST_MOST)
        if share is None:
            is_sure = np.mean(known.agreements) >= SURE
            return SpotCheck(SURE_SHARE if is_sure else CHECK_SHARE, CHECK_MOST, to_end=False)
        return SpotCheck(share) if share else None

    def taught_by(self, evidence: Evidence, seen: Sequence[FloatArray], keep: bool) -> Predictor:
        """Returns this with what the repeated pieces of a context taught.

        Args:
            seen: what they paid to the context, for each layer float32 ``(n_head_kv, N)``; empty: nothing was repeated.
            keep: also for later prompts and processes.
        """
        if not seen:
            return replace(self, note="predicted")

        known = self.learn_from(evidence, seen) if keep else (self.known or Learned()).taught(evidence, seen)
        share = f"1/{round(evidence.n_tokens / len(evidence.repeated))}"
        note = f"repeat {share} (learning)"
        if known.n_prompts > N_FIRST:
            note = f"predicted, checked {share} (agreement {known.agreements[-1]:.2f})"
        return replace(self, known=known, note=note)

    def learn_from(self, evidence: Evidence, seen: Sequence[FloatArray]) -> Learned:
        """Returns what is known of the model after this context, and keeps it for later prompts and processes."""
        return update_learned(self.family, lambda known: known.taught(evidence, seen))

    def predict(self, evidence: Evidence, seen: Sequence[FloatArray]) -> list[FloatArray]:
        """Returns the attention that a repeat of the context would pay, for each layer float32 ``(n_head_kv, N)``.

        Args:
            seen: as in ``taught_by``; empty: nothing was repeated.
        """
        assert self.known is not None
        predicted = self.known.predict(evidence)
        if not seen:
            return predicted
        # the rest of the repeat can only pay more
        return [np.maximum(a, b) for a, b in zip(predicted, seen, strict=True)]
