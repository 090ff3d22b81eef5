"""Reports of an evaluation (evaluation/report.py, support/plots.py)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.answers import (
    CONFIG,
    ENVIRONMENT,
    SETTINGS,
    SMALL,
    answer,
    answers_of,
    cost_of,
    flat,
    needles,
    random_answers,
)

from kvcompose_gguf.evaluation.records import Answer, RunFolder
from kvcompose_gguf.evaluation.report import markdown, write_report
from kvcompose_gguf.evaluation.results import Mean, Summary, summarise


def table(text: str, heading: str) -> dict[str, list[str]]:
    """Returns the cells of the table below a heading, by the first cell of each row."""
    lines = text[text.index(f"## {heading}\n") :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert len({len(row) for row in rows}) == 1
    assert len({len(line) for line in lines[start : start + len(rows)]}) == 1
    return {row[0]: row[1:] for row in rows}


def report_of(samples: Sequence[Sequence[Answer]], summary: Summary | None = None) -> str:
    costs = [cost_of(sample, seconds) for sample, seconds in zip(samples, (2.0, 4.0, 9.0), strict=False)]
    return markdown(summary or summarise(flat(samples)), CONFIG, costs, ["curves.svg"])


def test_the_report_has_the_numbers() -> None:
    text = report_of(
        [
            [replace(one, exact=one.score, alike=1 - one.score, kl=0.125, same_top=0.5) for one in sample]
            for sample in SMALL
        ]
    )
    assert text.startswith("# Answers from a compressed cache: tiny.gguf, 2026-01-01\n")
    scores = table(text, "Score x 100")
    assert scores["method"] == [
        "full cache", "50 % removed", "75 % removed", "AUC", "largest ratio, loss ≤ 10 %", "loss ≤ 20 %",
    ]  # fmt: skip
    assert [cell.split(" ")[0] for cell in scores["KVCompose"]] == ["75.0", "62.5", "25.0", "60.4", "30.0", "51.7"]
    # half the difference that a's two samples can make in a draw, halved again because b's mean is fixed: 1/2, 1/4, 1/2
    assert scores["KVCompose"][:3] == ["75.0 ± 0.0", "62.5 ± 12.5", "25.0 ± 12.5"]
    assert [cell.split(" ")[0] for cell in scores["SnapKV"]] == ["75.0", "25.0", "0.0", "37.5", "7.5", "15.0"]
    assert list(scores)[2:] == ["KVCompose", "SnapKV"]
    assert table(text, "Exact match x 100")["KVCompose"] == scores["KVCompose"][:3]
    assert [cell[:4] for cell in table(text, "Looks right and is wrong x 100")["KVCompose"]] == ["25.0", "37.5", "75.0"]
    assert table(text, "KL divergence from the uncompressed run, nats")["SnapKV"] == ["0.125 ± 0.000"] * 3
    assert table(text, "Same most probable token x 100")["SnapKV"] == ["50.0 ± 0.0"] * 3
    by_task = table(text, "Score x 100 by task, 75 % removed")
    assert list(by_task)[2:] == ["full cache", "KVCompose", "SnapKV"]
    assert by_task["method"] == ["a", "b"]
    assert by_task["KVCompose"] == ["25.0 ± 25.0", "25.0 ± 0.0"]
    differences = table(text, "Score x 100, difference from KVCompose")
    assert differences["SnapKV"][1] == "-37.5 [-50.0, -25.0]"
    assert differences["KVCompose"] == ["–"] * 4
    assert "3 samples of 100 tokens, means over the tasks (samples): a (2), b (1)." in text
    assert "![curves](curves.svg)" in text
    assert 'tasks: ["a", "b"]' in text
    assert "cpu: a CPU" in text


def test_a_run_without_look_alikes_has_no_table_of_them() -> None:
    assert SMALL[0][0].alike is None
    assert "Looks right" not in report_of(SMALL)


def test_the_report_says_what_a_sample_costs() -> None:
    seconds = {"full": 0.4, "KVCompose": 0.75, "SnapKV": 0.25}
    text = report_of([[replace(one, seconds=seconds[one.method]) for one in sample] for sample in SMALL])
    costs = table(text, "What a sample costs")
    assert costs["cache"][2:] == ["prefill", "scoring: repeat", "scoring: window", "rest per answer", "whole sample"]
    assert costs["f16"] == [
        "3",
        "100",
        "4.00",
        "3.00",
        "0.25",
        "0.50",
        "9.00",
    ]  # the full cache's answers do not compare
    assert "restore, compose and answer, checked against the full cache's answer" in text
    assert "whole prefill" not in text


def test_the_report_says_which_scoring_contains_a_prefill() -> None:
    costs = [replace(cost_of(SMALL[0]), scoring_seconds={"prefill() mean": 5.0, "window(size=8) max": 1.0})]
    text = markdown(summarise(flat(SMALL)), CONFIG, costs)
    assert "Scoring: prefill() mean contains a whole prefill." in text
    assert "window(size=8) max contains" not in text


def test_the_report_says_which_layers_keep_least_and_most() -> None:
    kept = {"full": None, "KVCompose": (1200, 30, 60), "SnapKV": (40, 40, 40)}
    text = report_of([[replace(one, n_kept=kept[one.method]) for one in sample] for sample in SMALL])
    layers = table(text, "Tokens kept, in the layers with the fewest and the most")
    assert layers["KVCompose"] == ["–", *["30 (layer 1) to 1,200 (0)"] * 2]
    assert layers["SnapKV"] == ["–", *["all 40"] * 2]


def test_a_loss_that_is_not_reached_is_marked() -> None:
    text = report_of([answers_of([1.0, 1.0, 0.85, 0.5, 0.5])])
    assert table(text, "Score x 100")["KVCompose"][-2:] == ["66.7 %", "≥ 75.0 %"]


def test_the_report_has_means_over_depths_and_the_worst_depth() -> None:
    text = markdown(summarise(needles()), CONFIG, [])
    found = table(text, "Passkey x 100: mean over depths, and the worst depth")
    assert found["KVCompose"] == ["100.0 ± 0.0 (100 at 0)", "75.0 ± 25.0 (50 at 0)", "25.0 ± 25.0 (0 at 0)"]
    assert "### Score" not in text


def test_a_bar_in_a_name_is_no_end_of_a_cell() -> None:
    bars = [replace(one, method="a|b" if one.method == "SnapKV" else one.method) for one in flat(SMALL)]
    assert r"| a\|b " in markdown(summarise(bars), CONFIG, [])


def test_the_report_counts_the_samples_left_out() -> None:
    answers = flat(SMALL) + answers_of([1, 1, 1, 1, 1], "a", 2)[:-1]
    assert "Left out: 1 samples without" in markdown(summarise(answers), CONFIG, [])


def test_a_run_of_the_full_cache_alone_has_a_report() -> None:
    text = report_of([sample[:1] for sample in SMALL])
    assert table(text, "Score x 100")["full cache"][0] == "75.0 ± 0.0"
    assert table(text, "Score x 100 by task, 0 % removed")["full cache"] == ["100.0 ± 0.0", "50.0 ± 0.0"]
    assert "difference from" not in text


def test_an_empty_run_has_a_report(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path, {}, {})
    write_report(run)
    assert "unknown model, undated" in (tmp_path / "report.md").read_text("utf-8")


def test_pictures_are_drawn_and_named_in_the_report(folder: RunFolder) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra `plot`")
    for sample in (needles()[i : i + 5] for i in range(0, 20, 5)):
        kept = [replace(one, n_kept=(20, 40), type_kv="q8_0") for one in sample]
        folder.add(cost_of(kept), kept)
    for sample in SMALL:
        kept = [
            replace(one, n_kept=(20, 40) if one.method == "KVCompose" else (30, 30), type_kv="q8_0") for one in sample
        ]
        folder.add(cost_of(kept), kept)
    write_report(folder)
    text = (folder.path / "report.md").read_text("utf-8")
    for name in ("curves", "bytes", "budgets", "passkey"):
        assert f"![{name}]({name}.svg)" in text
        picture = (folder.path / f"{name}.svg").read_text("utf-8")
        assert "KVCompose" in picture
    assert json.loads((folder.path / "summary.json").read_text("utf-8")) == summarise(folder.answers()).to_json()
    assert "No pictures" not in text


def test_only_what_has_numbers_is_drawn(folder: RunFolder) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra `plot`")
    write_report(folder)
    assert sorted((file.name for file in folder.path.glob("*.svg")), reverse=True) == ["curves.svg", "bytes.svg"]


def test_more_methods_than_colours_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra `plot`")
    run = RunFolder.open(tmp_path / "run", SETTINGS, ENVIRONMENT)
    for task, depth in (("a", None), ("passkey", 0.5)):
        methods = [answer(task, 0, f"method {i}", 0.5, i / 20, depth=depth, n_kept=(i, 9)) for i in range(16)]
        sample = [answer(task, 0, "full", 0.0, 1.0, depth=depth), *methods]
        run.add(cost_of(sample), sample)
    write_report(run)
    assert len(list(run.path.glob("*.svg"))) == 4
    assert "method 15" in (run.path / "curves.svg").read_text("utf-8")


def test_without_matplotlib_the_report_says_so(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(folder)
    text = (folder.path / "report.md").read_text("utf-8")
    assert "No pictures: " in text
    assert "pip install 'kvcompose-gguf[plot]'" in text
    assert "![" not in text


def test_a_mean_has_its_interval_around_it() -> None:
    (part,) = summarise(random_answers({"a": 6, "b": 6})).types
    means: list[Mean | None] = [
        mean for cell in part.cells for mean in (cell.score, cell.kl, cell.difference, *cell.tasks)
    ]
    assert all(mean.low <= mean.value <= mean.high for mean in means if mean is not None)
