"""Runs ``kvcompose eval`` as a command on a tiny model, which gives nonsense answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.commands import failure, loaded_by_help
from typer.testing import CliRunner

from kvcompose_gguf import ConfigError
from kvcompose_gguf.cli.app import app
from kvcompose_gguf.evaluation import command
from kvcompose_gguf.evaluation.options import EvalOptions
from kvcompose_gguf.evaluation.records import FULL, RunFolder
from kvcompose_gguf.evaluation.suites import SUITES
from kvcompose_gguf.evaluation.worker import SampleJob, SampleWorker
from kvcompose_gguf.models import known

METHODS = ("kvcompose,n_sink=2", "streaming-llm", "unstructured", "variant,fold=1.0,correct=0.5")
COLUMNS = {(FULL, 0.0), *((method, ratio) for method in METHODS for ratio in (0.5, 0.9))}
JOBS = [("passkey", 0, "f16"), ("niah_single_1", 0, "f16")]
OPTIONS = {
    "--tasks": "passkey,niah_single_1", "--n-tokens": "760", "--samples": "1", "--compression-ratio": "0.5,0.9",
    "--texts": "generated", "--jobs": "1",
}  # fmt: skip


def arguments(model: Path | str, out: Path, methods: Sequence[str] = METHODS, **changes: str) -> list[str]:
    options = OPTIONS | {"--" + name.replace("_", "-"): value for name, value in changes.items()}
    pairs = [*options.items(), *(("--method", method) for method in methods), ("--out", str(out))]
    return ["eval", str(model), *(text for pair in pairs for text in pair)]


def invoke(*args: str) -> Any:
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def finished(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Returns the folder of a run, and the command's output."""
    out = tmp_path_factory.mktemp("eval") / "new" / "run"
    return out, invoke(*arguments(model_path, out)).output


@pytest.fixture
def folder(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """Returns a copy of the finished run."""
    return Path(shutil.copytree(finished[0], tmp_path / "copy"))


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, str]]:
    """Records the samples that are run from now on."""
    jobs: list[tuple[str, int, str]] = []
    do = SampleWorker.do

    def recorded(self: SampleWorker, job: SampleJob) -> Any:
        jobs.append((job.task, job.index, job.type_kv))
        return do(self, job)

    monkeypatch.setattr(SampleWorker, "do", recorded)
    return jobs


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[tuple[Any, ...]]:
    """Records what the command passes to a fake runner: model, options, folder, jobs and threads."""
    calls: list[tuple[Any, ...]] = []

    def run(model: str, options: EvalOptions, out: Path, *, jobs: Any, threads: int, console: Any) -> RunFolder:
        calls.append((model, options, out, jobs, threads))
        return RunFolder(folder)

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(command, "write_report", lambda run: (run.path / "report.md").write_text("# nothing"))
    return calls


#
# a run
#


def test_a_run_leaves_answers_of_every_method_and_ratio(finished: tuple[Path, str]) -> None:
    folder = RunFolder(finished[0])
    assert folder.done() == set(JOBS)
    for job in JOBS:
        mine = [a for a in folder.answers() if (a.task, a.index, a.type_kv) == job]
        assert {(a.method, a.ratio) for a in mine} == COLUMNS
        assert len(mine) == len(COLUMNS)
    settings = folder.config["settings"]
    assert settings["methods"] == list(METHODS)
    assert (settings["n_tokens"], settings["texts"]) == (760, "generated")
    assert folder.config["environment"]["jobs"] == 1


def test_report_and_summary_have_every_method(finished: tuple[Path, str]) -> None:
    out, printed = finished
    report = (out / "report.md").read_text("utf-8")
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert summary["reference"] == METHODS[0]
    [part] = summary["types"]
    assert {(cell["method"], cell["ratio"]) for cell in part["passkey"]} == COLUMNS
    for method in METHODS:
        assert f"| {method} " in report
    assert "50 % removed" in report
    assert "90 % removed" in report
    assert "report.md" in printed.replace("\n", "")
    assert "streaming-llm" in printed


def test_edited_caches_answer_differently_in_as_many_bytes(finished: tuple[Path, str]) -> None:
    answers = {(a.task, a.method, a.ratio): a for a in RunFolder(finished[0]).answers()}
    for task in ("passkey", "niah_single_1"):
        plain, edited = (answers[task, method, 0.9] for method in (METHODS[0], METHODS[3]))
        assert sum(edited.n_kept or ()) == sum(plain.n_kept or ())
        assert edited.kv_bytes == plain.kv_bytes
        assert edited.kl != plain.kl
        assert answers[task, METHODS[2], 0.9].kl != plain.kl


