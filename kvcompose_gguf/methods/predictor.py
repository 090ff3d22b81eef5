"""How ``KVCompose(scoring="learned")`` scores a prompt: what it repeats, what that teaches, and what it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..kernels.types import FloatArray
from ..measurements.learned import Learned, read_learned, update_learned
from ..scoring.evidence import Evidence
from ..scoring.requests import SpotCheck

#: share of a model's first prompt that is repeated, and the largest number of tokens: it should not take long. Nothing
#: else is known, so one piece is too little: a needle in 566 tokens was found in one text of four, with two in all
FIRST_SHARE, FIRST_MOST, FIRST_LEAST = 0.2, 1024, 256

#: the same for the next prompts: only a whole repeat shows all that a token gets, so it teaches far more than pieces
NEXT_SHARE, NEXT_MOST = 1.0, 2048

#: number of prompts, and of their repeated tokens, from which on the prediction is trusted
N_PROMPTS, N_TOKENS = 2, 512

#: the same for prompts from then on; these pieces check the prediction, correct it, and teach more
CHECK_SHARE, CHECK_MOST = 0.125, 256

#: largest number of tokens of a later part that are repeated
PART_MOST = 128

#: share of a prompt if the agreement of the latest ones has at least this mean
SURE_SHARE, SURE = 0.0625, 0.7


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

    @property
    def is_trusted(self) -> bool:
        """Returns whether enough was learnt of the model to predict with it."""
        return self.known is not None and self.known.n_prompts >= N_PROMPTS and self.known.n_tokens >= N_TOKENS

    def check(self, share: float | None) -> SpotCheck | None:
        """Returns the pieces of a context that are repeated; None: none, everything is predicted.

        Args:
            share: the share that the user wants; None: as much as the prediction needs.
        """
        if not self.is_trusted and not share:
            is_first = self.known is None or not self.known.n_prompts
            if is_first:
                return SpotCheck(FIRST_SHARE, FIRST_MOST, least=FIRST_LEAST)
            return SpotCheck(NEXT_SHARE, NEXT_MOST)
        if share is None:
            assert self.known is not None
            is_sure = np.mean(self.known.agreements) >= SURE
            return SpotCheck(SURE_SHARE if is_sure else CHECK_SHARE, CHECK_MOST, to_end=False)
        return SpotCheck(share) if share else None

    def n_again(self, share: float | None, n_tokens: int) -> int:
        """Returns how many of a later part's ``n_tokens`` are repeated: they show which of its tokens are important.

        Args:
            share: the share that the user wants; None: as if the prediction were not sure.
        """
        return min(PART_MOST, round((CHECK_SHARE if share is None else share) * n_tokens))

    def taught_by(self, evidence: Evidence, seen: Sequence[FloatArray], keep: bool) -> Predictor:
        """Returns this with what the repeated pieces of a context taught.

        Args:
            seen: what they paid to the context, for each layer float32 ``(n_head_kv, N)``; empty: nothing was repeated.
            keep: also for later prompts and processes.
        """
        if not seen:
            return replace(self, note="predicted")

        known = self.learn_from(evidence, seen) if keep else (self.known or Learned()).taught(evidence, seen)
        n = round(evidence.n_tokens / len(evidence.repeated))
        share = f"1/{n}" if n > 1 else "all"
        note = f"repeat {share} (learning)"
        # no agreement: what was known is of another model, and forgotten
        if self.is_trusted and known.agreements and len(evidence.repeated) < evidence.n_tokens:
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
        if not seen:
            return self.known.predict(evidence)
        if len(evidence.repeated) == evidence.n_tokens:
            return list(seen)
        predicted = self.known.predict(evidence)
        # the rest of the repeat can only pay more
        return [np.maximum(a, b) for a, b in zip(predicted, seen, strict=True)]
