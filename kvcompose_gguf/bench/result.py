"""The measurements of ``kvcompose bench`` as values, and their JSON document."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError

SCHEMA = 1


@dataclass(frozen=True)
class Variant:
    """One kind of cache; ``compression_ratio`` is the fraction removed, None for a full cache of the original class."""

    type_kv: str
    compression_ratio: float | None = None

    @property
    def name(self) -> str:
        """Returns a name, e.g. ``full f16`` or ``KVCompose 0.75 q8_0``."""
        return f"{'full' if self.compression_ratio is None else f'KVCompose {self.compression_ratio:g}'} {self.type_kv}"


@dataclass(frozen=True)
class Environment:
    """Everything besides the arguments that the numbers depend on.

    Attributes:
        date: UTC, ISO 8601.
        backends: llama.cpp's own line about its build and the CPU features it found.
        n_cpu: number of logical CPUs.
        n_threads, n_threads_batch: threads for decoding one token, and for decoding many.
        model, model_bytes: name and size of the file.
        text: source of the tokens.
    """

    date: str
    package_version: str
    llama_cpp_commit: str
    backends: str
    cpu: str
    n_cpu: int
    os: str
    python: str
    n_threads: int
    n_threads_batch: int
    model: str
    model_bytes: int
    text: str


@dataclass(frozen=True)
class Measurement:
    """One variant at one context size.

    Attributes:
        n_tokens: tokens of the context.
        n_ctx: cells of the cache, the same for every variant of a size.
        n_decode: tokens per decode sample.
        prefill_seconds, score_seconds, plan_seconds, compose_seconds: wall time, measured once; 0 for steps that a full
            cache skips.
        scoring_chunk: query tokens per decode of the scoring pass, on top of the context; 0 for a full cache.
        decode_seconds: wall time of ``n_decode`` single-token decodes at position ``n_tokens``, one sample per round.
        kv_bytes_rows: bytes of the context's rows in the cache.
        kv_bytes: bytes allocated for the cache after the decodes, including room for new tokens.
        baseline_bytes: resident memory of the variant's process without its cache, after all weights were read.
        rss_bytes: resident memory after the decodes.
        peak_bytes: peak resident memory so far; None if the system does not report it.
    """

    variant: Variant
    n_tokens: int
    n_ctx: int
    n_decode: int
    prefill_seconds: float
    score_seconds: float
    plan_seconds: float
    compose_seconds: float
    scoring_chunk: int
    decode_seconds: tuple[float, ...]
    kv_bytes_rows: int
    kv_bytes: int
    baseline_bytes: int
    rss_bytes: int
    peak_bytes: int | None

    @property
    def decode_rates(self) -> list[float]:
        """Returns the tokens per second of every sample."""
        return [self.n_decode / seconds for seconds in self.decode_seconds]

    @property
    def decode_rate(self) -> float:
        """Returns the median of the tokens per second."""
        return statistics.median(self.decode_rates)


@dataclass(frozen=True)
class BenchResult:
    """Measurements in the order in which they were made: size by size, the baseline first.

    Attributes:
        arguments: the command's arguments as JSON values.
        complete: True if every size was measured; the document is also written after each size.
    """

    environment: Environment
    arguments: dict[str, Any]
    measurements: tuple[Measurement, ...]
    complete: bool

    @property
    def sizes(self) -> list[int]:
        """Returns the context sizes, in order."""
        return list(dict.fromkeys(m.n_tokens for m in self.measurements))

    @property
    def variants(self) -> list[Variant]:
        """Returns the variants, in order."""
        return list(dict.fromkeys(m.variant for m in self.measurements))

    def of_size(self, n_tokens: int) -> list[Measurement]:
        """Returns the measurements of all variants at one size."""
        return [m for m in self.measurements if m.n_tokens == n_tokens]

    def speedup(self, measurement: Measurement) -> float:
        """Returns the decoding speed relative to the first full cache of the same size (medians)."""
        return measurement.decode_rate / self.of_size(measurement.n_tokens)[0].decode_rate

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON document; all values are in bytes and seconds."""
        return {
            "schema": SCHEMA,
            "program": "kvcompose bench",
            "complete": self.complete,
            **asdict(self.environment),
            "arguments": self.arguments,
            "results": [self._row(m) for m in self.measurements],
        }

    def _row(self, m: Measurement) -> dict[str, Any]:
        rates = m.decode_rates
        return asdict(m) | {
            "name": m.variant.name,
            "decode_seconds": list(m.decode_seconds),
            "decode_tokens_per_second": {"median": m.decode_rate, "min": min(rates), "max": max(rates)},
            "decode_speedup": self.speedup(m),
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> BenchResult:
        """Returns the result that :meth:`to_dict` wrote to ``document``; recomputes derived numbers.

        Raises:
            KeyError, TypeError, ValueError: ``document`` is not such a document.
        """
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema={document['schema']!r}; this version reads {SCHEMA}")
        rows = [
            _fields(Measurement, row)
            | {"variant": Variant(**row["variant"]), "decode_seconds": tuple(row["decode_seconds"])}
            for row in document["results"]
        ]
        return cls(
            Environment(**_fields(Environment, document)),
            document["arguments"],
            tuple(Measurement(**row) for row in rows),
            document["complete"],
        )


def read_result(file: Path) -> BenchResult:
    """Returns the result stored in the JSON file of an earlier run.

    Raises:
        ConfigError: the file cannot be read, or is not such a document.
    """
    try:
        return BenchResult.from_dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"from={str(file)!r} is not a JSON file of `kvcompose bench`: {type(error).__name__}: {error}"
        ) from error


def _fields(kind: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of ``row`` that are fields of the dataclass ``kind``."""
    return {field.name: row[field.name] for field in fields(kind)}