def test_the_same_command_again_repeats_no_sample(model_path: Path, folder: Path, done: list[Any]) -> None:
    before = {file: (folder / file).read_bytes() for file in ("answers.jsonl", "samples.jsonl", "summary.json")}
    (folder / "summary.json").unlink()
    (folder / "report.md").unlink()
    invoke(*arguments(model_path, folder))
    assert done == []
    assert {file: (folder / file).read_bytes() for file in before} == before
    assert (folder / "report.md").exists()


def test_only_unfinished_samples_are_run(model_path: Path, folder: Path, done: list[Any]) -> None:
    samples = folder / "samples.jsonl"
    first = samples.read_text("utf-8").splitlines(keepends=True)[0]
    samples.write_text(first, "utf-8")  # the second sample was cut off
    kept = RunFolder(folder).answers()
    invoke(*arguments(model_path, folder))
    assert done == JOBS[1:]
    assert RunFolder(folder).answers()[: len(kept)] == kept
    assert RunFolder(folder).done() == set(JOBS)


def test_more_samples_go_on_with_the_same_run(model_path: Path, folder: Path, done: list[Any]) -> None:
    invoke(*arguments(model_path, folder, samples="2"))
    assert done == [("passkey", 1, "f16"), ("niah_single_1", 1, "f16")]
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert {cell["score"]["n"] for cell in summary["types"][0]["passkey"]} == {2}


def test_report_only_reports_the_finished_samples_without_a_model(folder: Path, done: list[Any]) -> None:
    summary = (folder / "summary.json").read_bytes()
    for file in ("summary.json", "report.md"):
        (folder / file).unlink()
    printed = invoke("eval", "no such model", "--out", str(folder), "--report-only").output
    assert done == []
    assert (folder / "summary.json").read_bytes() == summary
    assert all(method in (folder / "report.md").read_text("utf-8") for method in METHODS)
    assert "Answers from a compressed cache" in printed


#
# options
#


def test_every_option_reaches_the_runner(asked: list[Any], folder: Path) -> None:
    invoke(
        "eval", "a model", "--out", str(folder), "--tasks", "passkey,vt", "--n-tokens", "999", "--samples", "7",
        "--method", "snapkv,window=8", "--method", "@variants", "--compression-ratio", "0.25,0.5", "--kv-types", "f16,bf16",
        "--question-seen", "--no-chat", "--texts", "generated", "--seed", "5", "--jobs", "3", "--threads", "2",
    )  # fmt: skip
    options = EvalOptions(
        tasks=("passkey", "vt"), n_tokens=999, n_samples=7, methods=("snapkv,window=8", *SUITES["variants"]),
        ratios=(0.25, 0.5), types_kv=("f16", "bf16"), question_seen=True, chat=False, texts="generated", seed=5,
    )  # fmt: skip
    assert asked == [("a model", options, folder, 3, 2)]


def test_without_options_it_is_rulers_tasks_and_the_baselines(asked: list[Any], folder: Path) -> None:
    invoke("eval", "--out", str(folder))
    assert asked == [("smollm2", EvalOptions(), folder, None, 1)]


def test_quick_is_a_few_samples_of_small_tasks_and_leaves_the_rest_as_asked_for(asked: list[Any], folder: Path) -> None:
    invoke(*arguments("a model", folder, kv_types="f32", seed="3", jobs="2"), "--quick", "--question-seen")
    [(_, options, _, jobs, _)] = asked
    assert options == EvalOptions(
        tasks=("niah_single_1", "niah_single_2", "passkey"), n_tokens=1024, n_samples=2, methods=SUITES["quick"],
        ratios=(0.5, 0.75), types_kv=("f32",), seed=3, texts="generated", question_seen=True,
    )  # fmt: skip
    assert jobs == 2


def test_help_lists_the_options_without_loading_library_or_kernels() -> None:
    text, loaded = loaded_by_help(["eval"], ["llama_cpp", "numba", "psutil"])
    assert loaded == []
    names = ["--method", "--out", "--kv-types", "--question-seen", "--chat", "--no-chat", "--seed", "--threads"]
    for name in (*OPTIONS, *names, "--quick", "--report-only"):
        assert name in text, f"{name} is not in the help"


