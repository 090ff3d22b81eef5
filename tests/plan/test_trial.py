"""What an evaluation makes of a cache, and the names of cache types (plan/trial.py, plan/kv_types.py)."""

from __future__ import annotations

import numpy as np
import pytest

from kvcompose_gguf import CompositionPlan, ConfigError
from kvcompose_gguf.plan.kv_types import KV_TYPES, PLAIN_TYPES, ggml_type
from kvcompose_gguf.plan.trial import Trial


def test_a_trial_keeps_what_its_plan_keeps():
    plan = CompositionPlan(5, (np.array([[0, 2], [1, 4]], np.int32), np.array([[3], [0]], np.int32)))
    assert Trial(plan).n_kept.tolist() == [2, 1]
    assert Trial(plan, biases=[np.zeros((2, 2), np.float32), np.zeros((2, 1), np.float32)]).n_kept.tolist() == [2, 1]


def test_without_a_plan_a_trial_keeps_what_no_bias_hides():
    hidden = -np.inf
    biases = [np.array([[0, hidden, 1, hidden], [hidden, hidden, -9, hidden]], np.float32), np.zeros((2, 4), np.float32)]
    assert Trial(None, biases=biases).n_kept.tolist() == [1.5, 4]


def test_every_cache_type_is_a_ggml_type():
    assert [ggml_type("x", name) for name in KV_TYPES] == [0, 1, 30, 8, 7, 6, 3, 2, 20]
    assert ggml_type("x", "Q8_0") == 8
    assert set(PLAIN_TYPES) < set(KV_TYPES)
    with pytest.raises(ConfigError, match="types_kv='f17' is not a ggml type; use for example f16 or q8_0"):
        ggml_type("types_kv", "f17")
