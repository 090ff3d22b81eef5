"""What the answers of a run say: means with intervals, curves over compression ratios, and where needles are found."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from .metrics import area_under_curve, bootstrap_interval, largest_ratio_within
from .records import FULL, Answer

PASSKEY = "passkey"  # a grid of its own, no part of the mean over tasks

#: (method, ratio) -> answers to the same samples, in the same order
Columns = dict[tuple[str, float], list[Answer]]


@dataclass(frozen=True)
class Mean:
    """A mean of ``n`` samples, and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Cell:
    """One method at one ratio.

    Attributes:
        score, exact, kl, same_top: means of the tasks' means; None unless every sample has one.
        difference: score minus that of the reference at this ratio, paired by sample; None for the reference, the full
            cache, and where the reference has no such ratio.
        tasks: score of each of :attr:`TypeSummary.tasks`.
        n_kept: of every layer, mean over samples; None unless every sample has it.
        n_tokens, kv_bytes: means over samples.
        seconds: as :attr:`Answer.seconds`, median over samples.
    """

    method: str
    ratio: float
    score: Mean
    exact: Mean
    kl: Mean | None
    same_top: Mean | None
    difference: Mean | None
    tasks: tuple[Mean, ...]
    n_kept: tuple[float, ...] | None
    n_tokens: float
    kv_bytes: float
    seconds: float


@dataclass(frozen=True)
class Curve:
    """Score of a method against the ratio, from the full cache's at 0 on.

    Attributes:
        area: under it, divided by the largest ratio; ``difference``: to that of a reference with the same ratios.
        within_10, within_20: largest ratio with a loss of at most 10 and 20 %; nan if there is nothing to lose.
    """

    method: str
    area: Mean
    difference: Mean | None
    within_10: float
    within_20: float


@dataclass(frozen=True)
class Passkey:
    """Needles that one method finds at one ratio: the mean over depths, and the mean at every depth."""

    method: str
    ratio: float
    score: Mean
    depths: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class TypeSummary:
    """One type of cache.

    Attributes:
        tasks: those of the means, sorted.
        n_samples: that the means are of.
        n_incomplete: samples left out because they lack a method or ratio that others have.
        cells: the full cache first, then methods in their order, ratios ascending.
        curves: the largest area first.
        passkey: in the order of the cells.
    """

    type_kv: str
    tasks: tuple[str, ...]
    n_samples: int
    n_incomplete: int
    cells: tuple[Cell, ...]
    curves: tuple[Curve, ...]
    passkey: tuple[Passkey, ...]

    @property
    def ratios(self) -> list[float]:
        """Those of all methods, ascending, without 0."""
        return sorted({cell.ratio for cell in self.cells} - {0})

    def at(self, ratio: float) -> list[Cell]:
        """The full cache, then the methods at ``ratio``, the largest area first."""
        order = [FULL, *(curve.method for curve in self.curves)]
        return sorted((c for c in self.cells if c.ratio in (0, ratio)), key=lambda cell: order.index(cell.method))


@dataclass(frozen=True)
class Summary:
    """All numbers of a report.

    Attributes:
        reference: the method that others are compared with, None without methods.
        not_done: (task, the full cache's score) of tasks left out: below ``min_full`` with every type of cache.
    """

    reference: str | None
    min_full: float
    not_done: tuple[tuple[str, float], ...]
    types: tuple[TypeSummary, ...]

    def to_json(self) -> dict[str, Any]:
        """Only what JSON has: lists for tuples, and None for what is not finite."""
        return dict(json.loads(json.dumps(asdict(self)), parse_constant=lambda name: None))


def summarise(answers: Sequence[Answer], reference: str | None = None, min_full: float = 0.1) -> Summary:
    """Means over the samples that have an answer of every method and ratio, for each type of cache.

    The bootstrap draws samples within their tasks (the tasks are given, they are no sample of tasks), the same ones for
    every method and ratio. Passkey samples are complete or not among themselves.

    Args:
        reference: the method that others are compared with, by default the first in ``answers``.
        min_full: least score of the full cache for a task to count.
    Raises:
        ConfigError: ``reference`` has no answers, or the full cache of a type has none.
    """
    methods = [method for method in dict.fromkeys(answer.method for answer in answers) if method != FULL]
    if reference is not None and reference not in methods:
        raise ConfigError(f"reference={reference!r} is not one of {', '.join(methods)}")
    reference = reference or next(iter(methods), None)
    parts: dict[str, tuple[Columns, Columns, int]] = {}
    best: dict[str, float] = {}  # the full cache's scores
    for type_kv in dict.fromkeys(answer.type_kv for answer in answers):
        of_type = [answer for answer in answers if answer.type_kv == type_kv]
        columns, n_left = _complete([answer for answer in of_type if answer.task != PASSKEY], methods)
        needles, n_left_needles = _complete([a for a in of_type if a.task == PASSKEY and a.depth is not None], methods)
        parts[type_kv] = columns, needles, n_left + n_left_needles
        full = columns.get((FULL, 0), [])
        for task, scores in _grouped([a.score for a in full], [a.task for a in full]).items():
            best[task] = max(best.get(task, 0.0), statistics.fmean(scores))
    not_done = {task: best[task] for task in sorted(best) if best[task] < min_full}
    types = []
    for type_kv, (columns, needles, n_incomplete) in parts.items():
        columns = {c: [answer for answer in column if answer.task not in not_done] for c, column in columns.items()}
        tasks = [answer.task for answer in columns.get((FULL, 0), [])]
        cells, curves = (_cells(columns, tasks, reference), _curves(columns, tasks, reference)) if tasks else ((), ())
        found = _passkey(needles)
        types.append(TypeSummary(type_kv, tuple(dict.fromkeys(tasks)), len(tasks), n_incomplete, cells, curves, found))
    return Summary(reference, min_full, tuple(not_done.items()), tuple(types))


