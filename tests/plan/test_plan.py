"""Checks which arrays a CompositionPlan accepts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kvcompose_gguf import CompositionPlan, ConfigError

N_TOKENS = 6


def cells(*heads: list[int]) -> np.ndarray:
    return np.array(heads, np.int32)


def test_layers_may_differ_in_heads_and_in_kept_tokens() -> None:
    plan = CompositionPlan(N_TOKENS, (cells([0, 5], [2, 3]), cells([1, 2, 4]), cells([0], [1], [5])))
    assert plan.n_kept.tolist() == [2, 3, 1]
    assert plan.n_kept.dtype == np.int64


def test_a_layer_may_keep_nothing_as_long_as_another_keeps_something() -> None:
    plan = CompositionPlan(N_TOKENS, (np.empty((2, 0), np.int32), cells([3], [4])))
    assert plan.n_kept.tolist() == [0, 1]


REFUSED = {
    "the index N": (cells([0, N_TOKENS]), r"rows\[0\] has indices outside of \[0, 6\)"),
    "a negative index": (cells([-1, 2]), r"rows\[0\] has indices outside of \[0, 6\)"),
    "a falling head": (cells([2, 1]), r"rows\[0\] is not strictly ascending"),
    "a repeated token": (cells([1, 1]), r"rows\[0\] is not strictly ascending"),
    "a falling second head": (cells([0, 1, 2], [0, 3, 2]), r"rows\[0\] is not strictly ascending"),
    "int64": (cells([0, 1]).astype(np.int64), r"rows\[0\] is int64 \(1, 2\)"),
    "float32": (cells([0, 1]).astype(np.float32), r"rows\[0\] is float32 \(1, 2\)"),
    "one axis": (cells([0, 1])[0], r"rows\[0\] is int32 \(2,\)"),
    "three axes": (cells([0, 1])[None], r"rows\[0\] is int32 \(1, 1, 2\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_array_that_is_not_a_selection_is_refused(case: str) -> None:
    array, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        CompositionPlan(N_TOKENS, (array,))


def test_the_message_names_the_layer_at_fault() -> None:
    with pytest.raises(ConfigError, match=r"^rows\[2\] "):
        CompositionPlan(N_TOKENS, (cells([0]), cells([5]), cells([6])))


@pytest.mark.parametrize("layers", [(), (np.empty((2, 0), np.int32),), (np.empty((2, 0), np.int32),) * 3])
def test_a_plan_that_keeps_no_token_at_all_is_refused(layers: tuple[np.ndarray, ...]) -> None:
    with pytest.raises(ConfigError, match="keeps no token"):
        CompositionPlan(N_TOKENS, layers)


def test_a_plan_cannot_be_changed() -> None:
    plan = CompositionPlan(N_TOKENS, (cells([0, 5], [2, 3]), cells([1])))
    for array in plan.rows:
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.n_tokens = 7  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.rows = ()  # type: ignore[misc]


def test_keep_all_keeps_every_token_in_every_head() -> None:
    plan = CompositionPlan.keep_all(N_TOKENS, [2, 1, 3])
    assert plan.n_tokens == N_TOKENS
    assert [layer.shape for layer in plan.rows] == [(2, 6), (1, 6), (3, 6)]
    for layer in plan.rows:
        assert layer.dtype == np.int32
        assert (layer == np.arange(N_TOKENS)).all()


def test_keep_all_of_no_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="keeps no token"):
        CompositionPlan.keep_all(0, [2, 2])