#
# errors
#


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "passkey,niah"}, "tasks=passkey,niah; allowed: niah_single_1, "),
        ({"tasks": ""}, "tasks="),
        ({"compression_ratio": "0.5,1"}, "compression_ratio=[1.0]: give one or more in (0, 1)"),
        ({"compression_ratio": "0"}, "compression_ratio=[0.0]: give one or more in (0, 1)"),
        ({"compression_ratio": "nan"}, "compression_ratio=[nan]: give one or more in (0, 1)"),
        ({"compression_ratio": "half"}, "compression_ratio='half' is not a comma-separated list of numbers"),
        ({"kv_types": "f17"}, "types_kv='f17' is not a ggml type"),
        ({"kv_types": "f16/f17"}, "types_kv='f16/f17' is not a ggml type"),
        ({"methods": ("kvcompos",)}, "method='kvcompos' is none of kvcompose, "),
        ({"methods": ("@best",)}, "method='@best' is not a suite: @none, "),
        ({"methods": ("snapkv,windw=3",)}, "method='snapkv,windw=3'"),
        ({"methods": ("kvcompose,window",)}, "'window' is not option=value"),
        ({"methods": ("variant,own=True,scoring=window",)}, "own=True needs scoring='repeat'"),
        ({"methods": ("variant,pool=2",)}, "pool=2 is not odd"),
        ({"methods": ("random,compression_ratio=0.5",)}, "compression_ratio is given twice"),
        ({"texts": "novels"}, "'novels'; allowed: auto, package, generated"),
    ],
    ids=str,
)
def test_a_wrong_option_is_one_line_before_a_model_is_loaded_or_a_folder_made(
    monkeypatch: pytest.MonkeyPatch, model_path: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(SampleWorker, "__init__", lambda *args: pytest.fail("a model would be loaded"))
    assert message in failure(arguments(model_path, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_an_error_is_red(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, arguments("no.gguf", tmp_path, tasks="niah"), color=True)
    assert result.stderr.startswith("\x1b[31merror: ")


@pytest.mark.parametrize("option", ["n_tokens", "samples", "jobs", "threads"])
def test_counts_below_one_are_refused_by_the_parser(model_path: Path, tmp_path: Path, option: str) -> None:
    result = CliRunner().invoke(app, arguments(model_path, tmp_path / "run", **{option: "0"}))
    assert result.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_a_missing_model_is_refused_before_a_folder_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(known, "fetch", lambda name: pytest.fail("downloaded"))
    assert "neither a file nor one of" in failure(arguments(tmp_path / "no.gguf", tmp_path / "run"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing else")
    assert "broken.gguf cannot be used" in failure(arguments(tmp_path / "broken.gguf", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "1"}, "seed=0 in the run, 1 now"),
        ({"compression_ratio": "0.5"}, "ratios=[0.5, 0.9] in the run, [0.5] now"),
        ({"methods": METHODS[:1]}, "methods=["),
        ({"n_tokens": "780"}, "n_tokens=760 in the run, 780 now"),
    ],
    ids=str,
)
def test_a_folder_with_other_settings_is_not_changed(
    model_path: Path, folder: Path, done: list[Any], changes: dict[str, Any], message: str
) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    line = failure(arguments(model_path, folder, **changes))
    assert "contains a run with other settings" in line
    assert message in line
    assert done == []
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_another_model_is_another_run(tiny_model: Any, folder: Path, done: list[Any]) -> None:
    assert "model_sha256" in failure(arguments(tiny_model(tiny.MHA), folder))
    assert done == []


def test_a_report_of_no_run_is_one_line(model_path: Path, tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "nothing"):
        assert "does not contain a run" in failure(["eval", "--report-only", "--out", str(out)])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_reported_in_one_line(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert "cannot be written" in failure(arguments(model_path, tmp_path / "file"))


def test_an_error_in_the_middle_of_a_run_keeps_the_finished_samples(
    monkeypatch: pytest.MonkeyPatch, model_path: Path, tmp_path: Path
) -> None:
    do = SampleWorker.do

    def second_fails(self: SampleWorker, job: SampleJob) -> Any:
        if job.task == "niah_single_1":
            raise ConfigError("no more")
        return do(self, job)

    monkeypatch.setattr(SampleWorker, "do", second_fails)
    result = CliRunner().invoke(app, arguments(model_path, tmp_path / "run", methods=("random",)))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: no more"
    assert RunFolder(tmp_path / "run").done() == {JOBS[0]}
    monkeypatch.undo()
    invoke(*arguments(model_path, tmp_path / "run", methods=("random",)))
    assert RunFolder(tmp_path / "run").done() == set(JOBS)


def test_a_name_given_twice_is_run_once(model_path: Path, tmp_path: Path, done: list[Any]) -> None:
    twice: dict[str, Any] = {
        "tasks": "passkey,passkey",
        "kv_types": "f16,f16",
        "compression_ratio": "0.5,0.5",
        "methods": ("random", "random"),
    }
    invoke(*arguments(model_path, tmp_path / "run", **twice))
    assert done == JOBS[:1]
