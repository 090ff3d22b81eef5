"""Compares predicted attention with the repeat's, for each layer and in the resulting plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from ..kernels import aggregate
from ..kernels.types import FloatArray
from ..methods.kvcompose import KVCompose
from ..plan.composition import CompositionPlan
from ..scoring.evidence import Evidence
from ..support.ranks import rank_correlation

#: the fractions removed that are compared
RATIOS = (0.5, 0.75, 0.9)


def compare(
    predicted: Sequence[FloatArray],
    repeated: Sequence[FloatArray],
    evidence: Evidence,
    ratios: Sequence[float] = RATIOS,
) -> dict[str, Any]:
    """Returns the figures of one passage, for attention float32 ``(n_head_kv, N)`` of each layer.

    Args:
        ratios: the fractions removed that are compared.
    Returns:
        rank: for each layer Spearman's correlation over tokens, mean over KV heads.
        overlap: for each layer and ratio, the share of a head's tokens that both keep if every layer keeps the same
            number; mean over KV heads.
        kept: for each ratio, the share of all kept tokens that the repeat's plan also keeps, in KVCompose's plans.
        attention: for each ratio, the repeat's attention to the kept tokens, relative to its attention to its own
            choice.
        budgets: for each ratio, the correlation of the layers' ``n_kept``.
    """
    rank, overlap = [], []
    for p, r in zip(predicted, repeated, strict=True):
        heads = list(zip(p, r, strict=True))
        rank.append(float(rank_correlation(p, r).mean()))
        overlap.append([float(np.mean([_overlap(a, b, ratio) for a, b in heads])) for ratio in RATIOS])
    wanted_scores = [aggregate.add_mean_across_heads(attention) for attention in repeated]
    given_scores = [aggregate.add_mean_across_heads(attention) for attention in predicted]
    kept, attention, budgets = [], [], []
    for ratio in ratios:
        method = KVCompose(compression_ratio=ratio, n_sink=0)  # without sinks, which would agree in any case
        wanted, given = method.plan(evidence, wanted_scores), method.plan(evidence, given_scores)
        kept.append(_n_common(given, wanted) / max(1, _n_common(wanted, wanted)))
        attention.append(_sum_kept(given, wanted_scores) / _sum_kept(wanted, wanted_scores))
        budgets.append(_correlation(given.n_kept, wanted.n_kept))
    return {"rank": rank, "overlap": overlap, "kept": kept, "attention": attention, "budgets": budgets}


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns means over passages, each with the figures of ``compare`` and a ``kind``; rounded for a file."""
    names = ("rank", "overlap", "kept", "attention", "budgets")
    means = {name: np.mean([result[name] for result in results], axis=0).round(4).tolist() for name in names}
    by_kind: dict[str, list[float]] = {}
    for result in results:
        by_kind.setdefault(result["kind"], []).append(float(np.mean(result["rank"])))
    kinds = {kind: round(float(np.mean(ranks)), 4) for kind, ranks in sorted(by_kind.items())}
    return {"n_passages": len(results), "ratios": list(RATIOS), **means, "rank_by_kind": kinds}


def quality_tables(quality: dict[str, Any]) -> list[Table]:
    """Returns the figures of ``summary`` as tables: by layer, for whole plans, and by kind of text."""
    removed = [f"{ratio:.0%} removed" for ratio in quality["ratios"]]
    layers = Table("layer", "rank correlation", *(f"same tokens, {text}" for text in removed), box=None)
    for l, (rank, overlap) in enumerate(zip(quality["rank"], quality["overlap"], strict=True)):
        layers.add_row(str(l), f"{rank:.2f}", *(f"{share:.0%}" for share in overlap))
    plans = Table("whole plan", "same tokens as the repeat", "attention lost to it", "budgets' correlation", box=None)
    for text, kept, attention, budgets in zip(
        removed, quality["kept"], quality["attention"], quality["budgets"], strict=True
    ):
        plans.add_row(text, f"{kept:.0%}", f"{1 - attention:.1%}", f"{budgets:.2f}")
    kinds = Table("held-out text", "rank correlation", box=None)
    for kind, rank in quality["rank_by_kind"].items():
        kinds.add_row(kind, f"{rank:.2f}")
    return [layers, plans, kinds]


def _overlap(a: FloatArray, b: FloatArray, ratio: float) -> float:
    n_kept = max(1, round(len(a) * (1 - ratio)))
    best_a, best_b = (np.argsort(-values, kind="stable")[:n_kept] for values in (a, b))
    return len(np.intersect1d(best_a, best_b, assume_unique=True)) / n_kept


def _n_common(a: CompositionPlan, b: CompositionPlan) -> int:
    """Returns how many tokens the same head keeps in both plans."""
    n_common = 0
    for cells_a, cells_b in zip(a.rows, b.rows, strict=True):
        for head_a, head_b in zip(cells_a, cells_b, strict=True):
            n_common += len(np.intersect1d(head_a, head_b, assume_unique=True))
    return n_common


def _sum_kept(plan: CompositionPlan, scores: Sequence[FloatArray]) -> float:
    kept = [np.take_along_axis(s, cells.astype(np.int64), axis=1) for s, cells in zip(scores, plan.rows, strict=True)]
    return float(sum(values.sum(dtype=np.float64) for values in kept))


def _correlation(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Returns Pearson's correlation; for constants 1 if both are constant, else 0."""
    if a.std() == 0 or b.std() == 0:
        return float(a.std() == b.std())
    return float(np.corrcoef(a, b)[0, 1])
