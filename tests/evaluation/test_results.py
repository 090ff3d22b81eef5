"""The summary of an evaluation (evaluation/results.py). Numbers are worked out by hand or by plain loops over the records."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from support.answers import CONFIG, SMALL, answers_of, flat, needles, random_answers

from kvcompose_gguf.errors import ConfigError
from kvcompose_gguf.evaluation.metrics import bootstrap_interval
from kvcompose_gguf.evaluation.report import markdown
from kvcompose_gguf.evaluation.results import summarise


def test_means_areas_and_ratios_equal_values_computed_by_hand() -> None:
    (part,) = summarise(flat(SMALL)).types
    assert (part.type_kv, part.tasks, part.n_samples, part.n_incomplete) == ("f16", ("a", "b"), 3, 0)
    cells = {(cell.method, cell.ratio): cell for cell in part.cells}
    assert list(cells) == [("full", 0), ("KVCompose", 0.5), ("KVCompose", 0.75), ("SnapKV", 0.5), ("SnapKV", 0.75)]
    # the tasks' means, then theirs: full (1 + 1/2) / 2, KVCompose (3/4 + 1/2) / 2 and (1/4 + 1/4) / 2
    assert [cell.score.value for cell in part.cells] == [0.75, 0.625, 0.25, 0.25, 0]
    assert [mean.value for mean in cells["KVCompose", 0.75].tasks] == [0.25, 0.25]
    assert [mean.n for mean in cells["KVCompose", 0.75].tasks] == [2, 1]
    assert cells["full", 0].score.n == 3
    first, second = part.curves
    assert (first.method, second.method) == ("KVCompose", "SnapKV")
    assert first.area.value == pytest.approx((0.5 * (0.75 + 0.625) / 2 + 0.25 * (0.625 + 0.25) / 2) / 0.75)
    assert second.area.value == pytest.approx((0.5 * (0.75 + 0.25) / 2 + 0.25 * 0.25 / 2) / 0.75)
    # 0.75 falls to 0.675 and 0.6: KVCompose on the lines to (0.5, 0.625) and (0.75, 0.25), SnapKV to (0.5, 0.25)
    assert (first.within_10, first.within_20) == pytest.approx((0.5 * 0.075 / 0.125, 0.5 + 0.25 * 0.025 / 0.375))
    assert (second.within_10, second.within_20) == pytest.approx((0.5 * 0.075 / 0.5, 0.5 * 0.15 / 0.5))


def test_differences_are_paired_by_sample() -> None:
    (part,) = summarise(flat(SMALL)).types
    found = {(cell.method, cell.ratio): cell.difference for cell in part.cells}
    assert [found[column] for column in (("full", 0), ("KVCompose", 0.5), ("KVCompose", 0.75))] == [None] * 3
    at_half = found["SnapKV", 0.5]
    assert at_half is not None
    assert at_half.value == (-0.25 - 0.5) / 2  # a: -1/2 and 0, b: -1/2
    assert (at_half.low, at_half.high) == (
        -0.5,
        -0.25,
    )  # b has one sample, and a's draws with both of one are a quarter
    assert part.curves[0].difference is None
    assert part.curves[1].difference is not None
    assert part.curves[1].difference.value == pytest.approx(part.curves[1].area.value - part.curves[0].area.value)
    (other,) = summarise(flat(SMALL), reference="SnapKV").types
    reverse = {(cell.method, cell.ratio): cell.difference for cell in other.cells}["KVCompose", 0.5]
    assert reverse is not None
    assert (reverse.value, reverse.low, reverse.high) == (0.375, 0.25, 0.5)


def test_all_means_equal_those_of_plain_loops() -> None:
    answers = random_answers({"b": 7, "a": 4})
    (part,) = summarise(answers).types
    for cell in part.cells:
        mine = [one for one in answers if (one.method, one.ratio) == (cell.method, cell.ratio)]
        for name in ("score", "exact", "kl", "same_top"):
            means = []
            for task in ("a", "b"):
                values = [getattr(one, name) for one in mine if one.task == task]
                means.append(sum(values) / len(values))
            assert getattr(cell, name).value == pytest.approx(sum(means) / 2)
        assert cell.n_kept == pytest.approx([sum(one.n_kept[il] for one in mine) / 11 for il in (0, 1)])
        assert cell.seconds == sorted(one.seconds for one in mine)[5]
        assert (cell.n_tokens, cell.kv_bytes) == (100, 1000)


def test_an_interval_is_of_draws_within_the_tasks() -> None:
    answers = random_answers({"a": 5, "b": 20})
    (part,) = summarise(answers).types
    full = {task: [one.score for one in answers if one.task == task and one.method == "full"] for task in ("a", "b")}
    rng = np.random.default_rng(1)
    means = []
    for _ in range(4000):
        drawn = [np.mean(rng.choice(values, len(values))) for values in full.values()]
        means.append(sum(drawn) / 2)
    low, high = np.quantile(means, [0.025, 0.975])
    score = part.cells[0].score
    print("largest difference of a bound:", max(abs(score.low - low), abs(score.high - high)))
    assert (score.low, score.high) == pytest.approx((low, high), abs=0.02)
    for values, mean in zip(full.values(), part.cells[0].tasks, strict=True):
        assert (mean.low, mean.high) == bootstrap_interval(values)


def test_of_one_task_the_interval_is_the_plain_one() -> None:
    answers = random_answers({"a": 9})
    (part,) = summarise(answers).types
    for cell in part.cells:
        assert (cell.score.low, cell.score.high) == pytest.approx((cell.tasks[0].low, cell.tasks[0].high))


def test_the_order_of_samples_does_not_matter() -> None:
    answers = random_answers({"a": 5, "b": 3})
    samples = [answers[i : i + 5] for i in range(0, len(answers), 5)]
    assert summarise(flat(samples[::-1])) == summarise(answers)


def test_only_samples_with_every_method_and_ratio_count() -> None:
    answers = flat(SMALL) + answers_of([1, 1, 1, 1, 1], "a", 2)[:-1] + answers_of([1, 1, 1, 1, 1], "c", 0)[:1]
    (part,) = summarise(answers).types
    assert part.n_incomplete == 2
    assert replace(part, n_incomplete=0) == summarise(flat(SMALL)).types[0]


def test_what_not_every_sample_has_has_no_mean() -> None:
    first, *others = random_answers({"a": 2})
    (part,) = summarise([replace(first, kl=None, n_kept=None), *others]).types
    assert part.cells[0].kl is None
    assert part.cells[0].n_kept is None
    assert part.cells[0].same_top is not None
    assert part.cells[1].kl is not None


def test_tasks_that_the_full_cache_cannot_solve_are_left_out() -> None:
    undone = answers_of([0.0, 1.0, 1.0, 1.0, 1.0], "c", 0) + answers_of([0.1, 1.0, 1.0, 1.0, 1.0], "c", 1)
    summary = summarise(flat(SMALL) + undone)
    assert summary.not_done == (("c", 0.05),)
    assert summary.types == summarise(flat(SMALL)).types
    assert summarise(flat(SMALL) + undone, min_full=0.05).types[0].tasks == ("a", "b", "c")
    assert "Left out of the means, because the full cache scores below 10: c (5.0)." in markdown(summary, CONFIG, [])


def test_a_task_counts_for_every_type_of_cache_if_it_does_for_one() -> None:
    weak = [replace(one, type_kv="q4_0", score=0.0) for one in flat(SMALL)]
    summary = summarise(flat(SMALL) + weak)
    assert summary.not_done == ()
    assert [(part.type_kv, part.tasks) for part in summary.types] == [("f16", ("a", "b")), ("q4_0", ("a", "b"))]
    assert summary.types[0] == summarise(flat(SMALL)).types[0]
    assert math.isnan(summary.types[1].curves[0].within_10)
    assert summary.to_json()["types"][1]["curves"][0]["within_10"] is None


def test_needles_have_a_grid_and_are_no_part_of_the_means() -> None:
    (part,) = summarise(flat(SMALL) + needles()).types
    assert replace(part, passkey=()) == summarise(flat(SMALL)).types[0]
    grid = {(found.method, found.ratio): (found.score.value, found.depths, found.scores) for found in part.passkey}
    assert grid == {
        ("full", 0.0): (1, (0.0, 0.5), (1, 1)),
        ("KVCompose", 0.5): (0.75, (0.0, 0.5), (0.5, 1)),
        ("KVCompose", 0.75): (0.25, (0.0, 0.5), (0, 0.5)),
        ("SnapKV", 0.5): (0.25, (0.0, 0.5), (0, 0.5)),
        ("SnapKV", 0.75): (0, (0.0, 0.5), (0, 0)),
    }


def test_needles_may_have_fewer_methods_than_tasks() -> None:
    (part,) = summarise(flat(SMALL) + [one for one in needles() if one.method != "SnapKV"]).types
    assert (part.n_samples, part.n_incomplete) == (3, 0)
    assert {found.method for found in part.passkey} == {"full", "KVCompose"}


def test_the_largest_area_comes_first_whatever_was_run_first() -> None:
    swapped = [[one for one in sample if one.method != "KVCompose"] + sample[1:3] for sample in SMALL]
    (part,) = summarise(flat(swapped)).types
    assert [cell.method for cell in part.cells] == ["full", "SnapKV", "SnapKV", "KVCompose", "KVCompose"]
    assert [curve.method for curve in part.curves] == ["KVCompose", "SnapKV"]
    assert [cell.method for cell in part.at(0.75)] == ["full", "KVCompose", "SnapKV"]
    assert part.ratios == [0.5, 0.75]


def test_areas_over_other_ratios_are_not_compared() -> None:
    (part,) = summarise([one for one in flat(SMALL) if (one.method, one.ratio) != ("KVCompose", 0.75)]).types
    assert [curve.difference for curve in part.curves] == [None, None]
    differences = {(cell.method, cell.ratio): cell.difference is None for cell in part.cells if cell.method == "SnapKV"}
    assert differences == {("SnapKV", 0.5): False, ("SnapKV", 0.75): True}


def test_a_type_without_the_full_cache_and_an_unknown_reference_are_refused() -> None:
    with pytest.raises(ConfigError, match="type_kv='f16' has no answers of the full cache"):
        summarise(SMALL[0][1:])
    with pytest.raises(ConfigError, match="reference='TOVA' is not one of KVCompose, SnapKV"):
        summarise(flat(SMALL), reference="TOVA")


def test_a_summary_is_plain_json_and_the_same_every_time() -> None:
    answers = random_answers({"a": 3, "b": 2}) + needles()
    document = summarise(answers).to_json()
    text = json.dumps(document, allow_nan=False)
    assert json.loads(text) == document
    assert text == json.dumps(summarise(answers).to_json())
    assert document["types"][0]["cells"][1]["method"] == "KVCompose"
    assert document["types"][0]["passkey"][0]["depths"] == [0.0, 0.5]