def _complete(answers: Sequence[Answer], methods: Sequence[str]) -> tuple[Columns, int]:
    """Columns of the samples that are in all of them, the full cache's first, and the number of other samples."""
    rows: dict[tuple[str, int], dict[tuple[str, float], Answer]] = {}
    for answer in answers:
        rows.setdefault((answer.task, answer.index), {})[answer.method, answer.ratio] = answer
    found = {column for row in rows.values() for column in row}
    if found and (FULL, 0) not in found:
        raise ConfigError(f"type_kv={answers[0].type_kv!r} has no answers of the {FULL} cache")
    whole = [rows[key] for key in sorted(rows) if len(rows[key]) == len(found)]
    columns = sorted(found, key=lambda column: ([FULL, *methods].index(column[0]), column[1])) if whole else []
    return {column: [row[column] for row in whole] for column in columns}, len(rows) - len(whole)


def _cells(columns: Columns, tasks: Sequence[str], reference: str | None) -> tuple[Cell, ...]:
    cells = []
    for (method, ratio), answers in columns.items():
        scores = [answer.score for answer in answers]
        by_task = _grouped(scores, tasks).values()
        others = columns.get((reference or FULL, ratio)) if method not in (FULL, reference) else None
        kept = [answer.n_kept for answer in answers if answer.n_kept is not None]
        cells.append(
            Cell(
                method,
                ratio,
                score=_mean(scores, tasks),
                exact=_mean([answer.exact for answer in answers], tasks),
                kl=_mean_of_all([answer.kl for answer in answers], tasks),
                same_top=_mean_of_all([answer.same_top for answer in answers], tasks),
                difference=_mean(np.subtract(scores, [answer.score for answer in others]), tasks) if others else None,
                tasks=tuple(Mean(statistics.fmean(part), *bootstrap_interval(part), len(part)) for part in by_task),
                n_kept=tuple(np.mean(kept, axis=0).tolist()) if len(kept) == len(answers) else None,
                n_tokens=statistics.fmean(answer.n_tokens for answer in answers),
                kv_bytes=statistics.fmean(answer.kv_bytes for answer in answers),
                seconds=statistics.median(answer.seconds for answer in answers),
            )
        )
    return tuple(cells)


def _curves(columns: Columns, tasks: Sequence[str], reference: str | None) -> tuple[Curve, ...]:
    ratios: dict[str, list[float]] = {}
    for method, ratio in columns:
        if method != FULL:
            ratios.setdefault(method, [0.0]).append(ratio)
    curves, areas = [], {}
    for m in sorted(ratios, key=lambda m: m != reference):
        scores = np.array([[a.score for a in columns[m if ratio else FULL, ratio]] for ratio in ratios[m]])
        # linear in the scores: the area under the mean curve is the mean of the samples' areas
        areas[m] = np.array([area_under_curve(ratios[m], sample) for sample in scores.T])
        means = [_mean(column, tasks).value for column in scores]
        within = [largest_ratio_within(ratios[m], means, loss) for loss in (0.1, 0.2)]
        compared = reference if m != reference and ratios[m] == ratios.get(reference or m) else None
        difference = _mean(areas[m] - areas[compared], tasks) if compared else None
        curves.append(Curve(m, _mean(areas[m], tasks), difference, *within))
    return tuple(sorted(curves, key=lambda curve: -curve.area.value))


def _passkey(columns: Columns) -> tuple[Passkey, ...]:
    depths = [f"{answer.depth:.2f}" for answer in columns.get((FULL, 0), [])]
    found = []
    for (method, ratio), answers in columns.items():
        scores = [answer.score for answer in answers]
        means = {float(depth): statistics.fmean(part) for depth, part in _grouped(scores, depths).items()}
        found.append(Passkey(method, ratio, _mean(scores, depths), tuple(means), tuple(means.values())))
    return tuple(found)


def _grouped(values: Sequence[float], strata: Sequence[str]) -> dict[str, list[float]]:
    """The values of every stratum, strata sorted."""
    groups: dict[str, list[float]] = {stratum: [] for stratum in sorted(set(strata))}
    for value, stratum in zip(values, strata, strict=True):
        groups[stratum].append(value)
    return groups


def _mean(values: Sequence[float] | NDArray[np.float64], strata: Sequence[str]) -> Mean:
    """The mean of the strata's means, with the interval of a bootstrap within them."""
    array = np.asarray(values, np.float64)
    value = statistics.fmean(map(statistics.fmean, _grouped(array.tolist(), strata).values()))
    return Mean(value, *bootstrap_interval(array, strata), array.size)


def _mean_of_all(values: Sequence[float | None], strata: Sequence[str]) -> Mean | None:
    there = [value for value in values if value is not None]
    return _mean(there, strata) if len(there) == len(values) else None
