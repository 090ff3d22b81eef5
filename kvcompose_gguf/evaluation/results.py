"""Summarises the answers of a run: means with intervals, curves over compression ratios, and needles by depth."""

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

PASSKEY = "passkey"  # has its own grid and is not part of the mean over tasks

#: (method, ratio) -> answers to the same samples, in the same order
Columns = dict[tuple[str, float], list[Answer]]


@dataclass(frozen=True)
class Mean:
    """The mean of ``n`` samples, and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Cell:
    """One method at one ratio.

    Attributes:
        score, exact, alike, kl, same_top: means of the tasks' means; None if a sample lacks the value.
        difference: score minus the reference's score at this ratio, paired by sample; None for the reference, for the
            full cache, and if the reference was not run at this ratio.
        tasks: score for each of :attr:`TypeSummary.tasks`.
        n_kept: composites kept in every layer, mean over samples; None if a sample lacks it.
        n_tokens, kv_bytes: means over samples.
        seconds: median over samples of :attr:`Answer.seconds`.
    """

    method: str
    ratio: float
    score: Mean
    exact: Mean
    alike: Mean | None
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
    """A method's score against the ratio, starting with the full cache at ratio 0.

    Attributes:
        area: area under the curve, divided by the largest ratio.
        difference: ``area`` minus the area of the reference, if both have the same ratios.
        within_10, within_20: largest ratio with a loss of at most 10 and 20 %; nan if the full cache scores 0.
    """

    method: str
    area: Mean
    difference: Mean | None
    within_10: float
    within_20: float


@dataclass(frozen=True)
class Passkey:
    """Share of needles that one method finds at one ratio: the mean over depths, and the mean at every depth."""

    method: str
    ratio: float
    score: Mean
    depths: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class TypeSummary:
    """Results with one cache type.

    Attributes:
        tasks: the tasks in the means, sorted.
        n_samples: number of samples in the means.
        n_incomplete: samples left out because they lack a method or ratio that others have.
        cells: the full cache first, then the methods in run order, with ascending ratios.
        curves: sorted by area, largest first.
        passkey: in the order of ``cells``.
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
        """Returns the ratios of all methods, ascending, without 0."""
        return sorted({cell.ratio for cell in self.cells} - {0})

    def at(self, ratio: float) -> list[Cell]:
        """Returns the full cache's cell, then the methods' cells at ``ratio``, sorted by area, largest first."""
        order = [FULL, *(curve.method for curve in self.curves)]
        return sorted((c for c in self.cells if c.ratio in (0, ratio)), key=lambda cell: order.index(cell.method))


@dataclass(frozen=True)
class Summary:
    """All numbers of a report.

    Attributes:
        reference: the method that others are compared with; None without methods.
        not_done: (task, the full cache's score) of the tasks left out: they score below ``min_full`` with every
            cache type.
    """

    reference: str | None
    min_full: float
    not_done: tuple[tuple[str, float], ...]
    types: tuple[TypeSummary, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns values that JSON supports: lists instead of tuples, and None instead of nan and infinity."""
        return dict(json.loads(json.dumps(asdict(self)), parse_constant=lambda name: None))


def summarise(answers: Sequence[Answer], reference: str | None = None, min_full: float = 0.1) -> Summary:
    """Returns means for each cache type, over the samples that have an answer for every method and ratio.

    The bootstrap draws samples within their task, because the tasks are fixed and not sampled. It uses the same draws
    for every method and ratio. Passkey samples are checked for completeness separately.

    Args:
        reference: the method that others are compared with; the default is the first in ``answers``.
        min_full: a task counts only if the full cache scores at least this.
    Raises:
        ConfigError: ``reference`` has no answers, or a cache type has no answers of the full cache.
    """
    methods = [method for method in dict.fromkeys(answer.method for answer in answers) if method != FULL]
    if reference is not None and reference not in methods:
        raise ConfigError(f"reference={reference!r} is not one of {', '.join(methods)}")
    reference = reference or next(iter(methods), None)
    parts: dict[str, tuple[Columns, Columns, int]] = {}
    best: dict[str, float] = {}  # the full cache's scores by task
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
    """Returns the columns of the complete samples, the full cache's first, and the number of incomplete samples."""
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
                alike=_mean_of_all([answer.alike for answer in answers], tasks),
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
        # the area is linear in the scores, so the area under the mean curve is the mean of the samples' areas
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
    """Groups the values by stratum; the strata are sorted."""
    groups: dict[str, list[float]] = {stratum: [] for stratum in sorted(set(strata))}
    for value, stratum in zip(values, strata, strict=True):
        groups[stratum].append(value)
    return groups


def _mean(values: Sequence[float] | NDArray[np.float64], strata: Sequence[str]) -> Mean:
    """Returns the mean of the strata's means, with a bootstrap interval from draws within the strata."""
    array = np.asarray(values, np.float64)
    value = statistics.fmean(map(statistics.fmean, _grouped(array.tolist(), strata).values()))
    return Mean(value, *bootstrap_interval(array, strata), array.size)


def _mean_of_all(values: Sequence[float | None], strata: Sequence[str]) -> Mean | None:
    there = [value for value in values if value is not None]
    return _mean(there, strata) if len(there) == len(values) else None
