"""Compares the figures of a prediction's quality with plain numpy."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kvcompose_gguf.learning.quality import RATIOS, compare, quality_tables, summary
from kvcompose_gguf.plan.geometry import LayerGeometry
from kvcompose_gguf.scoring.evidence import Evidence
from kvcompose_gguf.support.ranks import rank_correlation


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
