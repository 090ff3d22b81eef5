"""Calibrations: the measurements against the numpy twin, and the command from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.llamas import ONE_THREAD
from support.needles import NEEDLES, SMALL
from typer.testing import CliRunner

from kvcompose_gguf import ConfigError, UnsupportedError
from kvcompose_gguf.cli.app import app
from kvcompose_gguf.learning import calibrate, trials
from kvcompose_gguf.learning.trials import CalibrateOptions
from kvcompose_gguf.measurements.calibration import Calibration, load_calibration
from kvcompose_gguf.methods.allocation import Uniform
from kvcompose_gguf.methods.compresskv import CompressKV
from kvcompose_gguf.scoring.evidence import Evidence

#
# measurements
#


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("belongs", [[True] * 7, [False, True, True, False, False, True, False], [False] * 7])
def test_attention_to_the_place_is_the_twins(make_llama, belongs, name):
    config, place = tiny.ARCHITECTURES[name], range(40, 61)
    prompt, choices = tiny.tokens(config, 320), tiny.tokens(config, 7, seed=1)
    llama = make_llama(config, swa_full=False, **ONE_THREAD)
    llama.prefill(prompt)
    got = trials.attention_to(llama, prompt, choices, belongs, place)
    model = tiny.NumpyLlama(config)
    # the query that predicts a token is at the position before it
    attention = model.forward(prompt + choices[:-1])[1]
    queries = [len(prompt) - 1 + i for i, belong in enumerate(belongs) if belong]
    want = np.array([attention[layer.il][:, queries, 40:61].sum(axis=(1, 2)) for layer in llama.session.layers])
    difference = np.abs(np.array(got) - want).max()
    assert difference < 1e-4, f"the largest difference is {difference}"
    assert llama.n_tokens == llama.session.state().n_cells_used == len(prompt) - 1


def test_echo_and_induction_are_the_twins(make_llama):
    options = CalibrateOptions(n_random=32)
    llama = make_llama(**ONE_THREAD)
    prompt, last = trials.random_prompt(llama, options, 3)
    result = trials.random_trial(llama, options, 3)
    repeat = prompt[last.start - 32 : last.start]
    assert prompt[:1] == [llama.token_bos()]
    assert prompt[1:] == repeat * 3 + repeat[:16]
    assert result["answer"] == repeat[16:]
    attention = tiny.NumpyLlama(tiny.GQA).forward([prompt[0], *repeat * 4])[1]
    want = np.zeros((3, 4))
    for l, p in enumerate(attention):
        for pos in last:
            for k in (1, 2, 3):
                want[l] += p[:, pos, pos - 32 * k] + p[:, pos, pos - 32 * k + 1]
    difference = np.abs(np.array(result["heads"]) - want / 32).max()
    assert difference < 1e-5, f"the largest difference is {difference}"


def test_eviction_errors_are_those_of_one_masked_layer_of_the_twin(make_llama):
    prompt, choices = tiny.tokens(tiny.GQA, 120), tiny.tokens(tiny.GQA, 9, seed=1)
    heads = ((0.1, 0.9, 0.0, 0.2), (0.0, 0.0, 0.0, 0.0), (0.5, 0.4, 0.3, 0.2))
    llama = make_llama(**ONE_THREAD)
    got = trials.eviction_errors(llama, prompt, choices, heads)

    model = tiny.NumpyLlama(tiny.GQA)
    attention = model.forward(prompt)[1]
    scores = [p[:, -8:].sum(axis=1) / np.minimum(8, 120 - np.arange(120)) for p in attention]
    evidence = Evidence(120, llama.session.layers, [s.astype(np.float32) for s in scores], 8)
    method = CompressKV(n_kept=32, allocation=Uniform(), calibration=Calibration("", "", heads, (0.2, 0.3, 0.5)))
    plan = method.plan(evidence)
    assert plan.n_kept.tolist() == [32] * 3

    def outputs(visible: list[np.ndarray | None] | None, l: int) -> np.ndarray:
        model.truncate(120)
        model.visible = visible
        model.forward(choices[:-1])
        return model.o[l].reshape(8, -1)

    for l, error in enumerate(got):
        visible = np.zeros((2, 120), bool)
        np.put_along_axis(visible, plan.rows[l].astype(int), True, axis=1)
        full, lost = outputs(None, l), outputs([visible if i == l else None for i in range(3)], l)
        want = sum(
            float(np.linalg.norm(a - b)) / (float(np.linalg.norm(b)) + 1e-5) for a, b in zip(lost, full, strict=True)
        )
        assert want > 0.5
        assert abs(error - want) < 1e-3, f"layer {l}: {error}, not {want}"


@pytest.mark.parametrize("name", ["gemma3", "gpt-oss"])
def test_models_with_sliding_windows_are_measured_in_their_other_layers(make_llama, forced, tmp_path, name):
    options = {"n_ctx": 1024, "swa_full": False, "n_ubatch": 128, **ONE_THREAD}
    llama = make_llama(tiny.ARCHITECTURES[name], **options)
    heads, errors = calibrate.measure(llama, SMALL, calibrate.Journal(tmp_path / "trials.jsonl", {}))
    assert len(heads) == len(errors) == len(llama.session.layers) == 2
    assert min(errors) > 0


#
# the command
#


def journal_of(file: Path) -> Path:
    """Returns the journal of finished trials beside the only calibration."""
    (journal,) = file.parent.glob(f"{file.stem}.*.trials.jsonl")
    return journal


@pytest.mark.parametrize("options", [SMALL, CalibrateOptions(n_random=32, n_errors=2)], ids=["needles", "random"])
def test_a_model_is_calibrated_from_end_to_end(folder, forced, tiny_model, capsys, options):
    path = tiny_model(tiny.GQA)
    file = calibrate.calibrate(str(path), options, threads=1)
    printed = capsys.readouterr().out
    assert "best heads" in printed
    assert str(file) in printed
    made = load_calibration(path)
    assert file == folder / f"{made.model_sha256}.json"
    assert [len(scores) for scores in made.heads] == [4, 4, 4]
    assert sum(made.errors) == pytest.approx(1, abs=1e-4)
    assert min(made.errors) > 0
    assert made.settings["n_random"] == options.n_random
    method = CompressKV(n_kept=40).for_model(path)
    assert method.calibration == made

    records = [json.loads(line) for line in journal_of(file).read_text("utf-8").splitlines()][1:]
    results = {record["trial"]: record["result"] for record in records}
    scores = [result["heads"] for key, result in results.items() if key.startswith("heads")]
    assert len(scores) == options.n_trials == 4
    assert np.allclose(made.heads, np.mean(scores, axis=0), rtol=1e-5)
    errors = np.array([result for key, result in results.items() if key.startswith("errors")])
    assert len(errors) == options.n_errors
    assert np.allclose(made.errors, (errors / errors.sum(axis=1, keepdims=True)).mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("step", ["attention_to", "eviction_errors"])
def test_an_interrupted_calibration_goes_on_and_ends_with_the_same_file(folder, forced, tiny_model, monkeypatch, step):
    path = str(tiny_model(tiny.GQA))
    file = calibrate.calibrate(path, SMALL, threads=1)
    journal = journal_of(file)
    whole, want = journal.read_bytes(), file.read_bytes()
    file.unlink()
    journal.unlink()

    measured, calls = getattr(trials, step), []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(trials, step, failing)
    with pytest.raises(KeyboardInterrupt):
        calibrate.calibrate(path, SMALL, threads=1)
    assert not file.exists()
    n_done = len(journal.read_bytes().splitlines())
    with journal.open("ab") as stream:
        stream.write(whole.splitlines()[n_done][:-1])  # the next line, cut
    assert calibrate.calibrate(path, SMALL, threads=1).read_bytes() == want
    assert journal.read_bytes() == whole
    assert len(calls) == (5 if step == "attention_to" else 4)

    calibrate.calibrate(path, SMALL, threads=1)  # nothing is left to do
    assert len(calls) == (5 if step == "attention_to" else 4)
    other = CalibrateOptions(**{**vars(SMALL), "n_errors": 1})
    calibrate.calibrate(path, other, threads=1)  # other options, another calibration, whose trials are apart
    assert journal.read_bytes() == whole
    (apart,) = {*folder.glob("*.trials.jsonl")} - {journal}
    assert len(apart.read_bytes().splitlines()) == 1 + 4 + 1


def test_a_cache_folder_that_cannot_be_written_is_refused_before_anything_is_measured(folder, tiny_model, monkeypatch):
    folder.parent.mkdir()
    folder.write_text("a file in its place")
    monkeypatch.setattr(calibrate, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=f"cannot write to {folder}, the folder of the calibrations"):
        calibrate.calibrate(str(tiny_model(tiny.GQA)), SMALL, threads=1)


def test_without_a_right_answer_another_way_is_named(folder, forced, tiny_model):
    forced[:] = [b"no"]
    with pytest.raises(ConfigError, match=r"none of 4 answers was right.*--data-free"):
        calibrate.calibrate(str(tiny_model(tiny.GQA)), SMALL, threads=1)
    forced[:] = [b"no", b"no", b"no", f" {NEEDLES[0][1]}".encode()]
    calibrate.calibrate(str(tiny_model(tiny.GQA)), CalibrateOptions(**{**vars(SMALL), "n_errors": 2}), threads=1)
    n_lines = max(len(journal.read_text("utf-8").splitlines()) for journal in folder.glob("*.trials.jsonl"))
    assert n_lines == 1 + 4 + 1  # of the two errors that were wanted one could be measured


def test_prompts_longer_than_the_model_reads_are_refused(folder, tiny_model):
    options = CalibrateOptions(longest=4090)
    with pytest.raises(ConfigError, match="trials of 4140 tokens"):
        calibrate.calibrate(str(tiny_model(tiny.GQA)), options, threads=1)


def test_tokens_that_do_not_reproduce_their_text_are_refused(make_llama):
    with pytest.raises(UnsupportedError, match="--data-free"):
        trials.needle_prompt(make_llama(**ONE_THREAD), SMALL, 0)


def test_the_command_hands_its_options_on(monkeypatch):
    seen = []
    monkeypatch.setattr(calibrate, "calibrate", lambda *args: seen.append(args))
    for arguments in (["m"], ["m", "--needles", "1", "--data-free", "--threads", "2", "--longest", "999"]):
        assert CliRunner().invoke(app, ["learn", "--for", "compresskv", *arguments]).exit_code == 0
    assert seen == [
        ("m", CalibrateOptions(), None),
        ("m", CalibrateOptions(n_needles=1, longest=999, n_random=256), 2),
    ]
    monkeypatch.undo()
    result = CliRunner().invoke(app, ["learn", "nowhere.gguf", "--for", "compresskv"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: model='nowhere.gguf' is neither a file")
