"""Methods of one's own: a class, a function, a registered name."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.evidence import make_evidence
from support.formulas import assert_plan, assert_scores, kvzip, norm

from kvcompose_gguf import ConfigError
from kvcompose_gguf.methods import METHODS, make_method, register
from kvcompose_gguf.methods.custom import Custom
from kvcompose_gguf.methods.knorm import KNorm
from kvcompose_gguf.scoring.evidence import Evidence
from kvcompose_gguf.scoring.requests import AttentionRequest, Prompts, Repeat, StateRequest, Window


def test_the_documented_ten_lines_are_a_method() -> None:
    [example] = doctest.DocTestFinder(recurse=False).find(Custom, "Custom", globs={})
    assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
    method = example.globs["method"]
    assert method.attention_request == AttentionRequest(Window(32), "mean")
    assert method.state_request is None

    evidence = make_evidence("layers that differ", 40)
    expected = kvzip(evidence)
    for l, scores in enumerate(expected):
        for row, values in zip(scores, evidence.values(l), strict=True):
            row[:] = [x * norm(value) for x, value in zip(row, values, strict=True)]
    assert_plan(method, evidence, assert_scores(method, evidence, expected), [10, 10, 10])


def test_a_custom_scorer_needs_no_request_and_may_return_any_floats() -> None:
    evidence = make_evidence("GQA", 12)

    def every_third(evidence: Evidence) -> list[Any]:
        return [[[float(i % 3 == 0) for i in range(evidence.n_tokens)]] * g.n_head_kv for g in evidence.layers]

    method = Custom(n_kept=4, scorer=every_third)
    assert (method.attention_request, method.state_request) == (None, None)
    for cells in method.plan(evidence).rows:
        assert cells.tolist() == [[0, 3, 6, 9]] * 2
    assert Custom(n_kept=4, scorer=every_third, states=StateRequest(8)).state_request == StateRequest(8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorer": None}, "scorer=None is not a function"),
        ({"scorer": len, "request": Window(3)}, "request=.* is not of class AttentionRequest"),
        ({"scorer": len, "states": 3}, "states=3 is not of class StateRequest"),
        ({"scorer": len, "n_sink": -1}, "n_sink=-1 is negative"),
    ],
)
def test_a_custom_method_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Custom(n_kept=4, **options)


def loose(**options: Any) -> dict[str, Any]:
    """Returns options whose types nobody checks, to give wrong ones."""
    return options


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda: Repeat(chunk=-1), "chunk=-1 is not positive"), (lambda: Repeat(chunk=0), "chunk=0 is not positive"),
        (lambda: Repeat(chunk=True), "chunk=True is not an integer"), (lambda: Repeat(fraction=0), "fraction=0 is not in"),
        (lambda: Repeat(fraction=math.nan), "fraction=nan is not in"), (lambda: Repeat(**loose(fraction="1")), "is not a number"),
        (lambda: Repeat(**loose(instruction=None)), "instruction=None is not a text"),
        (lambda: Repeat(**loose(continuation=b"x")), "continuation=b'x' is not a text"), (lambda: Repeat(**loose(own=1)), "own=1 is neither"),
        (lambda: Repeat(own=True, fraction=0.5), "own=True needs the whole context, fraction=1, not 0.5"),
        (lambda: Prompts([]), r"texts=\[\] is not a list of texts"), (lambda: Prompts("who?"), "texts='who\\?' is not"),
        (lambda: Prompts(["", "a"]), "is not a list of texts"), (lambda: Prompts(["a"], 0), "chunk=0 is not positive"),
        (lambda: Window(0), "size=0 is not positive"), (lambda: Window(**loose(size=1.5)), "size=1.5 is not an integer"),
        (lambda: AttentionRequest(Window(1), **loose(aggregation="sum")), "aggregation='sum' is none of 'max', 'mean'"),
        (lambda: AttentionRequest(**loose(queries=Window)), "queries=.* is not a Queries: use e.g. Repeat"),
        (lambda: StateRequest(0), "n_queries=0 is not positive"), (lambda: StateRequest(**loose(n_queries=None)), "is not an integer"),
    ],
)  # fmt: skip
def test_a_request_out_of_range_is_refused(request_of: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        request_of()


def test_prompts_may_be_a_list() -> None:
    assert Prompts(["a", "b"]) == Prompts(("a", "b"))
    assert hash(AttentionRequest(Prompts(["a"]))) == hash(AttentionRequest(Prompts(("a",))))


@pytest.mark.parametrize("infinite", [[-np.inf], [-np.inf, np.inf], [np.inf, np.nan]], ids=str)
def test_scores_of_minus_infinity_are_refused(infinite: list[float]) -> None:
    scores = np.zeros((2, 12), np.float32)
    scores[1, : len(infinite)] = infinite
    with pytest.raises(ConfigError, match=r"scores\[0\] has NaN or -infinity"):
        Custom(n_kept=4, scorer=lambda e: [scores, scores]).plan(make_evidence("GQA", 12))


@pytest.mark.parametrize(
    "bad", [lambda e: [], lambda e: [np.zeros((2, 3))] * 2, lambda e: [np.full((2, 12), np.nan)] * 2]
)
def test_a_custom_scorer_of_another_shape_is_refused(bad: Callable[[Evidence], Any]) -> None:
    with pytest.raises(ConfigError, match="scores"):
        Custom(n_kept=4, scorer=bad).plan(make_evidence("GQA", 12))


def test_a_scorer_is_registered_like_a_built_in_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcompose_gguf.methods.METHODS", dict(METHODS))
    register("by-norm", lambda **options: Custom(scorer=lambda e: KNorm(n_kept=1).scores(e), **options))
    evidence = make_evidence()
    got = make_method("by-norm,n_kept=5").plan(evidence)
    assert [c.tolist() for c in got.rows] == [c.tolist() for c in KNorm(n_kept=5).plan(evidence).rows]
    with pytest.raises(ConfigError, match="'by-norm' is taken"):
        register("by-norm", KNorm)
