"""Compares the surrogate's regression and figures with plain numpy."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.rows import rows_of
from support.surrogates import assert_ridge, make_evidence, random_weights, table_of, targets_of

from kvcompose_gguf.learning.quality import RATIOS, compare, quality_tables, summary
from kvcompose_gguf.learning.sums import Sums
from kvcompose_gguf.measurements import surrogate
from kvcompose_gguf.measurements.surrogate import Surrogate
from kvcompose_gguf.plan.geometry import LayerGeometry
from kvcompose_gguf.scoring.evidence import Evidence
from kvcompose_gguf.support.ranks import rank_correlation

#
# regression
#


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
        return replace(evidence, rows=replace(rows_of(evidence), all_values=values))

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
