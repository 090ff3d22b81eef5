"""The rules that divide a budget among the layers. Each rule is a value, and every method accepts every rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ..errors import ConfigError
from ..kernels import aggregate
from ..kernels.types import FloatArray, IntArray, LongArray
from ..support.checks import check_finite


@dataclass(frozen=True, eq=False)
class Ranked:
    """The scores of all layers, and the order of their rows: the tokens of a full cache, or what is left of them.

    Attributes:
        scores: for each layer float32 ``(n_head_kv, n_rows)``; the layers of a composed cache differ in their rows.
        ranking: for each layer int32 ``(n_head_kv, n_rows)``, each head's rows by descending score, ties by index.
    """

    scores: Sequence[FloatArray]
    ranking: Sequence[IntArray]

    @property
    def n_layer(self) -> int:
        return len(self.scores)

    @property
    def n_rows(self) -> LongArray:
        """Returns the number of rows of each layer, int64 ``(n_layer,)``."""
        return np.array([scores.shape[1] for scores in self.scores], dtype=np.int64)

    @property
    def n_rows_most(self) -> int:
        """Returns the number of rows that the largest layer has."""
        return int(self.n_rows.max())

    def composites(self, agg_head: str) -> FloatArray:
        """Returns the scores of composite tokens (KVCompose step 6).

        Returns:
            float32 ``(n_layer, n_rows_most)``, descending within each layer; minus infinity behind a layer's last row.
        """
        out = np.full((self.n_layer, self.n_rows_most), -np.inf, dtype=np.float32)
        for l, (scores, ranking) in enumerate(zip(self.scores, self.ranking, strict=True)):
            out[l, : scores.shape[1]] = aggregate.composite_scores(scores, ranking, agg_head)
        return out


class Allocation(ABC):
    """A rule that divides a budget among the layers."""

    @abstractmethod
    def n_kept(self, ranked: Ranked, n_total: int, floor: int) -> LongArray:
        """Returns how many tokens each layer keeps: int64 ``(n_layer,)``, each in ``[floor, N]``.

        The sum is ``n_total``, or less if the rule has a threshold.

        Raises:
            ConfigError: no such division exists.
        """


@dataclass(frozen=True)
class Uniform(Allocation):
    """Gives every layer the same budget; the first layers get one token more if the division leaves a remainder."""

    def n_kept(self, ranked: Ranked, n_total: int, floor: int) -> LongArray:
        check_budget(ranked, n_total, floor)
        n_each, n_rest = divmod(n_total, ranked.n_layer)
        return np.array([n_each + (l < n_rest) for l in range(ranked.n_layer)], dtype=np.int64)


@dataclass(frozen=True)
class GlobalRanking(Allocation):
    """Ranks the composite tokens of all layers together (KVCompose, arXiv 2509.05165, steps 6 to 8).

    Attributes:
        agg_head: aggregation over the heads of a composite token, ``"mean"`` or ``"max"``.
        lower_bound: number of first composite ranks in every layer that are kept before all others.
        first_layer_rule: layer 0 gets the highest composite score of all layers at every rank, as in the reference.
        threshold: smallest composite score that is kept beyond the floor; None: as many are kept as the budget buys.
    """

    agg_head: str = "mean"
    lower_bound: int = 0
    first_layer_rule: bool = False
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_finite("threshold", self.threshold)

    def n_kept(self, ranked: Ranked, n_total: int, floor: int) -> LongArray:
        check_budget(ranked, n_total, floor)
        composites, n_rows = ranked.composites(self.agg_head), ranked.n_rows
        if self.first_layer_rule:
            composites[0, : n_rows[0]] = composites.max(axis=0)[: n_rows[0]]
        bound = min(self.lower_bound, int(n_rows.min()), n_total // ranked.n_layer)  # at most what the budget buys
        floor = max(floor, bound)
        if self.threshold is not None:
            n_above = int(np.count_nonzero(composites[:, floor:] >= self.threshold))
            n_total = min(n_total, max(1, floor * ranked.n_layer + n_above))
        return aggregate.allocate_budget(composites, n_total, floor)


def check_budget(ranked: Ranked, n_total: int, floor: int) -> None:
    """Raises ConfigError unless every layer can keep its floor, and the total is at most all rows of all layers."""
    n_rows = ranked.n_rows
    if floor > n_rows.min() or not ranked.n_layer * floor <= n_total <= n_rows.sum():
        sizes = " to ".join(str(n) for n in sorted({int(n_rows.min()), int(n_rows.max())}))
        raise ConfigError(
            f"{n_total} composites cannot be kept: {ranked.n_layer} layers of {sizes} rows, at least {floor} in each"
        )


@dataclass(frozen=True)
class Pyramid(Allocation):
    """Gives the layers budgets that fall linearly with depth (PyramidKV, arXiv 2406.02069).

    Every layer gets its floor and its window. On top of these, with b tokens per layer on average, the last layer gets
    b/beta and the first 2b - b/beta. If that is more than N, the first layer gets all N tokens, and the last layer as
    many as preserve the average. Budgets are rounded down; the first layers with room get one of the tokens left each.

    This is the authors' rule (KVCache-Factory, pyramidkv_utils.py) with one difference: they round the slope down, and
    so spend another total. kvpress (pyramidkv_press.py) counts the window as a part of the slope. It falls back to
    uniform budgets when the last layer would get less than the window, e.g. at ratio 0.75 of 4,096 tokens.

    Attributes:
        window: number of tokens that every layer gets on top of its floor, as far as the budget allows.
        beta: the average budget divided by the last layer's, at least 1; 1: uniform budgets.
    """

    window: int
    beta: float = 20

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ConfigError(f"window={self.window} is negative")
        if not 1 <= self.beta < np.inf:
            raise ConfigError(f"beta={self.beta} is below 1 or not finite")

    def n_kept(self, ranked: Ranked, n_total: int, floor: int) -> LongArray:
        check_budget(ranked, n_total, floor)
        n_layer, n_most = ranked.n_layer, ranked.n_rows_most
        average = Fraction(n_total, n_layer)  # exact, so that the rounding is exact too
        base = min(Fraction(floor + self.window), average)
        rest = average - base
        spread = min(rest - rest / Fraction(self.beta), n_most - average)
        budgets = [average + spread * Fraction(n_layer - 1 - 2 * l, max(1, n_layer - 1)) for l in range(n_layer)]
        n_kept = np.array([int(budget) for budget in budgets], dtype=np.int64)
        n_kept[np.flatnonzero(n_kept < n_most)[: n_total - n_kept.sum()]] += 1
        return n_kept


#: the rules that need no options, by their names for `allocation=`
ALLOCATIONS: dict[str, type[Allocation]] = {"uniform": Uniform, "global": GlobalRanking}


@dataclass(frozen=True)
class ByEvictionError(Allocation):
    """Gives more to layers with a larger error of the attention output at a tiny budget (CompressKV, arXiv 2508.02401).

    With the average budget B a layer gets ``32 + round(error * (B - 32) * n_layer)`` tokens, at least 32 and at most
    3B. If tokens are left, the layers below their maximum get one each, largest error first. If tokens are missing, the
    layers above their minimum lose one each, smallest error first. Both repeat until the total is right. Ties go to the
    lowest layer. This is the authors' rule (pred_compresskv.py). We add bounds where it has no answer: the minimum is
    at most B and at least the floor, and the maximum is at most N.

    Attributes:
        errors: one error per layer, not negative, with sum 1.
        least: number of tokens that every layer gets, if B is at least as many.
        most: the largest budget, as a multiple of B.
    """

    errors: tuple[float, ...]
    least: int = 32
    most: int = 3

    def __post_init__(self) -> None:
        errors = np.asarray(self.errors, dtype=np.float64)
        if errors.ndim != 1 or not (errors >= 0).all() or abs(errors.sum() - 1) > 1e-3:
            raise ConfigError(f"errors={self.errors} must be numbers of at least 0 with sum 1")
        if self.least < 0 or self.most < 1:
            raise ConfigError(f"least={self.least} must be at least 0, most={self.most} at least 1")

    def n_kept(self, ranked: Ranked, n_total: int, floor: int) -> LongArray:
        check_budget(ranked, n_total, floor)
        n_layer, errors = ranked.n_layer, np.asarray(self.errors, dtype=np.float64)
        if len(errors) != n_layer:
            raise ConfigError(f"{len(errors)} errors do not fit a cache of {n_layer} layers")
        low = max(floor, min(self.least, n_total // n_layer))
        high = min(ranked.n_rows_most, -(-self.most * n_total // n_layer))
        wanted = low + np.round(errors * (n_total - low * n_layer))
        n_kept = np.clip(wanted, low, high).astype(np.int64)
        while n_left := int(n_total - n_kept.sum()):
            sign = 1 if n_left > 0 else -1
            room = high - n_kept if n_left > 0 else n_kept - low
            order = np.argsort(-sign * errors, kind="stable")
            able = order[room[order] > 0][: abs(n_left)]
            n_kept[able] += sign * max(1, min(abs(n_left) // len(able), room[able].min()))  # several rounds at once
        return n_kept
