"""``kvcompose calibrate --only surrogate``."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.commands import failure
from support.llamas import ONE_THREAD
from support.surrogates import assert_ridge, targets_of
from typer.testing import CliRunner

from kvcompose_gguf import ConfigError, KVCompose, Llama
from kvcompose_gguf.cli.app import app
from kvcompose_gguf.learning import calibrate, fit
from kvcompose_gguf.learning.fit import FitOptions, fit_surrogate
from kvcompose_gguf.learning.passages import passage
from kvcompose_gguf.measurements.surrogate import Surrogate, features, load_surrogate
from kvcompose_gguf.support.ranks import rank_correlation

REPEAT = KVCompose(compression_ratio=0.0)


SMALL = FitOptions(n_passages=6, longest=256)
ARGUMENTS = ["--only", "surrogate", "--passages", "6", "--passage-tokens", "256", "--threads", "1"]


def test_the_command_makes_a_surrogate_that_llama_finds(folder, tiny_model, make_llama, tmp_path):
    path, own = tiny_model(tiny.GQA), tmp_path / "own.txt"
    own.write_text("".join(f"line {i}\n" for i in range(200)))
    result = CliRunner().invoke(app, ["calibrate", str(path), *ARGUMENTS, "--text", str(own)])
    assert result.exit_code == 0, result.output
    made = load_surrogate(path)
    file = folder / f"{made.model_sha256}.surrogate.npz"
    assert sorted(file.name for file in folder.iterdir()) == sorted([file.name, "sha256.json"])
    assert str(file) in result.stdout
    assert "whole plan" in result.stdout
    assert (made.settings["n_passages"], made.settings["longest"]) == (6, 256)
    assert made.settings["files"] == [f"own.txt {hashlib.sha256(own.read_bytes()).hexdigest()[:16]}"]

    # number 4 is held out; the other passages decide the ridge
    llama = make_llama(tiny.GQA, REPEAT, n_ctx=768, type_k=1, type_v=1, flash_attn=True, **ONE_THREAD)
    kinds, seen, tables = [], [], []
    for number in range(6):
        text = passage(llama, number, 256, [own])
        llama.reset()
        kinds.append(text.kind)
        seen.append(llama.observe(text.tokens, REPEAT))
        tables.append([np.concatenate([*features(seen[-1], l)], axis=1) for l in range(3)])
    held_out, of_held_out = seen.pop(4), tables.pop(4)
    assert_ridge(made.weights, seen, tables, 2e-2)
    want = []
    for l in range(3):
        predicted = np.einsum("hnf,hf->hn", of_held_out[l], made.weights[l]).clip(np.log(1e-5), 0)
        heads = zip(predicted, targets_of(held_out, l), strict=True)
        want.append(np.mean([rank_correlation(*pair) for pair in heads]))
    assert made.quality["rank"] == pytest.approx(want, abs=1e-3)
    assert (made.quality["n_passages"], [*made.quality["rank_by_kind"]]) == (1, [kinds[4]])
    assert kinds.count("text") == 3

    second = make_llama(tiny.GQA, KVCompose(scoring="surrogate", compression_ratio=0.5), **ONE_THREAD)
    assert [w.tobytes() for w in second.kv_compressor.surrogate.weights] == [w.tobytes() for w in made.weights]
    assert second.compress(tiny.tokens(tiny.GQA, 300)).n_kept.sum() == 3 * 150


def test_an_interrupted_fit_goes_on_and_ends_with_the_same_weights(folder, tiny_model, monkeypatch):
    numbers: list[int] = []
    interruptions = {2: 1, 4: 1}

    def counted(llama: Llama, number: int, *args: Any) -> Any:
        if interruptions.get(number):
            interruptions[number] -= 1
            raise KeyboardInterrupt
        numbers.append(number)
        return passage(llama, number, *args)

    path = str(tiny_model(tiny.GQA))
    monkeypatch.setattr(fit, "passage", counted)
    with pytest.raises(KeyboardInterrupt):
        fit_surrogate(path, SMALL, threads=1)
    assert numbers == [0, 1]
    (sums,) = folder.glob("*.sums.npz")
    kept = sums.read_bytes()
    with pytest.raises(KeyboardInterrupt):  # other options, whose sums are apart
        fit_surrogate(path, FitOptions(n_passages=5, longest=64), threads=1)
    assert numbers == [0, 1, 0, 1, 2, 3]
    assert sums.read_bytes() == kept

    interruptions[4] = 1
    del numbers[:]
    with pytest.raises(KeyboardInterrupt):
        fit_surrogate(path, SMALL, threads=1)
    assert numbers == [2, 3, 5]
    assert not [*folder.glob("*.surrogate.npz")]
    got = Surrogate.from_bytes(fit_surrogate(path, SMALL, threads=1).read_bytes())
    assert numbers == [2, 3, 5, 4]
    assert not sums.exists()
    want = Surrogate.from_bytes(fit_surrogate(path, SMALL, threads=1).read_bytes())
    assert numbers == [2, 3, 5, 4, 0, 1, 2, 3, 5, 4]
    for a, b in zip(got.weights, want.weights, strict=True):
        assert np.abs(a - b).max() <= 1e-6 * np.abs(b).max(), f"the largest difference is {np.abs(a - b).max()}"
    assert got.settings == want.settings


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--passages", "2"], "n_passages=2, at least 5 are needed"), (["--passage-tokens", "63"], "longest=63, at least 64"),
        (["--passages", "0"], "n_passages"), (["--text", "nowhere.txt"], "nowhere.txt cannot be read"),
    ],
)  # fmt: skip
def test_wrong_options_of_the_command_are_refused(folder, tiny_model, arguments, words):
    assert words in failure(["calibrate", str(tiny_model(tiny.GQA)), "--only", "surrogate", *arguments])


def test_passages_longer_than_the_model_reads_are_refused(folder, tiny_model):
    with pytest.raises(ConfigError, match="passages of 5000 tokens are longer than"):
        fit_surrogate(str(tiny_model(tiny.GQA)), FitOptions(longest=5000), threads=1)
    with pytest.raises(ConfigError, match="scoring_chunk=0"):
        FitOptions(scoring_chunk=0)


def test_a_cache_folder_that_cannot_be_written_is_refused_before_anything_is_read(folder, tiny_model, monkeypatch):
    folder.parent.mkdir()
    folder.write_text("a file in its place")
    monkeypatch.setattr(fit, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=f"cannot write to {folder}, the folder of the calibrations"):
        fit_surrogate(str(tiny_model(tiny.GQA)), SMALL, threads=1)


def test_the_command_measures_for_one_method_or_both(monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr(fit, "fit_surrogate", lambda *args: seen.append(args))
    monkeypatch.setattr(calibrate, "calibrate", lambda model, *args: seen.append(model))
    options = ["--text", "a.txt", "--text", "b.txt", "--threads", "2"]
    for arguments in ([], ["--only", "surrogate", *options, *ARGUMENTS[2:6]], ["--only", "compresskv"]):
        assert CliRunner().invoke(app, ["calibrate", "m", *arguments]).exit_code == 0
    chosen = FitOptions(n_passages=6, longest=256, files=("a.txt", "b.txt"))
    assert seen == [("m", FitOptions(), None), "m", ("m", chosen, 2), "m"]
    assert FitOptions().fitted[:5] == [0, 1, 2, 3, 5]
    assert chosen.held_out == [4]
