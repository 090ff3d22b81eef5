"""The specification of KVCompose's plan: steps 4 to 9 of the method (arXiv 2509.05165), written as plain loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kvcompose_gguf.plan.geometry import LayerGeometry

Plan = list[list[list[int]]]  # layer, KV head, tokens
Aggregate = Callable[[Sequence[float]], float]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


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
