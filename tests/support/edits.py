"""Variants that edit a cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcompose_gguf import CompositionPlan
from kvcompose_gguf.methods.variant import Variant
from kvcompose_gguf.plan.trial import Trial
from kvcompose_gguf.scoring.evidence import Evidence


def edits_of(
    method: Variant, evidence: Evidence, scores: Sequence[np.ndarray] | None = None
) -> tuple[CompositionPlan, Trial]:
    """Returns the trial of a variant that edits the cache, and its plan."""
    edited = method.trial(evidence, scores)
    assert edited.plan is not None
    return edited.plan, edited
