"""Draws pictures of a summary. Needs matplotlib (the extra ``plot``), on first use."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..support.plots import COLORS, MARKERS, check_plot
from .records import FULL
from .results import Cell, Summary, TypeSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BANDS = 6  # more interval bands cannot be told apart
_MOST_TEXTS = 60  # more numbers in a heat map cannot be read


def draw(summary: Summary, folder: Path) -> list[str]:
    """Draws the pictures that the summary has numbers for into ``folder``; returns their file names.

    ``curves.svg``: score against ratio; with more than six methods only the first one's intervals are drawn.
    ``bytes.svg``: score against the bytes of the kept rows, all methods and cache types together.
    ``budgets.svg``: share of the tokens that every layer keeps, at the middle ratio, with the first cache type.
    ``passkey.svg``: share of needles found, by depth and ratio.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_plot(folder / "curves.svg")
    from matplotlib.figure import Figure

    with_curves = [part for part in summary.types if part.curves]
    with_budgets = [part for part in with_curves if any(cell.n_kept for cell in part.cells if cell.method != FULL)]
    with_passkey = [part for part in summary.types if part.passkey]
    drawn = []
    for name, function, parts in (
        ("curves.svg", _draw_curves, with_curves),
        ("bytes.svg", _draw_bytes, with_curves),
        ("budgets.svg", _draw_budgets, with_budgets),
        ("passkey.svg", _draw_passkey, with_passkey),
    ):
        if parts:
            figure = Figure(layout="constrained")
            function(figure, parts)
            figure.savefig(folder / name, metadata={"Date": None})
            drawn.append(name)
    return drawn


def _draw_curves(figure: Figure, parts: Sequence[TypeSummary]) -> None:
    figure.set_size_inches(3 + 5.5 * len(parts), 5.5)
    styles = _styles(parts)
    panels = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    for axes, part in zip(panels, parts, strict=True):
        for method in [curve.method for curve in part.curves]:
            cells = [cell for cell in part.cells if cell.method in (FULL, method)]
            x = [100 * cell.ratio for cell in cells]
            axes.plot(x, [100 * cell.score.value for cell in cells], label=method, markersize=5, **styles[method])
            if len(styles) <= _MOST_BANDS or method == next(iter(styles)):
                low, high = [100 * cell.score.low for cell in cells], [100 * cell.score.high for cell in cells]
                axes.fill_between(x, low, high, color=styles[method]["color"], alpha=0.12, linewidth=0)
        axes.set(title=f"{part.type_kv} cache, {part.n_samples} samples", xlabel="% of the KV entries removed")
        _clean(axes)
    panels[0].set(ylabel="score x 100, mean over tasks; bands: 95 % intervals", ylim=(0, None))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)


def _draw_bytes(figure: Figure, parts: Sequence[TypeSummary]) -> None:
    figure.set_size_inches(9, 5.5)
    axes, styles = figure.subplots(), _styles(parts)
    fillings = ("full", "none", "left")
    for part, filling in zip(parts, itertools.cycle(fillings), strict=False):
        for method in [curve.method for curve in part.curves]:
            cells = [cell for cell in part.cells if cell.method in (FULL, method)]
            label = f"{method}, {part.type_kv}" if len(parts) > 1 else method
            axes.plot(*_bytes_and_scores(cells), label=label, markersize=6, fillstyle=filling, **styles[method])
        axes.plot(*_bytes_and_scores(part.cells[:1]), label=f"full cache, {part.type_kv}", marker="*", markersize=14,
                  fillstyle=filling, color="k", linestyle="none")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel="megabytes of keys and values, mean over samples", ylabel="score x 100, mean over tasks", ylim=(0, None)
    )
    _clean(axes)
    figure.legend(loc="outside right upper", frameon=False)


def _bytes_and_scores(cells: Sequence[Cell]) -> tuple[list[float], list[float]]:
    return [cell.kv_bytes / 1e6 for cell in cells], [100 * cell.score.value for cell in cells]


