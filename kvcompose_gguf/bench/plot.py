"""Draws the measurements of ``kvcompose bench``. Needs matplotlib (the extra ``plot``), on first use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..support.plots import COLORS, MARKERS, check_plot
from .result import BenchResult, Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_bench(result: BenchResult, file: Path) -> None:
    """Draws decoding speed and KV cache memory against the context size, side by side, one line per variant.

    Raises:
        ConfigError: as :func:`check_plot`.
    """
    check_plot(file)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for i, variant in enumerate(result.variants):
        _draw(result, variant, speed, memory, COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)])
    rounds = result.arguments["repeats"]
    speed.set(title="Decoding", ylabel=f"tokens/s (median of {rounds}, bars: min to max)")
    memory.set(title="KV cache in memory", ylabel="MB allocated, with room for new tokens")
    for axes in (speed, memory):
        axes.set_xlabel("tokens of context")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    env = result.environment
    figure.suptitle(f"{env.model}, {env.n_threads} threads, {env.cpu}", fontsize=10)
    figure.savefig(file, dpi=150)


def _draw(result: BenchResult, variant: Variant, speed: Axes, memory: Axes, color: str, marker: str) -> None:
    rows = [m for m in result.measurements if m.variant == variant]
    sizes = [m.n_tokens for m in rows]
    rates = [m.decode_rate for m in rows]
    below = [m.decode_rate - min(m.decode_rates) for m in rows]
    above = [max(m.decode_rates) - m.decode_rate for m in rows]
    label = variant.name if variant.compression_ratio is None else _removed(variant)
    style = "-" if variant.type_kv == result.variants[0].type_kv else "--"
    speed.errorbar(
        sizes, rates, yerr=(below, above), label=label, color=color, marker=marker, linestyle=style, capsize=3
    )
    memory.plot(sizes, [m.kv_bytes / 1e6 for m in rows], color=color, marker=marker, linestyle=style)


def _removed(variant: Variant) -> str:
    return f"KVCompose, {variant.compression_ratio:.0%} removed, {variant.type_kv}"
