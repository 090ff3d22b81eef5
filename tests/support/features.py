"""The specification of features and predictions, written as plain loops; random evidence and weights."""

from __future__ import annotations

import math

import numpy as np

from kvcompose_gguf.plan.geometry import LayerGeometry
from kvcompose_gguf.scoring.evidence import Evidence
from support.rows import ArrayRows


def rotated(rows: np.ndarray, positions: np.ndarray, freqs: np.ndarray, neox: bool, scale: float = 1) -> np.ndarray:
    """Applies RoPE to ``rows`` (n, ..., d): the first ``2 * len(freqs)`` elements are pairs, rotated as complex numbers."""
    n_rot, out = 2 * len(freqs), rows.astype(np.float64)
    half = n_rot // 2
    a, b = (np.s_[..., :half], np.s_[..., half:n_rot]) if neox else (np.s_[..., 0:n_rot:2], np.s_[..., 1:n_rot:2])
    angles = (positions[:, None] * freqs).reshape(len(rows), *[1] * (rows.ndim - 2), half)
    turned = (rows[a] + 1j * rows[b]) * scale * np.exp(1j * angles)
    out[a], out[b] = turned.real, turned.imag
    return out


def specified_features(plain: np.ndarray, at_end: np.ndarray, values: np.ndarray) -> np.ndarray:
    """float64 (n_head_kv, N, n_features) of keys before their rotation, those rotated by i - N, and values."""
    n_tokens = plain.shape[1]
    heads = []
    for h in range(len(plain)):
        rows = []
        for i in range(n_tokens):
            key, value = plain[h, i].tolist(), values[h, i].tolist()
            key_norm, value_norm = (math.sqrt(sum(x * x for x in vector)) for vector in (key, value))
            left, part = n_tokens - i, i / n_tokens
            rows.append(
                [
                    *key, *at_end[h, i].tolist(), *(x * x for x in key), *value, *(x * x for x in value),
                    key_norm, value_norm, math.log(value_norm + 1e-6),
                    part, part**2, part**3, math.exp(-i / 8), math.exp(-i / 2), math.log(1 + i),
                    math.log(left), math.log(left) ** 2, math.exp(-left / 16), math.exp(-left / 128), float(i == 0), 1,
                ]
            )  # fmt: skip
        heads.append(rows)
    return np.array(heads, dtype=np.float64)


def specified_prediction(table: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64 (n_head_kv, N)."""
    logs = [[float(row @ w) for row in rows] for rows, w in zip(table, weights.astype(np.float64), strict=True)]
    return np.array([[max(0, math.exp(min(max(x, math.log(1e-5)), 0)) - 1e-5) for x in head] for head in logs])


FREQS = np.array([1.0, 0.01])


def make_evidence(n_tokens: int, seed: int = 0) -> Evidence:
    """Returns random evidence with two different layers; keys have RoPE in halves on their first four elements."""
    rng = np.random.default_rng((seed, n_tokens))
    layers = [LayerGeometry(0, 4, 2, 6, 4, 1, 1, False, 64), LayerGeometry(3, 6, 3, 5, 8, 1, 1, False, 64)]

    def array(n_head: int, *shape: int) -> np.ndarray:
        return rng.standard_normal((n_head, n_tokens, *shape)).astype(np.float32)

    keys, values = [array(g.n_head_kv, g.n_embd_head_k) for g in layers], [array(g.n_head_kv, g.n_embd_head_v) for g in layers]  # fmt: skip
    attention = [np.exp(array(g.n_head) - 4) for g in layers]

    def unrotate(rows: np.ndarray, pos: np.ndarray) -> np.ndarray:
        return rotated(rows, -pos, FREQS, True).astype(np.float32)

    return Evidence(n_tokens, layers, attention, rows=ArrayRows(keys, values, turn_back=unrotate))


def table_of(evidence: Evidence, l: int) -> np.ndarray:
    """Returns the specified features of a layer of ``make_evidence``."""
    keys, positions = evidence.keys(l), np.arange(evidence.n_tokens)
    plain, at_end = (np.stack([rotated(k, -by, FREQS, True) for k in keys]) for by in (positions, evidence.n_tokens + 0 * positions))  # fmt: skip
    return specified_features(plain, at_end, evidence.values(l))


def random_weights(evidence: Evidence, size: float, seed: int = 1) -> tuple[np.ndarray, ...]:
    """Returns float32 (n_head_kv, n_features) for each layer, which give predictions of around exp(-4)."""
    rng = np.random.default_rng(seed)
    shapes = [(g.n_head_kv, 3 * g.n_embd_head_k + 2 * g.n_embd_head_v + 15) for g in evidence.layers]
    weights = [size * rng.standard_normal(shape) / np.sqrt(shape[1]) for shape in shapes]
    for w in weights:
        w[:, -1] -= 4
    return tuple(w.astype(np.float32) for w in weights)


def targets_of(evidence: Evidence, l: int) -> np.ndarray:
    """Returns float64 (n_head_kv, N): the logarithm of the mean over every group."""
    attention = evidence.attention[l].astype(np.float64)
    return np.log(attention.reshape(evidence.layers[l].n_head_kv, -1, evidence.n_tokens).mean(axis=1) + 1e-5)