def _draw_budgets(figure: Figure, parts: Sequence[TypeSummary]) -> None:
    part, styles = parts[0], _styles(parts)
    ratio = part.ratios[len(part.ratios) // 2]
    figure.set_size_inches(10, 4.5)
    axes = figure.subplots()
    equal = []
    for cell in part.at(ratio)[1:]:
        share = [100 * n / cell.n_tokens for n in cell.n_kept or ()]
        if share and max(share) - min(share) < 1:
            equal.append(share)
        elif share:
            axes.plot(share, label=cell.method, markersize=4, **styles[cell.method])
    if equal:
        label = f"the same in every layer ({len(equal)})"
        axes.plot(np.mean(equal, axis=0), label=label, color="0.7", linewidth=4, zorder=1)
    axes.set(title=f"{100 * ratio:g} % removed", xlabel="layer", ylabel="% of the tokens kept", ylim=(0, None))
    axes.locator_params("x", integer=True)
    _clean(axes)
    figure.legend(loc="outside right upper", frameon=False)


def _draw_passkey(figure: Figure, parts: Sequence[TypeSummary]) -> None:
    grids = {title: grid for part in parts for title, grid in _grids(part, len(parts) > 1).items()}
    n_columns = min(4, len(grids))
    n_rows = -(-len(grids) // n_columns)
    figure.set_size_inches(1.5 + 2.8 * n_columns, 0.5 + 2.8 * n_rows)
    same_ratios = len({tuple(ratios) for ratios, _, _ in grids.values()}) == 1
    panels = figure.subplots(n_rows, n_columns, squeeze=False, sharex=same_ratios, sharey=True).ravel()
    for axes in panels[len(grids) :]:
        axes.set_visible(False)
    for axes, (title, (ratios, depths, scores)) in zip(panels, grids.items(), strict=False):
        image = axes.imshow(scores, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(ratios)), [f"{100 * ratio:g}" for ratio in ratios])
        shown = range(0, len(depths), -(-len(depths) // 6))
        axes.set_yticks(shown, [f"{100 * depths[i]:g}" for i in shown])
        for (y, x), score in np.ndenumerate(scores if scores.size <= _MOST_TEXTS else np.empty((0, 0))):
            axes.text(
                x, y, f"{100 * score:.0f}", ha="center", va="center", fontsize=8, color="k" if score > 0.6 else "w"
            )
    figure.supxlabel("% of the KV entries removed", fontsize=10)
    figure.supylabel("depth of the needle, %", fontsize=10)
    figure.colorbar(image, ax=panels, label="share of needles found", shrink=min(0.8, 2 / n_rows))


def _grids(part: TypeSummary, name_type: bool) -> dict[str, tuple[list[float], list[float], Any]]:
    """Returns ratios, depths and scores ``(n_depths, n_ratios)`` of a method by title; ratio 0 is the full cache."""
    grids = {}
    methods = dict.fromkeys(found.method for found in part.passkey if found.method != FULL)
    for method in methods or [FULL]:
        mine = [found for found in part.passkey if found.method in (FULL, method)]
        scores = np.array([found.scores for found in mine]).T
        title = f"{method}, {part.type_kv}" if name_type else method
        grids[title] = [found.ratio for found in mine], list(mine[0].depths), scores
    return grids


def _styles(parts: Sequence[TypeSummary]) -> dict[str, dict[str, Any]]:
    """Returns a colour and marker for every method, in the run's order; repeated colours are dashed, then dotted."""
    methods = dict.fromkeys(cell.method for part in parts for cell in part.cells if cell.method != FULL)
    n = len(COLORS)
    return {
        method: {"color": COLORS[i % n], "marker": MARKERS[i % n], "linestyle": ("-", "--", ":")[i // n % 3]}
        for i, method in enumerate(methods)
    }


def _clean(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
