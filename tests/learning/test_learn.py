"""``kvcompose learn``: what it keeps is what ordinary prompts keep, and its figures are those of texts held out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.commands import failure
from support.llamas import ONE_THREAD
from typer.testing import CliRunner

from kvcompose_gguf import ConfigError, KVCompose
from kvcompose_gguf.cli.app import app
from kvcompose_gguf.learning import learn as module
from kvcompose_gguf.learning import quality
from kvcompose_gguf.learning.learn import LearnOptions, learn
from kvcompose_gguf.learning.passages import Passage, passage
from kvcompose_gguf.measurements import learned
from kvcompose_gguf.measurements.learned import read_learned
from kvcompose_gguf.support.ranks import rank_correlation

SMALL = LearnOptions(n_passages=6, longest=512)
ARGUMENTS = ["--passages", "6", "--passage-tokens", "512", "--threads", "1"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.txt"
    file.write_text("".join(f"line {i}\n" for i in range(300)))
    return file


def test_the_command_keeps_what_prompts_of_these_texts_keep(
    kept: Path, tiny_model: Callable[..., Path], make_llama: Callable[..., Any], own: Path
) -> None:
    result = CliRunner().invoke(app, ["learn", str(tiny_model(tiny.GQA)), str(own), *ARGUMENTS])
    assert result.exit_code == 0, result.output
    (file,) = kept.glob("*.npz")
    assert str(file) in result.stdout
    assert "whole plan" in result.stdout
    made = read_learned(file.stem)
    file.unlink()

    method = KVCompose(compression_ratio=0.0, spot_check=1.0, min_tokens=1)
    llama = make_llama(tiny.GQA, method, n_ctx=1280, type_k=1, type_v=1, flash_attn=True, **ONE_THREAD)
    for number in (0, 1, 2, 3, 5):  # number 4 is held out
        llama.reset()
        llama.compress(passage(llama, number, 512, [own]).tokens)
    want = read_learned(file.stem)
    assert (made.n_prompts, made.n_tokens) == (want.n_prompts, want.n_tokens) == (5, 128 + 256 + 512 + 128 + 512)
    for a, b in zip(made.layers, want.layers, strict=True):
        np.testing.assert_allclose(a.plain_weights, b.plain_weights, atol=1e-3 * np.abs(b.plain_weights).max())


def test_the_figures_are_those_of_the_texts_held_out(
    kept: Path, tiny_model: Callable[..., Path], make_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    texts: list[Passage] = []
    monkeypatch.setattr(module, "summary", lambda results: seen.append(quality.summary(results)) or seen[0])
    monkeypatch.setattr(module, "passage", lambda *args: texts.append(passage(*args)) or texts[-1])
    file = learn(str(tiny_model(tiny.GQA)), SMALL, threads=1)
    text = texts[-1]  # number 4, which the model has written
    repeat = KVCompose(compression_ratio=0.0, scoring="repeat", scoring_chunk=None)
    llama = make_llama(tiny.GQA, n_ctx=1280, type_k=1, type_v=1, flash_attn=True, **ONE_THREAD)
    evidence = llama.observe(text.tokens, repeat)
    predicted = read_learned(file.stem).predict(evidence)
    want = []
    for l, p in enumerate(predicted):
        group = evidence.attention[l].reshape(2, 2, -1).mean(axis=1)
        want.append(float(rank_correlation(p, group).mean()))
    assert seen[0]["rank"] == pytest.approx(want, abs=1e-3)
    assert seen[0]["rank_by_kind"] == {text.kind: pytest.approx(np.mean(want), abs=1e-3)}


def test_an_interruption_loses_nothing(
    kept: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(llama: Any, number: int, *args: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return passage(llama, number, *args)

    monkeypatch.setattr(module, "passage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(str(tiny_model(tiny.GQA)), SMALL, threads=1)
    (file,) = kept.glob("*.npz")
    assert read_learned(file.stem).n_prompts == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--passages", "2"], "n_passages=2, at least 5 are needed"), (["--passage-tokens", "63"], "longest=63, at least 64"),
        (["--passages", "0"], "n_passages"), (["nowhere.txt"], "nowhere.txt cannot be read"),
        (["--passage-tokens", "5000"], "texts of 5000 tokens are longer than"),
        (["--for", "compresskv", "some.txt"], "some.txt: --for compresskv reads no files"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(
    kept: Path, tiny_model: Callable[..., Path], arguments: list[str], words: str
) -> None:
    assert words in failure(["learn", str(tiny_model(tiny.GQA)), *arguments])


def test_nothing_is_read_if_nothing_may_be_kept(tiny_model: Callable[..., Path]) -> None:
    assert "KVCOMPOSE_LEARN=off" in failure(["learn", str(tiny_model(tiny.GQA))])  # as all tests set it


def test_a_folder_that_cannot_be_written_is_an_error(
    kept: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    path = str(tiny_model(tiny.GQA))
    file = learn(path, SMALL, threads=1)
    known = file.read_bytes()
    monkeypatch.setattr(learned, "write_file", full)
    with pytest.raises(ConfigError, match=r"is not kept in .*No space left"):
        learn(path, SMALL, threads=1)
    assert file.read_bytes() == known


def test_the_old_name_says_the_new_one() -> None:
    for arguments in ([], ["smollm2"], ["smollm2", "--only", "surrogate", "--text", "a.txt"]):
        assert "now `kvcompose learn MODEL`" in failure(["calibrate", *arguments])
