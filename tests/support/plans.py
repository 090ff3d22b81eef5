"""Random plans, and the specification of KVCompose's plan: steps 4 to 9 of arXiv 2509.05165, as plain loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvcompose_gguf import CompositionPlan, KVCompose
from kvcompose_gguf.plan.geometry import LayerGeometry
from kvcompose_gguf.scoring.evidence import Evidence
from support.rows import ArrayRows

Plan = list[list[list[int]]]  # layer, KV head, tokens
Aggregate = Callable[[Sequence[float]], float]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def random_plan(n_tokens: int, n_kept: Sequence[int], n_head_kv: int = 2, seed: int = 3) -> CompositionPlan:
    """Returns a plan in which each head keeps its own random tokens, ``n_kept`` of them in each layer."""
    rng = np.random.default_rng(seed)
    heads = [[np.sort(rng.choice(n_tokens, n, replace=False)) for _ in range(n_head_kv)] for n in n_kept]
    return CompositionPlan(n_tokens, tuple(np.stack(tokens).astype(np.int32) for tokens in heads))


def specified_plan(
    attention: Sequence[np.ndarray],
    layers: Sequence[LayerGeometry],
    v_norms: Sequence[np.ndarray],
    *,
    compression_ratio: float | None = None,
    n_kept: float | None = None,
    max_kv_bytes: int | None = None,
    agg_group: str = "mean",
    agg_head: str = "mean",
    add_v_norm: bool = False,
    add_mean_across_heads: bool = True,
    keep_token_lower_bound: int = 0,
    first_layer_rule: bool = False,
    n_sink: int = 0,
) -> Plan:
    """Returns the tokens that every head keeps."""
    n_layer, n_tokens = len(layers), attention[0].shape[1]
    aggregates: dict[str, Aggregate] = {"mean": mean, "max": max}

    # the budget of step 8
    if compression_ratio is not None:
        n_total = max(1, int(n_layer * n_tokens * (1 - compression_ratio)))
    elif n_kept is not None:
        n_total = max(1, min(int(n_layer * n_kept), n_layer * n_tokens))
    else:
        assert max_kv_bytes is not None
        n_total = min(max_kv_bytes // max(g.n_bytes_row for g in layers), n_layer * n_tokens)
    n_sink = min(n_sink, n_total // n_layer)

    rankings: Plan = []
    composites: list[list[float]] = []
    for il in range(n_layer):
        n_head_kv = layers[il].n_head_kv
        n_group = layers[il].n_head // n_head_kv
        # step 4: over the query heads of each KV head
        s = [
            [
                aggregates[agg_group]([float(attention[il][h * n_group + g][i]) for g in range(n_group)])
                for i in range(n_tokens)
            ]
            for h in range(n_head_kv)
        ]
        # step 5
        if add_v_norm:
            s = [[s[h][i] * float(v_norms[il][h][i]) for i in range(n_tokens)] for h in range(n_head_kv)]
        if add_mean_across_heads:
            means = [mean([s[h][i] for h in range(n_head_kv)]) for i in range(n_tokens)]
            s = [[s[h][i] + means[i] for i in range(n_tokens)] for h in range(n_head_kv)]
        # forced sinks, as many as the budget allows per layer, come first; then by descending score, then by index
        rankings.append([sorted(range(n_tokens), key=lambda i: (i >= n_sink, -s[h][i], i)) for h in range(n_head_kv)])
        # step 6
        composites.append(
            [aggregates[agg_head]([s[h][rankings[il][h][j]] for h in range(n_head_kv)]) for j in range(n_tokens)]
        )
    if first_layer_rule:
        composites[0] = [max(composites[il][j] for il in range(n_layer)) for j in range(n_tokens)]

    # step 7: the first ranks come before all others
    floor = min(max(keep_token_lower_bound, n_sink), n_tokens, n_total // n_layer)
    # step 8: the largest of all
    everything = [(il, j) for il in range(n_layer) for j in range(n_tokens)]
    winners = sorted(everything, key=lambda place: (place[1] >= floor, -composites[place[0]][place[1]], place))[
        :n_total
    ]
    # step 9: every head's own tokens
    counts = [sum(winner[0] == il for winner in winners) for il in range(n_layer)]
    return [[sorted(order[: counts[il]]) for order in rankings[il]] for il in range(n_layer)]


def plain(**options: Any) -> KVCompose:
    """Returns KVCompose without sinks, as in the paper."""
    return KVCompose(**({"n_sink": 0} | options))


def layer(n_head: int, n_head_kv: int, n_bytes_row: int = 64) -> LayerGeometry:
    return LayerGeometry(0, n_head, n_head_kv, 16, 16, 1, 1, False, n_bytes_row)


def plan_of(
    method: KVCompose,
    attention: Sequence[np.ndarray],
    layers: Sequence[LayerGeometry],
    v_norms: Sequence[np.ndarray] | None = None,
) -> CompositionPlan:
    """Returns the plan for values of one element, with the given norms."""
    rows = None if v_norms is None else ArrayRows(all_values=[norms[:, :, None] for norms in v_norms])
    return method.plan(Evidence(attention[0].shape[-1], layers, attention, rows=rows))


def inputs(kind: str) -> tuple[list[np.ndarray], list[LayerGeometry], list[np.ndarray]]:
    """Three layers of 4 and of 2 KV heads over 23 tokens."""
    rng = np.random.default_rng(5165)
    attention: list[np.ndarray]
    v_norms: list[np.ndarray]
    layers = [layer(8, 4, 64), layer(8, 2, 96), layer(8, 4, 64)]
    n_tokens = 23
    if kind == "continuous":
        powers = (3, 1, 2)  # the first layer is attended least
        attention = [
            rng.random((g.n_head, n_tokens), dtype=np.float32) ** p for p, g in zip(powers, layers, strict=True)
        ]
        v_norms = [rng.random((g.n_head_kv, n_tokens), dtype=np.float32) + 1 for g in layers]
    elif kind == "ties":  # multiples of small powers of two: exact in float32, so ties stay ties
        attention = [rng.integers(0, 4, (g.n_head, n_tokens)).astype(np.float32) / 4 for g in layers]
        v_norms = [rng.integers(1, 4, (g.n_head_kv, n_tokens)).astype(np.float32) / 2 for g in layers]
    else:
        attention = [np.full((g.n_head, n_tokens), 0.5, np.float32) for g in layers]
        v_norms = [np.ones((g.n_head_kv, n_tokens), np.float32) for g in layers]
    return attention, layers, v_norms
