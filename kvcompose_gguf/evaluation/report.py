"""Writes a run as Markdown and JSON, with pictures if matplotlib is installed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from .plots import draw
from .records import FULL, RunFolder, SampleCost
from .results import Cell, Mean, Passkey, Summary, TypeSummary, summarise

_COSTS = (
    "Median seconds. Rest per answer: restore, compose and answer, checked against the full cache's answer; over the"
    " compressed caches in the means."
)
_ALIKE = "Share of all references that the answer lacks while it has a word of the same form: as many digits, a UUID."
_NOTE = """\
±: half the width of the 95 % interval of a bootstrap that draws samples within their tasks, 2,000 times. It is 0 \
where all samples agree, even if others would not. Ratios are the share of the KV entries removed. AUC: area under \
the score against the ratio, from the full cache to the largest ratio, divided by that ratio. Loss: relative to the \
full cache, on straight lines between ratios; `≥`: not reached at the largest ratio."""


def write_report(folder: RunFolder) -> None:
    """Writes ``report.md`` and ``summary.json`` into the folder, and the pictures if matplotlib is installed.

    Raises:
        ConfigError: the folder contains records that are not those of a run.
    """
    summary = summarise(folder.answers())
    (folder.path / "summary.json").write_text(json.dumps(summary.to_json(), indent=1) + "\n", "utf-8")
    pictures, note = [], ""
    try:
        pictures = draw(summary, folder.path)
    except ConfigError as error:
        note = f"No pictures: {error}"
    (folder.path / "report.md").write_text(markdown(summary, folder.config, folder.costs(), pictures, note), "utf-8")


#
# text
#


def markdown(
    summary: Summary,
    config: Mapping[str, Any],
    costs: Sequence[SampleCost],
    pictures: Sequence[str] = (),
    note: str = "",
) -> str:
    """Returns the report as Markdown.

    Args:
        config: the :class:`RunFolder`'s; the title shows ``model`` and ``date`` of its settings or environment.
        pictures: names of files beside the report.
        note: a sentence that replaces the pictures.
    """
    facts = config["settings"] | config["environment"]
    parts = [
        f"# Answers from a compressed cache: {facts.get('model', 'unknown model')}, {facts.get('date', 'undated')}"
    ]
    parts += [_NOTE] + [note] * bool(note)
    if summary.not_done:
        tasks = ", ".join(f"{task} ({100 * score:.1f})" for task, score in summary.not_done)
        least = f"{100 * summary.min_full:g}"
        parts.append(f"Left out of the means, because the full cache scores below {least}: {tasks}.")
    parts += ["## What a sample costs", _cost_table(summary, costs)]
    for part in summary.types:
        parts += _type_sections(part, summary.reference)
    parts += [f"![{name.split('.')[0]}]({name})" for name in pictures]
    parts.append("## Settings and environment")
    blocks = {"settings": config["settings"], "environment": config["environment"]}
    blocks |= {f"changed when the run went on, {i}": changed for i, changed in enumerate(config.get("resumed", ()), 1)}
    for title, block in blocks.items():
        lines = [f"{name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in block.items()]
        parts.append("\n".join(["```", f"# {title}", *lines, "```"]))
    return "\n\n".join(parts) + "\n"


def _type_sections(part: TypeSummary, reference: str | None) -> list[str]:
    sections = [f"## Cache of type {part.type_kv}"]
    if part.n_incomplete:
        sections.append(f"Left out: {part.n_incomplete} samples without the answers of every method and ratio.")
    if part.cells:
        tasks = ", ".join(f"{task} ({mean.n})" for task, mean in zip(part.tasks, part.cells[0].tasks, strict=True))
        n_tokens = f"{part.cells[0].n_tokens:,.0f}"
        sections.append(f"{part.n_samples} samples of {n_tokens} tokens, means over the tasks (samples): {tasks}.")
        sections += ["### Score x 100", _score_table(part)]
        if any(cell.difference for cell in part.cells):
            sections += [f"### Score x 100, difference from {reference}"]
            sections += ["Paired by sample, with 95 % intervals, without multiplicity correction.", _differences(part)]
        sections += ["### Exact match x 100", _by_ratio(part, lambda cell: _percent(cell.exact))]
        if any(cell.alike for cell in part.cells):
            sections += [
                "### Looks right and is wrong x 100",
                _ALIKE,
                _by_ratio(part, lambda cell: _percent(cell.alike)),
            ]
        sections += ["### KL divergence from the uncompressed run, nats", _by_ratio(part, lambda cell: _nats(cell.kl))]
        sections += ["### Same most probable token x 100", _by_ratio(part, lambda cell: _percent(cell.same_top))]
        sections += ["### Tokens kept, in the layers with the fewest and the most", _by_ratio(part, _layers)]
        for ratio in part.ratios or (0.0,):
            rows = [[_name(cell.method), *map(_percent, cell.tasks)] for cell in part.at(ratio)]
            sections += [f"### Score x 100 by task, {_removed(ratio)}", _table(["method", *part.tasks], rows)]
    if part.passkey:
        sections += ["### Passkey x 100: mean over depths, and the worst depth", _passkey_table(part)]
    return sections


def _cost_table(summary: Summary, costs: Sequence[SampleCost]) -> str:
    """Returns a sample's costs without the full cache's answers, which are token by token and so do not compare."""
    kinds = list(dict.fromkeys(kind for cost in costs for kind in cost.scoring_seconds))
    rows = []
    for type_kv in dict.fromkeys(cost.type_kv for cost in costs):
        mine = [cost for cost in costs if cost.type_kv == type_kv]
        scoring = [[c.scoring_seconds[kind] for c in mine if kind in c.scoring_seconds] for kind in kinds]
        cells = [cell for part in summary.types if part.type_kv == type_kv for cell in part.cells]
        rest = [cell.seconds for cell in cells if cell.method != FULL]
        columns = [[c.prefill_seconds for c in mine], *scoring, rest, [c.total_seconds for c in mine]]
        medians = [f"{statistics.median(column):.2f}" if column else "" for column in columns]
        n_tokens = f"{statistics.median(cost.n_tokens for cost in mine):,.0f}"
        rows.append([type_kv, str(len(mine)), n_tokens, *medians])
    titles = ["prefill", *(f"scoring: {kind}" for kind in kinds), "rest per answer", "whole sample"]
    whole = [f" Scoring: {kind} contains a whole prefill." for kind in kinds if kind.startswith("prefill(")]
    return "".join([_COSTS, *whole, "\n\n", _table(["cache", "samples", "tokens", *titles], rows)])


def _score_table(part: TypeSummary) -> str:
    extra = {}
    for curve in part.curves:
        most = max(cell.ratio for cell in part.cells if cell.method == curve.method)
        within = [f"{'≥ ' * (ratio == most)}{100 * ratio:.1f} %" for ratio in (curve.within_10, curve.within_20)]
        extra[curve.method] = [_percent(curve.area), *within]
    titles = ["AUC", "largest ratio, loss ≤ 10 %", "loss ≤ 20 %"]
    return _by_ratio(part, lambda cell: _percent(cell.score), titles, extra)


def _differences(part: TypeSummary) -> str:
    extra = {curve.method: [_interval(curve.difference)] for curve in part.curves}
    return _by_ratio(part, lambda cell: _interval(cell.difference), ["AUC"], extra)


def _passkey_table(part: TypeSummary) -> str:
    found = {(p.method, p.ratio): p for p in part.passkey}
    ratios = sorted({p.ratio for p in part.passkey if p.method != FULL})

    def text(p: Passkey | None) -> str:
        if p is None:
            return ""
        worst = min(range(len(p.scores)), key=lambda i: p.scores[i])
        return f"{_percent(p.score)} ({100 * p.scores[worst]:.0f} at {p.depths[worst]:g})"

    methods = list(dict.fromkeys(p.method for p in part.passkey if p.method != FULL)) or [FULL]
    rows = [[_name(m), text(found[FULL, 0]), *(text(found.get((m, ratio))) for ratio in ratios)] for m in methods]
    return _table(["method", "full cache", *map(_removed, ratios)], rows)


def _by_ratio(
    part: TypeSummary,
    text: Callable[[Cell], str],
    titles: Sequence[str] = (),
    extra: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Returns a table with a row per method, largest area first; ``extra`` fills the last columns, ``titles``."""
    cells = {(cell.method, cell.ratio): text(cell) for cell in part.cells}
    ratios = part.ratios
    rows = [
        [_name(m), cells[FULL, 0], *(cells.get((m, ratio), "") for ratio in ratios), *(extra or {}).get(m, ())]
        for m in [curve.method for curve in part.curves] or [FULL]
    ]
    return _table(["method", "full cache", *map(_removed, ratios), *titles], rows)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    filled = [titles, *([*row, *[""] * (len(titles) - len(row))] for row in rows)]
    texts = [[cell.replace("|", "\\|") for cell in row] for row in filled]
    widths = [max(3, *map(len, column)) for column in zip(*texts, strict=True)]
    lines = [
        " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in texts
    ]
    ruler = " | ".join("-" * (w - 1) + (":" if i else "-") for i, w in enumerate(widths))
    return "\n".join(f"| {line} |" for line in (lines[0], ruler, *lines[1:]))


def _name(method: str) -> str:
    return "full cache" if method == FULL else method


def _removed(ratio: float) -> str:
    return f"{100 * ratio:g} % removed"


def _percent(mean: Mean | None) -> str:
    return "–" if mean is None else f"{100 * mean.value:.1f} ± {50 * (mean.high - mean.low):.1f}"


def _nats(mean: Mean | None) -> str:
    return "–" if mean is None else f"{mean.value:.3f} ± {(mean.high - mean.low) / 2:.3f}"


def _interval(mean: Mean | None) -> str:
    return "–" if mean is None else f"{100 * mean.value:+.1f} [{100 * mean.low:+.1f}, {100 * mean.high:+.1f}]"


def _layers(cell: Cell) -> str:
    if cell.n_kept is None:
        return "–"
    least, most = min(cell.n_kept), max(cell.n_kept)
    if most - least < 1:
        return f"all {most:,.0f}"
    return f"{least:,.0f} (layer {cell.n_kept.index(least)}) to {most:,.0f} ({cell.n_kept.index(most)})"
