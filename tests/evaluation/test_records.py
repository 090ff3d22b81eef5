"""Records of an evaluation in their folder (evaluation/records.py)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.answers import ENVIRONMENT, SETTINGS, SMALL, answer, answers_of, cost_of, flat

from kvcompose_gguf.errors import ConfigError
from kvcompose_gguf.evaluation.records import RunFolder
from kvcompose_gguf.evaluation.report import markdown
from kvcompose_gguf.evaluation.results import summarise


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
    with pytest.raises(
        ConfigError, match=r"other settings: seed=0 in the run, 1 now; n_tokens=None in the run, 64 now$"
    ):
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
