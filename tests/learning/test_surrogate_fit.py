"""Compares the surrogate's regression and figures with plain numpy; tests the passages and the command."""

from __future__ import annotations

import hashlib
import io
import random
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support import tiny
from test_cli import failure
from test_surrogate import ONE_THREAD, make_evidence, random_weights, table_of
from typer.testing import CliRunner

from kvcompose_gguf import ConfigError, KVCompose, Llama
from kvcompose_gguf.cli.app import app
from kvcompose_gguf.learning import calibrate, passages
from kvcompose_gguf.learning import fit as surrogate_fit
from kvcompose_gguf.learning.fit import FitOptions, fit_surrogate
from kvcompose_gguf.learning.passages import passage
from kvcompose_gguf.learning.quality import RATIOS, compare, quality_tables, rank_correlation, summary
from kvcompose_gguf.learning.sums import Sums
from kvcompose_gguf.measurements import calibration, surrogate
from kvcompose_gguf.measurements.surrogate import Surrogate, features, load_surrogate
from kvcompose_gguf.plan.geometry import LayerGeometry
from kvcompose_gguf.scoring.evidence import Evidence
from kvcompose_gguf.tasks.texts import load_texts

REPEAT = KVCompose(compression_ratio=0.0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns an empty folder of surrogates."""
    monkeypatch.setattr(calibration.platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    return tmp_path / "kvcompose-gguf" / "calibrations"


#
# regression
#


def ridge(table: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Returns float64 (n_features,) for unscaled features; the penalty applies to unit variance, not to the last one."""
    varies = np.ptp(table, axis=0) > 0
    mean, deviation = table.mean(axis=0), np.where(varies, table.std(axis=0), 1)
    z = np.where(varies, (table - mean) / deviation, 0)
    penalty = 1e-3 * len(table) * np.eye(table.shape[1])
    weights = np.linalg.solve(z.T @ z + penalty, z.T @ (target - target.mean())) / deviation
    weights[-1] = target.mean() - mean[:-1] @ weights[:-1]
    return weights


def targets_of(evidence: Evidence, l: int) -> np.ndarray:
    """Returns float64 (n_head_kv, N): the logarithm of the mean over every group."""
    attention = evidence.attention[l].astype(np.float64)
    return np.log(attention.reshape(evidence.layers[l].n_head_kv, -1, evidence.n_tokens).mean(axis=1) + 1e-5)


def fitted(passages: Sequence[Evidence], file: Path | None = None) -> Sums:
    """Returns the sums of all passages, written to ``file`` and read again after each."""
    sums = Sums()
    for evidence in passages:
        layers = zip(evidence.attention, evidence.layers, strict=True)
        sums.add(evidence, [a.reshape(layer.n_head_kv, -1, evidence.n_tokens).mean(axis=1) for a, layer in layers])
        if file is not None:
            sums.write(file)
            sums = Sums.read(file)
    return sums


def assert_ridge(weights: Sequence[np.ndarray], passages: Sequence[Evidence], tables: Any, tolerance: float) -> None:
    """``tables[i][l]`` holds a passage's features of one layer, (n_head_kv, N, n_features)."""
    for l, layer in enumerate(passages[0].layers):
        table = np.concatenate([of_passage[l] for of_passage in tables], axis=1).astype(np.float64)
        target = np.concatenate([targets_of(evidence, l) for evidence in passages], axis=1)
        assert weights[l].dtype == np.float32
        for h in range(layer.n_head_kv):
            want = ridge(table[h], target[h])
            # sums as predict() does, so that weights that cancel out do not pass
            error = np.abs(table[h].astype(np.float32) @ weights[l][h] - table[h] @ want).max()
            assert error < tolerance, f"layer {l}, head {h}: predictions differ by {error}"
            error = np.abs((weights[l][h] - want) * table[h].std(axis=0)).max()
            assert error < tolerance, f"layer {l}, head {h}: weights differ by {error}"


@pytest.mark.parametrize("on_disk", [False, True])
def test_sums_are_the_ridge_of_all_tokens(monkeypatch, tmp_path, on_disk):
    monkeypatch.setattr(surrogate, "CHUNK", 32)
    passages = [make_evidence(70), make_evidence(110), make_evidence(45)]
    sums = fitted(passages, tmp_path / "f" / "x.sums.npz" if on_disk else None)
    assert (sums.n_passages, sums.n_tokens) == (3, 225)
    weights = sums.solve()
    assert_ridge(weights, passages, [[table_of(p, l) for l in range(2)] for p in passages], 1e-3)
    if on_disk:
        assert [w.tobytes() for w in fitted(passages).solve()] == [w.tobytes() for w in weights]
        assert [file.name for file in (tmp_path / "f").iterdir()] == ["x.sums.npz"]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "text": lambda data: b"nothing",
    "empty": lambda data: b"",
    "cut": lambda data: data[:-40],
    "flipped": lambda data: bytes(byte ^ (i == len(data) // 2) for i, byte in enumerate(data)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_sums_is_as_none(tmp_path, damage):
    file = tmp_path / "x.sums.npz"
    fitted([make_evidence(30)]).write(file)
    assert Sums.read(file).n_passages == 1
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert vars(Sums.read(file)) == vars(Sums())


def test_sums_that_are_missing_or_lack_an_array_are_as_none(tmp_path):
    file = tmp_path / "x.sums.npz"
    assert vars(Sums.read(file)) == vars(Sums())
    np.savez(file, counts=[3, 100, 1], shifts0=np.zeros((2, 4)))
    assert vars(Sums.read(file)) == vars(Sums())


@pytest.mark.parametrize("value", [0.0, 0.5, 0.7])
def test_a_feature_that_is_constant_does_no_harm(value):
    def with_constant(evidence: Evidence) -> Evidence:
        values = [evidence.values(l).copy() for l in range(2)]
        for v in values:
            v[:, :, 2] = value
        return replace(evidence, rows=replace(evidence.rows, all_values=values))

    passages = [with_constant(make_evidence(n)) for n in (90, 110, 60)]
    weights = fitted(passages).solve()
    assert_ridge(weights, passages, [[table_of(p, l) for l in range(2)] for p in passages], 1e-3)


def test_targets_that_are_linear_in_the_features_are_recovered():
    def linear(n_tokens: int, seed: int) -> Evidence:
        evidence = make_evidence(n_tokens, seed)
        heads = [np.exp(np.einsum("hnf,hf->hn", table_of(evidence, l), truth[l])) - 1e-5 for l in range(2)]
        attention = [np.repeat(head, 2, axis=0).astype(np.float32) for head in heads]
        return replace(evidence, attention=attention)

    truth = random_weights(make_evidence(1), 0.5)
    made = Surrogate("m", "abc", fitted([linear(400, seed) for seed in range(3)]).solve())
    other = linear(400, 9)
    for l, attention in enumerate(made.predict(other)):
        logs = targets_of(other, l)
        assert logs.std() > 0.3
        difference = np.abs(np.log(attention + 1e-5) - logs).max()
        assert difference < 0.1, f"the largest difference is {difference}"


#
# figures
#


def of_heads(*layers: list[list[float]]) -> tuple[list[np.ndarray], Evidence]:
    """Returns attention of layers with one query head per KV head, and their evidence."""
    arrays = [np.array(heads, dtype=np.float32) for heads in layers]
    geometries = [LayerGeometry(l, len(a), len(a), 4, 4, 1, 1, False, 64) for l, a in enumerate(arrays)]
    return arrays, Evidence(arrays[0].shape[1], geometries)


def test_attention_compared_with_itself_is_all_ones():
    rng = np.random.default_rng(0)
    attention, evidence = of_heads(*rng.random((3, 2, 40)).tolist())
    result = compare(attention, attention, evidence)
    assert [*result] == ["rank", "overlap", "kept", "attention", "budgets"]
    for name, values in result.items():
        assert np.abs(np.array(values) - 1).max() < 1e-12, name
        assert np.shape(values) == ((3, 3) if name == "overlap" else (3,))


def test_reversed_attention_ranks_at_minus_one():
    rng = np.random.default_rng(0)
    attention, evidence = of_heads(*rng.random((2, 3, 20)).tolist())
    result = compare([1 - a for a in attention], attention, evidence)
    assert result["rank"] == pytest.approx([-1, -1])
    assert result["overlap"] == [[0, 0, 0]] * 2
    # equal values rank in order, like ascending numbers
    assert rank_correlation(np.zeros(5, np.float32), np.arange(5, dtype=np.float32)) == pytest.approx(1)
    assert rank_correlation(np.zeros(1, np.float32), np.ones(1, np.float32)) == 1


def hand_counted() -> dict[str, Any]:
    predicted, evidence = of_heads([[0.5, 0.1, 0.2, 0.3]], [[0.4, 0.6, 0.05, 0.01]])
    repeated, _ = of_heads([[0.9, 0.8, 0.7, 0.1]], [[0.6, 0.2, 0.05, 0.01]])
    return compare(predicted, repeated, evidence)


def test_figures_are_those_counted_by_hand():
    result = hand_counted()
    assert RATIOS == (0.5, 0.75, 0.9)
    assert result["rank"] == pytest.approx([1 - 6 * (4 + 4) / 60, 1 - 6 * (1 + 1) / 60])
    # every layer keeps 2, 1 and 1 tokens: {0, 1} and {0, 3}, {0} and {0}; {0, 1} and {1, 0}, {0} and {1}
    assert result["overlap"] == [[0.5, 1, 1], [1, 0, 0]]
    # all layers keep 4, 2 and 1: {0, 1, 2} {0} and {0, 3} {0, 1}; {0, 1} {} and {0} {1}; {0} {} and {} {1}
    assert result["kept"] == [2 / 4, 1 / 2, 0]
    assert result["attention"] == pytest.approx([(0.9 + 0.1 + 0.6 + 0.2) / 3, (0.9 + 0.2) / (0.9 + 0.8), 0.2 / 0.9])
    assert result["budgets"] == pytest.approx([0, 0, -1])


def test_a_summary_is_of_means_and_its_tables_show_them():
    result = hand_counted()
    other = {name: (np.array(value) + 0.1).tolist() for name, value in result.items()}
    got = summary([{"kind": "code", **result}, {"kind": "prose", **other}, {"kind": "code", **other}])
    assert got["n_passages"] == 3
    assert got["ratios"] == [0.5, 0.75, 0.9]
    for name, value in result.items():
        assert got[name] == (np.array(value) + 0.2 / 3).round(4).tolist()
    assert got["rank_by_kind"] == {"code": 0.55, "prose": 0.6}

    console = Console(file=io.StringIO(), record=True, width=160)
    for table in quality_tables(got):
        console.print(table)
    lines = [line.split() for line in console.export_text().splitlines()]
    for words in ("0 0.27 57% 107% 107%", "1 0.87 107% 7% 7%", "50% removed 57% 33.3% 0.07", "90% removed 7% 71.1% -0.93", "code 0.55", "prose 0.60"):  # fmt: skip
        assert words.split() in lines


#
# passages
#


def text_of(llama: Llama, tokens: Sequence[int]) -> str:
    """Returns the text of a tiny model's tokens, which are bytes; the last character may be cut."""
    return b"".join(map(llama.piece, tokens)).decode(errors="ignore").replace("▁", " ")


def test_passages_are_of_all_kinds_and_as_long_as_they_should_be(make_llama):
    topics = pytest.importorskip("pydoc_data.topics")
    llama = make_llama(**ONE_THREAD)
    made = [passage(llama, number, 400) for number in range(8)]
    assert sorted(text.kind for text in made[:7]) == sorted(passages.KINDS)
    assert made[7].kind == made[0].kind
    assert [len(text.tokens) for text in made] == [100, 200, 400, 100, 200, 400, 100, 200]
    assert [len(passage(llama, number, 100).tokens) for number in range(3)] == [64, 64, 100]
    texts = {text.kind: text_of(llama, text.tokens[1:]).strip() for text in made[:7]}
    assert texts["documentation"] in "\n\n".join(text for _, text in sorted(topics.topics.items()))
    assert texts["prose"] in " ".join(load_texts("generated").sentences)
    modules = Path(sysconfig.get_path("stdlib")).glob("*.py")
    assert any(texts["code"] in file.read_text("utf-8") for file in modules)


def test_a_passage_depends_on_its_number_alone(make_llama):
    first, second = make_llama(**ONE_THREAD), make_llama(**ONE_THREAD)
    made = [passage(first, number, 300) for number in range(7)]
    second.eval(tiny.tokens(tiny.GQA, 50))
    random.seed(5)
    assert [passage(second, number, 300) for number in reversed(range(7))] == made[::-1]
    others = [passage(first, number + 21, 300) for number in range(7)]  # the same kinds and lengths
    for text, other in zip(made, others, strict=True):
        assert (text.kind, len(text.tokens)) == (other.kind, len(other.tokens))
        assert text.tokens != other.tokens


def test_passages_begin_with_bos_if_the_models_prompts_do(make_llama):
    with_bos = make_llama(**ONE_THREAD)
    without = make_llama(kv_overrides={"tokenizer.ggml.add_bos_token": False}, **ONE_THREAD)
    assert (with_bos.adds_bos, without.adds_bos) == (True, False)
    for number in range(7):
        text, bare = passage(with_bos, number, 256), passage(without, number, 256)
        assert text.tokens[0] == with_bos.token_bos()
        assert bare.tokens[0] != with_bos.token_bos()
        assert len(text.tokens) == len(bare.tokens)
        if text.kind != "written":
            assert text.tokens[1:] == bare.tokens[:-1]


def test_every_second_passage_is_of_the_users_files(make_llama, tmp_path):
    llama, files = make_llama(**ONE_THREAD), [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, word in zip(files, ("north", "south"), strict=True):
        file.write_text("\n".join(f"{word} {i}." for i in range(400)), "utf-8")
    for number in range(8):
        text = passage(llama, number, 256, files)
        if number % 2:
            assert text.kind == "text"
            assert text_of(llama, text.tokens[1:])[:-10] in files[(number // 2 + number // 4) % 2].read_text("utf-8")
            assert len(text.tokens) == (64, 128, 256)[number % 3]
        else:
            assert text == passage(llama, number, 256)


def test_files_that_cannot_be_used_are_refused(make_llama, tmp_path):
    llama, file = make_llama(**ONE_THREAD), tmp_path / "a.txt"
    with pytest.raises(ConfigError, match=r"a\.txt cannot be read"):
        passage(llama, 1, 256, [file])
    for text in ("", "too short"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"a\.txt: \d+ tokens after a random line, 64 are needed"):
            passage(llama, 1, 256, [file])
    file.write_bytes(b"\xff\xfe" * 200)
    assert len(passage(llama, 1, 256, [file]).tokens) == 128


def test_without_pythons_own_texts_there_is_prose(monkeypatch, tmp_path):
    pytest.importorskip("pydoc_data.topics")
    prose = passages.prose(random.Random(3))
    assert len(prose) > 12 * 2048
    assert passages.documentation(random.Random(3)) != prose != passages.code(random.Random(3))
    monkeypatch.setitem(sys.modules, "pydoc_data", None)
    assert passages.documentation(random.Random(3)) == prose
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    passages._modules.cache_clear()
    assert passages.code(random.Random(3)) == prose
    passages._modules.cache_clear()


def test_what_a_model_writes_goes_on_after_an_end(make_llama, monkeypatch):
    llama = make_llama(**ONE_THREAD)
    newline = llama.tokenize(b"\n", add_bos=False)[0]
    plain = passages.written(llama, random.Random(0), 333)
    assert len(plain) == 333
    beginning = next(text for text in passages.BEGINNINGS if text_of(llama, plain[1:]).startswith(text))
    n_first = 1 + len(beginning.replace(" ", "▁").encode())
    ends = {token for token in plain[n_first:] if token % 3 == 0} - {newline}
    assert ends
    monkeypatch.setattr(llama, "is_end", lambda token, is_end=llama.is_end: token in ends or is_end(token))
    want = [t for token in plain[n_first:] for t in ([newline] * 2 if token in ends else [token])]
    within = n_first + want.index(newline) + 1  # two newlines do not fit
    for n_tokens in (64, 333, within):
        tokens = passages.written(llama, random.Random(0), n_tokens)
        assert tokens == (plain[:n_first] + want)[:n_tokens]
        assert not ends & set(tokens[n_first:])


#
# the command
#

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
    monkeypatch.setattr(surrogate_fit, "passage", counted)
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
    monkeypatch.setattr(surrogate_fit, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=f"cannot write to {folder}, the folder of the calibrations"):
        fit_surrogate(str(tiny_model(tiny.GQA)), SMALL, threads=1)


def test_the_command_measures_for_one_method_or_both(monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr(surrogate_fit, "fit_surrogate", lambda *args: seen.append(args))
    monkeypatch.setattr(calibrate, "calibrate", lambda model, *args: seen.append(model))
    options = ["--text", "a.txt", "--text", "b.txt", "--threads", "2"]
    for arguments in ([], ["--only", "surrogate", *options, *ARGUMENTS[2:6]], ["--only", "compresskv"]):
        assert CliRunner().invoke(app, ["calibrate", "m", *arguments]).exit_code == 0
    chosen = FitOptions(n_passages=6, longest=256, files=("a.txt", "b.txt"))
    assert seen == [("m", FitOptions(), None), "m", ("m", chosen, 2), "m"]
    assert FitOptions().fitted[:5] == [0, 1, 2, 3, 5]
    assert chosen.held_out == [4]
