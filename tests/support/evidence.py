"""Random evidence for methods."""

from __future__ import annotations

import numpy as np

from kvcompose_gguf.plan.geometry import LayerGeometry
from kvcompose_gguf.scoring.evidence import Evidence
from support.rows import ArrayRows

N_EMBD_K, N_EMBD_V = 6, 4
#: query heads and KV heads of every layer
MODELS = {
    "one head": [(1, 1)],
    "MHA": [(4, 4), (4, 4)],
    "GQA": [(8, 2), (8, 2)],
    "MQA": [(4, 1), (4, 1)],
    "layers that differ": [(8, 4), (6, 2), (3, 1)],
}


def rotate(rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Applies RoPE to the first four elements in pairs (0, 2) and (1, 3), with an attention factor as in YaRN."""
    assert rows.dtype == np.float32
    assert rows.shape == (len(positions), N_EMBD_K)
    angles = positions[:, None] * np.array([1.0, 0.01])
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = rows[:, :2], rows[:, 2:4]
    return 1.1 * np.concatenate([a * cos - b * sin, a * sin + b * cos, rows[:, 4:]], axis=1).astype(np.float32)


def make_evidence(
    model: str = "GQA", n_tokens: int = 23, kind: str = "continuous", n_window: int = 0, n_queries: int = 512
) -> Evidence:
    """Returns random evidence; ``"ties"`` has repeated values everywhere, ``"all equal"`` only one value."""
    rng = np.random.default_rng((len(model), n_tokens))
    layers = [
        LayerGeometry(il, n_head, n_head_kv, N_EMBD_K, N_EMBD_V, 1, 1, False, 64)
        for il, (n_head, n_head_kv) in enumerate(MODELS[model])
    ]

    def array(*shape: int, negative: bool = True) -> np.ndarray:
        if kind == "continuous":
            return (rng.standard_normal(shape) if negative else rng.random(shape)).astype(np.float32)
        if kind == "ties":
            return (rng.integers(-2 if negative else 0, 3, shape) / 4).astype(np.float32)
        return np.full(shape, 0.5, np.float32)

    attention = [array(g.n_head, n_tokens, negative=False) for g in layers]
    keys = [array(g.n_head_kv, n_tokens, N_EMBD_K) for g in layers]
    values = [array(g.n_head_kv, n_tokens, N_EMBD_V) for g in layers]
    queries = [array(g.n_head, min(n_queries, n_tokens), N_EMBD_K) * np.float32(0.4) for g in layers]
    return Evidence(
        n_tokens, layers, attention, n_window, ArrayRows(keys, values, rotate), queries
    )  # fmt: skip
