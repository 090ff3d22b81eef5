"""What is learnt of a model: the regression, and its file."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.features import make_evidence, table_of

from kvcompose_gguf.cli import doctor
from kvcompose_gguf.measurements import learned
from kvcompose_gguf.measurements.features import target_of
from kvcompose_gguf.measurements.learned import Learned, read_learned, update_learned
from kvcompose_gguf.measurements.regression import RANK, Regression
from kvcompose_gguf.scoring.evidence import Evidence
from kvcompose_gguf.support.ranks import rank_correlation

PLACES = np.r_[0:30, 50:90].astype(np.int32)


def repeated(n: int, seed: int = 0) -> Evidence:
    """Returns random evidence whose tokens at ``PLACES`` were repeated."""
    return replace(make_evidence(n, seed), repeated=PLACES)


def attention_to(evidence: Evidence, seed: int = 0) -> list[np.ndarray]:
    """Returns attention that a linear function of the features predicts, up to noise."""
    out = []
    for l in range(len(evidence.layers)):
        rng, table = np.random.default_rng((seed, l)), table_of(evidence, l)
        weights = np.random.default_rng(l).standard_normal(table.shape[2]) / table.std(axis=(0, 1)).clip(1e-2) / 20
        logs = table @ weights + 0.05 * rng.standard_normal(table.shape[:2])
        out.append(np.exp(np.clip(logs - logs.mean() - 5, -11, -0.1)).astype(np.float32))
    return out


#
# the regression
#


def test_the_first_prompt_is_a_ridge_regression_of_its_repeated_tokens() -> None:
    evidence = repeated(100)
    attention = attention_to(evidence)
    known = Learned().taught(evidence, attention)
    assert (known.n_prompts, known.n_tokens, known.agreements) == (1, len(PLACES), ())
    for l, layer in enumerate(known.layers):
        table = table_of(evidence, l)[:, PLACES].astype(np.float64)
        target = target_of(attention[l])[:, PLACES].astype(np.float64)
        for h in range(len(table)):
            scale = np.maximum(table[h].std(axis=0), 1e-3)
            rows = np.c_[(table[h] - table[h].mean(axis=0))[:, :-1] / scale[:-1], np.ones(len(PLACES))]
            penalty = np.diag(np.r_[np.full(rows.shape[1] - 1, 5e-2 * len(PLACES)), 1e-6])
            want = rows @ np.linalg.solve(rows.T @ rows + penalty, rows.T @ target[h])
            got = table[h] @ layer.plain_weights[h].astype(np.float64)
            assert np.abs(got - want).max() < 2e-3


def test_more_prompts_predict_another_one_better_and_the_agreement_says_so() -> None:
    known, agreements = Learned(), []
    for seed in range(4):
        evidence = repeated(100, seed)
        known = known.taught(evidence, attention_to(evidence, seed))
        agreements.append(known.agreements[-1] if known.agreements else 0)
    assert agreements[3] > agreements[1] > 0.3
    assert agreements[3] > 0.7
    assert known.agreements == tuple(agreements[1:])
    test = repeated(100, seed=9)
    predicted = known.predict(test)
    for got, want in zip(predicted, attention_to(test, 9), strict=True):
        assert got.dtype == np.float32
        assert rank_correlation(got, want).mean() > 0.6


def test_the_agreement_is_spearmans_correlation() -> None:
    a = np.array([[1, 5, 3, 2.0], [1, 2, 3, 4]], np.float32)
    b = np.array([[10, 50, 30, 20.0], [4, 3, 2, 1]], np.float32)
    assert rank_correlation(a[:1], b[:1]) == pytest.approx(1)
    assert rank_correlation(a, b) == pytest.approx([1, -1])
    # ranks 0 3 2 1 and 3 2 1 0: covariance -0.25 of 1.25
    assert rank_correlation(a[:1], b[1:]) == pytest.approx(-0.2)


def test_old_prompts_count_less_beyond_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "MEMORY", 100)
    known = Learned()
    for seed in range(4):
        known = known.taught(repeated(100, seed), attention_to(repeated(100, seed)))
    assert known.n_tokens == 100 + len(PLACES)


def test_the_precision_keeps_its_largest_directions_and_its_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 200, 40)) * np.linspace(5, 0.1, 40)
    rows = (rows @ np.linalg.qr(rng.standard_normal((40, 40))).Q).astype(np.float32)
    nothing = np.zeros((2, 40), np.float32)
    empty = Regression(nothing, nothing + 1, nothing, nothing, np.zeros((2, 40, RANK), np.float16))
    moved = empty.moved(rows, rng.standard_normal((2, 200)).astype(np.float32), 0, 1)
    precision = rows.transpose(0, 2, 1) @ rows
    factors = moved.factors.astype(np.float64)
    got = np.square(factors).sum(axis=2) + moved.diagonal
    np.testing.assert_allclose(got, np.einsum("hff->hf", precision), rtol=5e-3)
    largest = np.linalg.eigvalsh(precision)[:, -RANK:].sum()
    assert np.square(factors).sum() > 0.98 * largest


def test_a_model_of_another_shape_is_learnt_anew() -> None:
    evidence = repeated(100)
    known = Learned().taught(evidence, attention_to(evidence))
    other = replace(evidence, layers=evidence.layers[:1], attention=())
    assert not known.fits(other.layers)
    assert known.taught(other, attention_to(other)).n_prompts == 1


def test_what_another_model_of_the_same_name_taught_is_forgotten() -> None:
    evidence = repeated(100)
    attention = attention_to(evidence)
    known = Learned().taught(evidence, attention)
    opposite = [np.exp(-10 - np.log(paid)).clip(0, 1) for paid in attention]
    assert known.taught(evidence, attention).n_prompts == 2
    assert known.taught(evidence, opposite).n_prompts == 1


#
# the file
#


def some() -> Learned:
    evidence = repeated(100)
    return Learned().taught(evidence, attention_to(evidence)).taught(evidence, attention_to(evidence))


def test_a_file_has_everything_and_no_text() -> None:
    known = some()
    again = Learned.from_bytes(known.to_bytes())
    assert (again.n_prompts, again.n_tokens, again.agreements) == (2, 2 * len(PLACES), known.agreements)
    for ours, theirs in zip(known.layers, again.layers, strict=True):
        for name, array in vars(ours).items():
            np.testing.assert_array_equal(array, getattr(theirs, name))


@pytest.mark.parametrize("damage", ["empty", "cut", "version", "nan", "shape", "scale"])
def test_a_damaged_file_is_set_aside_and_learnt_anew(kept: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = some()
    first = known.layers[0]
    changed = {
        "nan": replace(first, weights=first.weights * np.float32(np.nan)),
        "shape": replace(first, weights=first.weights[:, :-1]),
        "scale": replace(first, scale=first.scale * 0),
    }
    known = replace(known, layers=(changed.get(damage, first), *known.layers[1:]))
    with monkeypatch.context() as patch:
        patch.setattr(learned, "VERSION", 99 if damage == "version" else learned.VERSION)
        data = known.to_bytes()
    data = {"empty": b"", "cut": data[: len(data) // 2]}.get(damage, data)
    kept.mkdir(parents=True)
    (kept / "f.npz").write_bytes(data)
    with pytest.warns(UserWarning, match=r"f\.npz .*: the model is learnt anew"):
        assert read_learned("f").n_prompts == 0
    assert (kept / "f.npz").read_bytes() == data, "reading changes nothing: another process may be writing"
    (finding,) = (finding for finding in doctor.examine() if finding.name == "learnt of")
    assert finding.value.startswith("f: ")
    assert "prompts" not in finding.value
    with pytest.warns(UserWarning, match="learnt anew"):
        assert update_learned("f", count).n_prompts == 1
    assert (kept / "f.damaged").read_bytes() == data
    assert read_learned("f").n_prompts == 1


def count(known: Learned) -> Learned:
    return replace(known, n_prompts=known.n_prompts + 1)


def test_what_is_learnt_is_there_for_the_next_process(kept: Path) -> None:
    assert update_learned("f", count).n_prompts == 1
    assert update_learned("f", count).n_prompts == 2
    assert read_learned("f").n_prompts == 2
    assert read_learned("g").n_prompts == 0


def test_with_learning_off_nothing_is_kept_or_used(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update_learned("f", count)
    monkeypatch.setenv("KVCOMPOSE_LEARN", "off")
    assert read_learned("f").n_prompts == 0
    assert update_learned("f", count).n_prompts == 1
    monkeypatch.delenv("KVCOMPOSE_LEARN")
    assert read_learned("f").n_prompts == 1


def test_a_full_disk_loses_only_the_newest_prompt(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update_learned("f", count)

    def full(file: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(learned, "write_file", full)
        with pytest.warns(UserWarning, match="is not kept in .*No space left"):
            assert update_learned("f", count).n_prompts == 2
    assert read_learned("f").n_prompts == 1


def _count_often(cache: str, n: int, done: Any, worker: int) -> None:
    os.environ["XDG_CACHE_HOME"] = cache
    os.environ.pop("KVCOMPOSE_LEARN", None)
    for _ in range(n):
        update_learned("f", count)
        done[worker] += 1


def _hold(cache: str, began: Any) -> None:
    os.environ["XDG_CACHE_HOME"] = cache
    os.environ.pop("KVCOMPOSE_LEARN", None)

    def teach(known: Learned) -> Learned:
        began.set()
        time.sleep(600)  # until it is killed
        return known

    update_learned("f", teach)


def test_processes_take_turns_and_a_killed_one_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("KVCOMPOSE_LEARN")
    fork: Any = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    done = fork.Array("i", 20, lock=False)
    workers = [fork.Process(target=_count_often, args=(str(tmp_path), 5, done, k)) for k in range(20)]
    for worker in workers:
        worker.start()
    for worker in workers[:5]:
        worker.kill()
    for worker in workers:
        worker.join()
    n_prompts = read_learned("f").n_prompts
    assert list(done[5:]) == [5] * 15
    assert sum(done) <= n_prompts <= sum(done) + 5  # a killed one may have kept a prompt that it did not count
    began = fork.Event()
    holder = fork.Process(target=_hold, args=(str(tmp_path), began))
    holder.start()
    assert began.wait(60)
    holder.kill()
    holder.join()
    assert update_learned("f", count).n_prompts == n_prompts + 1
