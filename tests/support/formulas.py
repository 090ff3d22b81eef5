"""The methods' formulas, written as plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kvcompose_gguf.methods import Method
from kvcompose_gguf.scoring.evidence import Evidence
from support.evidence import rotate

Scores = list[list[list[float]]]  # layer, KV head, token


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def norm(vector: np.ndarray) -> float:
    return math.sqrt(sum(float(x) ** 2 for x in vector))


def dot(a: np.ndarray, b: np.ndarray) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def grouped(evidence: Evidence, l: int, aggregate: Callable[[list[float]], float], attention: Any) -> list[list[float]]:
    """Returns ``attention[query head][token]`` aggregated over the query heads of every KV head."""
    layer = evidence.layers[l]
    n_group = layer.n_head // layer.n_head_kv
    return [
        [aggregate([float(attention[h * n_group + g][i]) for g in range(n_group)]) for i in range(len(attention[0]))]
        for h in range(layer.n_head_kv)
    ]


def streaming_llm(evidence: Evidence) -> Scores:
    return [[[float(i) for i in range(evidence.n_tokens)]] * layer.n_head_kv for layer in evidence.layers]


def observed_attention(evidence: Evidence) -> Scores:
    return [grouped(evidence, l, mean, evidence.attention[l]) for l in range(len(evidence.layers))]


def kvzip(evidence: Evidence) -> Scores:
    return [grouped(evidence, l, max, evidence.attention[l]) for l in range(len(evidence.layers))]


def tova(evidence: Evidence) -> Scores:
    scores: Scores = []
    for layer, attention in zip(evidence.layers, evidence.attention, strict=True):
        row = [mean([float(head[i]) for head in attention]) for i in range(evidence.n_tokens)]
        for i in range(evidence.n_tokens - evidence.n_window, evidence.n_tokens):
            row[i] = math.inf
        scores.append([row] * layer.n_head_kv)
    return scores


def snapkv(evidence: Evidence, kernel: int = 5, pooling: str = "mean") -> Scores:
    n_before = evidence.n_tokens - evidence.n_window
    scores: Scores = []
    for l, attention in enumerate(evidence.attention):
        pooled = []
        for head in attention:
            row = []
            for i in range(n_before):
                near = [float(head[j]) for j in range(i - kernel // 2, i + kernel // 2 + 1) if 0 <= j < n_before]
                row.append(max(near) if pooling == "max" else sum(near) / kernel)
            pooled.append(row)
        scores.append([row + [math.inf] * evidence.n_window for row in grouped(evidence, l, mean, pooled)])
    return scores


def knorm(evidence: Evidence) -> Scores:
    return [[[-norm(key) for key in head] for head in evidence.keys(l)] for l in range(len(evidence.layers))]


def keydiff(evidence: Evidence) -> Scores:
    scores: Scores = []
    for l in range(len(evidence.layers)):
        scores.append([])
        for head in evidence.keys(l).astype(np.float64):
            directions = [key / max(norm(key), 1e-12) for key in head]
            anchor = np.mean(directions, axis=0)
            scores[l].append([-dot(key, anchor) / max(norm(anchor), 1e-8) for key in directions])
    return scores


def expected_attention(
    evidence: Evidence,
    n_sink: int = 4,
    n_future: int = 512,
    use_covariance: bool = True,
    use_vnorm: bool = True,
    epsilon: float = 0.0,
) -> Scores:
    """Rotates every query to every future position; the moments are those of its mean over these positions."""
    n_tokens = evidence.n_tokens
    scores: Scores = []
    for l, layer in enumerate(evidence.layers):
        states, keys, values = evidence.states(l), evidence.keys(l), evidence.values(l)
        first = n_tokens - states.queries.shape[1]
        attention = []
        for head, queries in enumerate(states.queries):
            sample = []
            for i, query in enumerate(queries):
                if first + i >= n_sink:
                    positions = np.arange(n_tokens, n_tokens + n_future, dtype=np.int32)
                    sample.append(rotate(np.tile(query, (n_future, 1)), positions).astype(np.float64).mean(axis=0))
            logits = []
            for key in keys[head * layer.n_head_kv // layer.n_head][n_sink:].astype(np.float64):
                products = [dot(query, key) for query in sample]
                variance = mean([(x - mean(products)) ** 2 for x in products])
                logits.append(mean(products) + (variance / 2 if use_covariance else 0))
            weights = [math.exp(x - max(logits)) for x in logits]
            attention.append([x / sum(weights) for x in weights])
        scores.append([])
        for h, row in enumerate(grouped(evidence, l, mean, attention)):
            if use_vnorm:
                row = [(x + epsilon) * norm(value) for x, value in zip(row, values[h][n_sink:], strict=True)]
            scores[l].append([math.inf] * min(n_sink, n_tokens) + row)
    return scores


def assert_scores(method: Method, evidence: Evidence, expected: Scores) -> list[np.ndarray]:
    scores = method.scores(evidence)
    for got, rows in zip(scores, expected, strict=True):
        assert got.dtype == np.float32
        assert got.shape == (len(rows), evidence.n_tokens)
        np.testing.assert_array_equal(np.isinf(got), np.isinf(rows))
        difference = np.abs(np.nan_to_num(got, posinf=0) - np.nan_to_num(rows, posinf=0))
        np.testing.assert_allclose(got, rows, 2e-5, 1e-6, err_msg=f"largest difference {difference.max()}")
    return scores


def assert_plan(method: Method, evidence: Evidence, scores: list[np.ndarray], n_kept: list[int]) -> None:
    """Checks that each head keeps its sinks, then its highest scores, lowest index first."""
    plan = method.plan(evidence)
    for cells, rows, n in zip(plan.rows, scores, n_kept, strict=True):
        for kept, row in zip(cells, rows, strict=True):
            order = sorted(range(evidence.n_tokens), key=lambda i: (i >= method.n_sink, -float(row[i]), i))
            assert kept.tolist() == sorted(order[:n])
