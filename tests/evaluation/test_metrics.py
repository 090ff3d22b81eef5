"""Scores of answers and of curves (evaluation/metrics.py), against values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from kvcompose_gguf import ConfigError
from kvcompose_gguf.evaluation import metrics
from kvcompose_gguf.evaluation.metrics import (
    area_under_curve,
    bootstrap_interval,
    exact_match,
    kl_divergence,
    largest_ratio_within,
    look_alike,
    same_top,
    string_match_all,
    string_match_part,
)


def test_match_all_is_the_share_of_references_in_the_answer() -> None:
    assert string_match_all("It is 12 and ABC.", ["12", "abc", "xyz", "34"]) == 0.5
    assert string_match_all("", ["12"]) == 0
    assert string_match_all("12", ["12"]) == 1


def test_match_part_is_one_if_any_reference_is_in_the_answer() -> None:
    assert string_match_part("In PARIS, I think", ["Paris", "Lyon"]) == 1
    assert string_match_part("Rome", ["Paris", "Lyon"]) == 0


def test_control_characters_separate_as_in_ruler() -> None:
    assert string_match_all("new\x00york", ["new york"]) == 0
    assert string_match_all("new\x00york", ["york"]) == 1
    assert exact_match("\x02 new\x00york \x1f", ["New York"]) == 1


@pytest.mark.parametrize(
    "answer",
    [
        "12, ab",
        "AB and 12",
        " 1. ab\n2. 12\n",
        "1) 12; 2) ab.",
        "- ab\n- 12",
        '(ab), "12"!',
        "ab, and 12",
        "* AB * 12",
        "ab 12",
        "[ab & 12]",
    ],
)
def test_an_exact_answer_is_the_references_in_any_order_and_list_style(answer: str) -> None:
    assert exact_match(answer, ["12", "ab"]) == 1


@pytest.mark.parametrize(
    "answer",
    [
        "12",
        "ab",
        "",
        "12, ab, cd",
        "12, ab, 12",
        "the values are 12 and ab",
        "12ab",
        "12, abc",
        "x12, ab",
        "12, ab-c",
        "12 or ab",
        "123. ab",
        "12 and ab 3456",
    ],
)
def test_an_answer_with_less_or_more_is_not_exact(answer: str) -> None:
    assert exact_match(answer, ["12", "ab"]) == 0


def test_exact_match_takes_the_longest_reference_first_and_ignores_punctuation_around_references() -> None:
    assert exact_match("New York, York", ["York", "New York"]) == 1
    assert exact_match("york", ["York."]) == 1
    assert exact_match("St. Mary's", ["st. mary's"]) == 1
    assert exact_match("a  b", ["A B"]) == 1
    assert exact_match("...", ["..."]) == 1
    assert exact_match("France", ["France", "France"]) == 1


def test_one_of_several_alternatives_is_exact_where_any_may_be() -> None:
    assert exact_match("Denmark.", ["Denmark", "in Denmark"], any_of=True) == 1
    assert exact_match("in Denmark", ["Denmark", "in Denmark"], any_of=True) == 1
    assert exact_match("near Denmark", ["Denmark", "in Denmark"], any_of=True) == 0


@pytest.mark.parametrize(
    ("answer", "references", "share"),
    [
        ("The number is 1234568.", ["1234567"], 1),
        ("The number is 1234567.", ["1234567"], 0),
        ("The number is 123456.", ["1234567"], 0),  # another form
        ("It is 1234567, not 7654321.", ["1234567"], 0),
        ("I do not know, sorry.", ["1234567"], 0),
        ("letters", ["1234567"], 0),
        ("1234567, 9999999", ["1234567", "7654321", "7777777"], 2 / 3),
        ("D4E1BEB5-1F1B-49C7-8e2d-000000000000", ["d4e1beb5-1f1b-49c7-8e2d-b3a0a5f8f0c1"], 1),
        ("London", ["Lisbon"], 0),  # words have no form
    ],
)
def test_another_number_of_the_same_form_looks_right(answer: str, references: list[str], share: float) -> None:
    assert look_alike(answer, references) == pytest.approx(share)
    assert look_alike(answer + f" {references[0]}", references, any_of=True) == 0


@pytest.mark.parametrize("metric", [string_match_all, string_match_part, exact_match, look_alike])
def test_no_references_and_a_bare_string_are_refused(metric: Callable[..., float]) -> None:
    with pytest.raises(ConfigError, match=r"references=\[\]"):
        metric("a", [])
    with pytest.raises(ConfigError, match="references='a'"):
        metric("a", "a")


#
# intervals and curves
#


def test_an_interval_equals_a_plain_bootstraps() -> None:
    values = [0, 1, 1, 0.5, 1, 0, 0.25]
    low, high = bootstrap_interval(values)
    draws = np.random.default_rng(0).integers(0, 7, (2000, 7))
    means = [sum(values[i] for i in draw) / 7 for draw in draws]
    assert (low, high) == pytest.approx((np.quantile(means, 0.025), np.quantile(means, 0.975)))
    assert low < np.mean(values) < high
    assert bootstrap_interval(values, ["a"] * 7) == (low, high)


def test_an_interval_narrows_with_more_values_and_is_the_same_every_time() -> None:
    assert bootstrap_interval([0.5]) == (0.5, 0.5)
    few, many = bootstrap_interval([0, 1] * 10), bootstrap_interval([0, 1] * 1000)
    assert many[1] - many[0] < few[1] - few[0]
    assert few == bootstrap_interval([0, 1] * 10)
    assert many[1] - many[0] == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(2000), rel=0.1)


def test_wrong_arguments_of_an_interval_are_named() -> None:
    with pytest.raises(ConfigError, match=r"values of shape \(0,\)"):
        bootstrap_interval([])
    with pytest.raises(ConfigError, match=r"values of shape \(2,\), 1 strata"):
        bootstrap_interval([1, 2], ["a"])


def test_the_area_under_a_flat_curve_is_its_score() -> None:
    assert area_under_curve([0, 0.5, 0.875], [0.8, 0.8, 0.8]) == pytest.approx(0.8)
    assert area_under_curve([0, 1], [1, 0]) == 0.5
    # (0.5 * 1 + 0.25 * 0.75) / 0.75, in any order
    assert area_under_curve([0.75, 0, 0.5], [0.5, 1, 1]) == pytest.approx(0.6875 / 0.75)


def test_the_largest_ratio_is_at_the_first_crossing() -> None:
    ratios = [0, 0.25, 0.5, 0.75]
    assert largest_ratio_within(ratios, [1, 1, 0.8, 0.2], 0.1) == pytest.approx(0.375)
    assert largest_ratio_within(ratios, [1, 0.5, 1, 1], 0.1) == pytest.approx(0.05)
    assert largest_ratio_within(ratios, [0.8, 0.9, 0.8, 0.76], 0.05) == 0.75
    assert largest_ratio_within(ratios, [1, 0.9, 0.8, 0.7], 0.0) == 0
    assert largest_ratio_within(ratios, [1, 0.9, 0.8, 0.7], 0.2) == pytest.approx(0.5)
    assert largest_ratio_within([0.5, 0], [0, 0.5], 0.5) == pytest.approx(0.25)
    assert math.isnan(largest_ratio_within(ratios, [0, 1, 1, 1], 0.1))


@pytest.mark.parametrize("curve", [area_under_curve, lambda x, y: largest_ratio_within(x, y, 0.1)])
def test_a_curve_needs_ratio_zero_and_every_ratio_once(curve: Callable[..., float]) -> None:
    for ratios in ([0.25, 0.5], [0, 0], [0, 1.5], [0, float("nan")]):
        with pytest.raises(ConfigError, match=r"ratios=\["):
            curve(ratios, [1, 1])
    with pytest.raises(ConfigError, match=r"ratios of shape \(2,\), scores of \(1,\)"):
        curve([0, 0.5], [1])


def test_an_area_needs_two_ratios_and_a_loss_is_a_fraction() -> None:
    with pytest.raises(ConfigError, match="at least two"):
        area_under_curve([0], [1])
    with pytest.raises(ConfigError, match="loss=5"):
        largest_ratio_within([0, 0.5], [1, 1], 5)


#
# divergence
#


def test_divergence_of_two_coins_is_the_textbook_one() -> None:
    p = np.log(np.array([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]], np.float32))
    q = np.log(np.array([[0.25, 0.75], [0.9, 0.1], [0.5, 0.5]], np.float32))
    expected = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0, 0.2 * math.log(0.4) + 0.8 * math.log(1.6)]
    divergence = kl_divergence(p + 7, q - 3)  # logits need not be normalised
    assert divergence.dtype == np.float64
    np.testing.assert_allclose(divergence, expected, atol=1e-6)


def test_divergence_survives_large_logits_and_minus_infinity() -> None:
    inf = np.inf
    p = np.array([[1e4, -1e4, 0], [0, -inf, 0], [0, 0, -inf], [1, 2, 3]], np.float32)
    q = np.array([[-1e4, 1e4, 0], [0, 5, 0], [0, -inf, -inf], [1, 2, 3]], np.float32)
    divergence = kl_divergence(p, q)
    assert divergence[0] == pytest.approx(2e4)
    assert divergence[1] == pytest.approx(math.log(2 + math.exp(5)) - math.log(2))
    assert divergence[2] == inf
    assert divergence[3] == 0


def test_divergence_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    p, q = rng.normal(0, 3, (2, 13, 50)).astype(np.float32)
    whole = kl_divergence(p, q)
    p64, q64 = p.astype(np.float64), q.astype(np.float64)
    soft_p, soft_q = np.exp(p64), np.exp(q64)
    soft_p /= soft_p.sum(1, keepdims=True)
    soft_q /= soft_q.sum(1, keepdims=True)
    np.testing.assert_allclose(whole, (soft_p * np.log(soft_p / soft_q)).sum(1), rtol=1e-10)
    monkeypatch.setattr(metrics, "CHUNK", 100)
    largest = np.abs(kl_divergence(p, q) - whole).max()
    print(f"largest difference {largest} nats")
    assert largest == 0
    assert kl_divergence(p[:0], q[:0]).shape == (0,)


def test_same_top_compares_the_most_likely_tokens_and_ties_go_to_the_lowest() -> None:
    p = np.array([[1, 2, 0], [3, 3, 0], [0, 1, 2]], np.float32)
    q = np.array([[0, 9, 8], [0, 3, 0], [5, 5, 5]], np.float32)
    assert same_top(p, q).tolist() == [True, False, False]


def test_logits_of_two_shapes_are_refused() -> None:
    for function in (kl_divergence, same_top):
        with pytest.raises(ConfigError, match=r"shapes \(2, 3\) and \(2, 4\)"):
            function(np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32))
        with pytest.raises(ConfigError, match=r"allowed: \(n, n_vocab\)"):
            function(np.zeros(3, np.float32), np.zeros(3, np.float32))
