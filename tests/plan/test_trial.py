"""What an evaluation makes of a cache (plan/trial.py)."""

from __future__ import annotations

import numpy as np

from kvcompose_gguf import CompositionPlan
from kvcompose_gguf.plan.trial import Trial


def test_a_trial_keeps_what_its_plan_keeps():
    plan = CompositionPlan(5, (np.array([[0, 2], [1, 4]], np.int32), np.array([[3], [0]], np.int32)))
    assert Trial(plan).n_kept.tolist() == [2, 1]
    assert Trial(plan, biases=[np.zeros((2, 2), np.float32), np.zeros((2, 1), np.float32)]).n_kept.tolist() == [2, 1]


def test_without_a_plan_a_trial_keeps_what_no_bias_hides():
    hidden = -np.inf
    biases = [
        np.array([[0, hidden, 1, hidden], [hidden, hidden, -9, hidden]], np.float32),
        np.zeros((2, 4), np.float32),
    ]
    assert Trial(None, biases=biases).n_kept.tolist() == [1.5, 4]
