"""Records of an evaluation, their summary and its report (evaluation/records.py, results.py, report.py, plots.py).

Numbers are worked out by hand or by plain loops over the records.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvcompose_gguf.errors import ConfigError
from kvcompose_gguf.evaluation.metrics import bootstrap_interval
from kvcompose_gguf.evaluation.records import Answer, RunFolder, SampleCost
from kvcompose_gguf.evaluation.report import markdown, write_report
from kvcompose_gguf.evaluation.results import Mean, Summary, summarise

SETTINGS = {"tasks": ["a", "b"], "ratios": [0.5, 0.75], "seed": 0}
ENVIRONMENT = {"model": "tiny.gguf", "date": "2026-01-01", "cpu": "a CPU"}


def answer(task: str, index: int, method: str, ratio: float, score: float, **others: object) -> Answer:
    values: dict[str, object] = {
        "type_kv": "f16", "exact": 0.0, "kl": None, "same_top": None, "depth": None, "n_tokens": 100,
        "n_kept": None, "kv_bytes": 1000, "seconds": 1.0, "answer": "12\u2028\n",
    }  # fmt: skip
    return Answer(task=task, index=index, method=method, ratio=ratio, score=score, **(values | others))  # type: ignore[arg-type]


def answers_of(scores: Sequence[float], task: str = "a", index: int = 0, **others: object) -> list[Answer]:
    """Returns answers to one sample: the full cache, then KVCompose and SnapKV at 0.5 and 0.75."""
    columns = [("full", 0.0), ("KVCompose", 0.5), ("KVCompose", 0.75), ("SnapKV", 0.5), ("SnapKV", 0.75)]
    return [answer(task, index, *column, score, **others) for column, score in zip(columns, scores, strict=True)]


def cost_of(sample: Iterable[Answer], seconds: float = 2.0) -> SampleCost:
    first = next(iter(sample))
    return SampleCost(first.task, first.index, first.type_kv, 100, seconds, {"repeat": 3.0, "window": 0.25}, 9.0)


#: two samples of a and one of b, so that the mean over samples differs from the mean over tasks
SMALL = [
    answers_of([1.0, 1.0, 0.0, 0.5, 0.0], "a", 0),
    answers_of([1.0, 0.5, 0.5, 0.5, 0.0], "a", 1),
    answers_of([0.5, 0.5, 0.25, 0.0, 0.0], "b", 0),
]


def flat(samples: Iterable[Iterable[Answer]]) -> list[Answer]:
    return [one for sample in samples for one in sample]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder.open(tmp_path / "run", SETTINGS, ENVIRONMENT)
    for sample in SMALL:
        run.add(cost_of(sample), sample)
    return run


#
# the folder
#


def test_settings_and_environment_are_written_before_anything_else(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "new" / "run", SETTINGS, ENVIRONMENT)
    assert [file.name for file in run.path.iterdir()] == ["config.json"]
    assert json.loads((run.path / "config.json").read_text("utf-8")) == run.config
    assert run.config == {"settings": SETTINGS, "environment": ENVIRONMENT, "resumed": []}
    assert (run.done(), run.answers(), run.costs()) == (set(), [], [])


def test_records_that_were_added_are_read_back(folder: RunFolder) -> None:
    sample = [answer("c", 7, "full", 0.0, 1.0, type_kv="q8_0", kl=0.25, same_top=1.0, depth=0.5, n_kept=(3, 4))]
    folder.add(cost_of(sample), sample)
    again = RunFolder(folder.path)
    assert again.answers() == [*flat(SMALL), *sample]
    assert again.costs() == [*map(cost_of, SMALL), cost_of(sample)]
    assert again.done() == {("a", 0, "f16"), ("a", 1, "f16"), ("b", 0, "f16"), ("c", 7, "q8_0")}


def test_a_sample_with_a_truncated_cost_is_unfinished_and_dropped_on_resume(folder: RunFolder) -> None:
    for name in ("answers.jsonl", "samples.jsonl"):
        assert (folder.path / name).read_bytes().endswith(b"\n")
    samples = folder.path / "samples.jsonl"
    samples.write_bytes(samples.read_bytes()[:-10])
    assert RunFolder(folder.path).done() == {("a", 0, "f16"), ("a", 1, "f16")}
    assert RunFolder(folder.path).answers() == flat(SMALL[:2])
    resumed = RunFolder.open(folder.path, SETTINGS, ENVIRONMENT)
    assert len((folder.path / "answers.jsonl").read_text("utf-8").splitlines()) == 10
    assert len(samples.read_text("utf-8").splitlines()) == 2
    resumed.add(cost_of(SMALL[2]), SMALL[2])
    assert resumed.answers() == flat(SMALL)
    assert sorted(file.name for file in folder.path.iterdir()) == ["answers.jsonl", "config.json", "samples.jsonl"]


def test_answers_are_on_the_disk_before_their_cost_is_written(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, int]] = []  # lines in both files

    def fsync(descriptor: int) -> None:
        synced.append((len(folder.path.joinpath("answers.jsonl").read_bytes().splitlines()), len(folder.costs())))

    monkeypatch.setattr("os.fsync", fsync)
    sample = answers_of([1, 1, 1, 1, 1], "b", 1)
    folder.add(cost_of(sample), sample)
    assert synced == [(20, 3), (20, 4)]


@pytest.mark.parametrize("n_bytes", [1, 30, 400])
def test_answers_truncated_by_a_crash_are_dropped_on_resume(folder: RunFolder, n_bytes: int) -> None:
    sample = answers_of([1, 1, 1, 1, 1], "b", 1)
    before = (folder.path / "answers.jsonl").read_bytes()
    folder.add(cost_of(sample), sample)
    written = (folder.path / "answers.jsonl").read_bytes()
    (folder.path / "answers.jsonl").write_bytes(written[: len(before) + n_bytes])
    lines = (folder.path / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (folder.path / "samples.jsonl").write_bytes(b"".join(lines[:-1]))
    assert RunFolder(folder.path).answers() == flat(SMALL)
    RunFolder.open(folder.path, SETTINGS, ENVIRONMENT)
    assert (folder.path / "answers.jsonl").read_bytes() == before


def test_a_whole_run_is_not_written_anew_on_resume(folder: RunFolder) -> None:
    files = sorted(folder.path.iterdir())
    before = [(file.read_bytes(), file.stat().st_ino) for file in files]
    RunFolder.open(folder.path, SETTINGS | {"tasks": ("a", "b")}, ENVIRONMENT)  # JSON has no tuples
    assert [(file.read_bytes(), file.stat().st_ino) for file in files] == before


def test_other_settings_are_refused_and_named(folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match=r"other settings: seed=0 in the run, 1 now; n_tokens=None in the run, 64 now$"):
        RunFolder.open(folder.path, SETTINGS | {"seed": 1, "n_tokens": 64}, ENVIRONMENT)
    with pytest.raises(ConfigError, match=r"settings: tasks=\['a', 'b'\] in the run, None now$"):
        RunFolder.open(folder.path, {name: SETTINGS[name] for name in ("ratios", "seed")}, ENVIRONMENT)
    assert RunFolder(folder.path).answers() == flat(SMALL)


def test_another_environment_is_noted_when_a_run_goes_on(folder: RunFolder) -> None:
    RunFolder.open(folder.path, SETTINGS, ENVIRONMENT | {"cpu": "another"})
    RunFolder.open(folder.path, SETTINGS, ENVIRONMENT | {"date": "2026-01-02", "os": "Linux"})
    config = RunFolder(folder.path).config
    assert config["environment"] == ENVIRONMENT
    assert config["resumed"] == [{"cpu": "another"}, {"date": "2026-01-02", "os": "Linux"}]
    assert "# changed when the run went on, 1\ncpu: another\n" in markdown(summarise([]), config, [])


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not contain a run"):
        RunFolder(tmp_path)
    (tmp_path / "answers.jsonl").touch()
    with pytest.raises(ConfigError, match=r"has answers\.jsonl, but no config\.json"):
        RunFolder.open(tmp_path, SETTINGS, ENVIRONMENT)
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFolder.open(tmp_path / "answers.jsonl" / "run", SETTINGS, ENVIRONMENT)
    (tmp_path / "config.json").write_text("{", "utf-8")
    with pytest.raises(ConfigError, match="does not contain a run"):
        RunFolder.open(tmp_path, SETTINGS, ENVIRONMENT)


def test_a_line_that_is_not_a_record_is_named(folder: RunFolder) -> None:
    file = folder.path / "answers.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for wrong in (b"{\n", b"[]\n", b'{"task": "a"}\n', lines[1].replace(b'"score": 1.0', b'"score": 1.5')):
        file.write_bytes(lines[0] + wrong + lines[2])
        with pytest.raises(ConfigError, match=r"answers\.jsonl', line 2, is not a record of a run"):
            folder.answers()


def test_invalid_samples_are_refused_before_anything_is_written(folder: RunFolder) -> None:
    sample = answers_of([1, 1, 1, 1, 1], "b", 1)
    before = [file.read_bytes() for file in sorted(folder.path.iterdir())]
    with pytest.raises(ConfigError, match=r"sample=\('a', 0, 'f16'\) is already in the run"):
        folder.add(cost_of(SMALL[0]), SMALL[0])
    for wrong in ([], [*sample, SMALL[0][0]]):
        with pytest.raises(ConfigError, match="no answers, or answers of another sample"):
            folder.add(cost_of(sample), wrong)
    with pytest.raises(ConfigError, match="two answers with the same method and ratio"):
        folder.add(cost_of(sample), [*sample, sample[0]])
    with pytest.raises(TypeError):
        folder.add(replace(cost_of(sample), prefill_seconds=np.float32(1)), sample)  # type: ignore[arg-type]
    assert [file.read_bytes() for file in sorted(folder.path.iterdir())] == before


@pytest.mark.parametrize(("method", "ratio"), [("full", 0.5), ("KVCompose", 0.0), ("KVCompose", 1.0), ("SnapKV", -0.5)])
def test_ratio_zero_is_the_full_cache_and_nothing_else(method: str, ratio: float) -> None:
    with pytest.raises(ConfigError, match="ratio="):
        answer("a", 0, method, ratio, 1.0)


@pytest.mark.parametrize("wrong", [{"score": 1.5}, {"exact": -1.0}, {"score": float("nan")}])
def test_scores_are_shares(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="; allowed: 0 to 1"):
        replace(SMALL[0][0], **wrong)  # type: ignore[arg-type]


#
# the summary
#


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


def random_answers(n_of_task: dict[str, int], seed: int = 0) -> list[Answer]:
    rng = np.random.default_rng(seed)
    return [
        replace(one, score=float(rng.random()), exact=float(rng.integers(2)), kl=float(rng.random()),
                same_top=float(rng.random()), seconds=float(rng.random()), n_kept=tuple(rng.integers(0, 100, 2).tolist()))
        for task, n in n_of_task.items() for i in range(n) for one in answers_of([0] * 5, task, i)
    ]  # fmt: skip


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


def needles() -> list[Answer]:
    """Two depths with two samples each; only the full cache finds all needles."""
    return [
        replace(one, depth=depth)
        for index, (depth, scores) in enumerate(
            [(0.0, [1, 1, 0, 0, 0]), (0.0, [1, 0, 0, 0, 0]), (0.5, [1, 1, 1, 0, 0]), (0.5, [1, 1, 0, 1, 0])]
        )
        for one in answers_of(scores, "passkey", index)
    ]


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


#
# the report
#

CONFIG = {"settings": SETTINGS, "environment": ENVIRONMENT, "resumed": []}


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
    text = report_of([[replace(one, exact=one.score, kl=0.125, same_top=0.5) for one in sample] for sample in SMALL])
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


def test_the_report_says_what_a_sample_costs() -> None:
    seconds = {"full": 0.4, "KVCompose": 0.75, "SnapKV": 0.25}
    text = report_of([[replace(one, seconds=seconds[one.method]) for one in sample] for sample in SMALL])
    costs = table(text, "What a sample costs")
    assert costs["cache"][2:] == ["prefill", "scoring: repeat", "scoring: window", "rest per answer", "whole sample"]
    assert costs["f16"] == ["3", "100", "4.00", "3.00", "0.25", "0.50", "9.00"]  # the full cache's answers do not compare
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
    for name in ("curves", "budgets", "passkey"):
        assert f"![{name}]({name}.svg)" in text
        picture = (folder.path / f"{name}.svg").read_text("utf-8")
        assert "KVCompose" in picture
    assert json.loads((folder.path / "summary.json").read_text("utf-8")) == summarise(folder.answers()).to_json()
    assert "No pictures" not in text


def test_only_what_has_numbers_is_drawn(folder: RunFolder) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra `plot`")
    write_report(folder)
    assert [file.name for file in folder.path.glob("*.svg")] == ["curves.svg"]


def test_more_methods_than_colours_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra `plot`")
    run = RunFolder.open(tmp_path / "run", SETTINGS, ENVIRONMENT)
    for task, depth in (("a", None), ("passkey", 0.5)):
        methods = [answer(task, 0, f"method {i}", 0.5, i / 20, depth=depth, n_kept=(i, 9)) for i in range(16)]
        sample = [answer(task, 0, "full", 0.0, 1.0, depth=depth), *methods]
        run.add(cost_of(sample), sample)
    write_report(run)
    assert len(list(run.path.glob("*.svg"))) == 3
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
