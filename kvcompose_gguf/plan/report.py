"""The figures that describe one compression."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class KVReport:
    """The result of one compression: kept tokens, bytes and times.

    Attributes:
        n_tokens: number of tokens of the context.
        n_kept: number of composite tokens in every layer, int64 ``(n_layer,)``.
        kv_bytes_full: bytes of the context's rows in a full cache.
        kv_bytes_kept: bytes of the kept rows.
        kv_bytes_before, kv_bytes: bytes allocated for the cache, including room for new tokens: the most while the
            context was read, and now.
        prefill_seconds, score_seconds, plan_seconds, compose_seconds: wall time of the steps.
        n_prefilled: number of tokens that the prefill evaluated; less than ``n_tokens`` if the cache held a prefix.
        scoring_chunk: number of query tokens at a time, as many as ``n_ctx`` allowed; 0: only the prefill's queries.
        n_sink, n_recent: number of first and last context tokens that every head keeps; fewer than the method asks for
            if its budget does not cover them.
        scoring: how a method that learns got its scores, e.g. ``"predicted, checked 1/8 (agreement 0.90)"``; empty for
            other methods.
        n_composed: how often the cache was composed; more than once if the context did not fit its budget and a chunk.
    """

    n_tokens: int
    n_kept: npt.NDArray[np.int64]
    kv_bytes_full: int
    kv_bytes_kept: int
    kv_bytes_before: int
    kv_bytes: int
    prefill_seconds: float
    score_seconds: float
    plan_seconds: float
    compose_seconds: float
    n_prefilled: int
    scoring_chunk: int
    n_sink: int = 0
    n_recent: int = 0
    scoring: str = ""
    n_composed: int = 1

    def after(self, earlier: KVReport) -> KVReport:
        """Returns the figures of a cache that was composed again: the times and counts of both together."""
        steps = ("prefill_seconds", "score_seconds", "plan_seconds", "compose_seconds")
        added = {name: getattr(self, name) + getattr(earlier, name) for name in (*steps, "n_composed", "n_prefilled")}
        peak = max(self.kv_bytes_before, earlier.kv_bytes_before)
        return replace(self, **added, kv_bytes_before=peak, scoring=earlier.scoring or self.scoring)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values, for ``from_json``."""
        return {**vars(self), "n_kept": self.n_kept.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> KVReport:
        """Returns the report that ``to_json`` was called on.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: the fields or their values are not a report's.
        """
        kinds: dict[str, type] = {"int": int, "str": str}
        kinds = {field.name: kinds.get(str(field.type), float) for field in fields(cls)}
        numbers = {name: kinds[name](value) for name, value in values.items() if name != "n_kept"}
        report = cls(**numbers, n_kept=np.array(values["n_kept"], dtype=np.int64))  # type: ignore[arg-type]
        if report.n_tokens < 1 or report.n_kept.ndim != 1 or not report.n_kept.size:
            raise ValueError("the report has no tokens or no layers")
        return report

    @property
    def compression_ratio(self) -> float:
        """Returns the fraction of the context's KV entries that was removed."""
        return 1 - float(self.n_kept.sum()) / (len(self.n_kept) * self.n_tokens)

    def __str__(self) -> str:
        return (
            f"{self.n_tokens} tokens, {self.compression_ratio:.1%} of the KV entries removed "
            f"(layers keep {self.n_kept.min()} to {self.n_kept.max()}): "
            f"{self.kv_bytes_full / 1e6:.1f} -> {self.kv_bytes_kept / 1e6:.1f} MB of rows, "
            f"{self.kv_bytes_before / 1e6:.1f} -> {self.kv_bytes / 1e6:.1f} MB allocated; "
            f"prefill {self.prefill_seconds:.2f} s, scores {self.score_seconds:.2f} s"
            f"{f' ({self.scoring})' if self.scoring else ''}, "
            f"plan {self.plan_seconds:.3f} s, compose {self.compose_seconds:.3f} s"
            f"{f' ({self.n_composed} times)' if self.n_composed > 1 else ''}"
        )
