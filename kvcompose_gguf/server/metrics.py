"""Metrics for Prometheus: llama-server's and our own."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..plan.report import KVReport
from .slots.engine import Engine
from .slots.steps import End

SPECULATIVE = ("draft_tokens", "accepted_tokens", "drafts")


@dataclass
class _Throughput:
    """Counts steps and seconds between two readings."""

    n: int = 0
    seconds: float = 0.0

    def take(self) -> float:
        rate = self.n / self.seconds if self.seconds > 0 else 0.0
        self.n, self.seconds = 0, 0.0
        return rate


class Metrics(Collector):
    """Metrics of all generations of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._n_prompt = self._n_cached = self._n_predicted = self._n_most = 0
        self._prompt_seconds = self._predicted_seconds = 0.0
        self._prompt, self._predicted = _Throughput(), _Throughput()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._ratio = Histogram(
            "kvcompose_removed_ratio", "Fraction of a prompt's KV entries that was removed.",
            buckets=(0.25, 0.5, 0.75, 0.875, 0.9375, 1), registry=self._registry,
        )  # fmt: skip
        self._bytes = Histogram(
            "kvcompose_context_bytes", "Bytes of a compressed context's rows.",
            buckets=[2**n for n in range(18, 34, 2)], registry=self._registry,
        )  # fmt: skip
        self._bytes_full = Histogram(
            "kvcompose_context_bytes_full", "Bytes that these rows had in a full cache.",
            buckets=[2**n for n in range(18, 34, 2)], registry=self._registry,
        )  # fmt: skip
        self._score_seconds = Histogram(
            "kvcompose_score_seconds", "Seconds that scoring a prompt took.", registry=self._registry
        )
        self._seen: weakref.WeakSet[KVReport] = weakref.WeakSet()

    def count(self, end: End) -> None:
        """Add a generation to the metrics."""
        t = end.timings
        with self._lock:
            self._n_prompt += t.prompt_n
            self._n_cached += t.cache_n
            self._n_predicted += t.predicted_n
            self._n_most = max(self._n_most, end.n_cached)
            self._prompt_seconds += t.prompt_seconds
            self._predicted_seconds += t.predicted_seconds
            self._prompt.n += t.prompt_n
            self._prompt.seconds += t.prompt_seconds
            self._predicted.n += max(0, t.predicted_n - 1)
            self._predicted.seconds += t.predicted_seconds
            if end.report is not None and end.report not in self._seen:
                self._seen.add(end.report)
                self._ratio.observe(end.report.compression_ratio)
                self._bytes.observe(end.report.kv_bytes_kept)
                self._bytes_full.observe(end.report.kv_bytes_full)
                self._score_seconds.observe(end.report.score_seconds)

    def count_vectors(self, n_tokens: int, seconds: float) -> None:
        """Add the tokens of embedded texts to the metrics."""
        with self._lock:
            self._n_prompt += n_tokens
            self._prompt_seconds += seconds
            self._prompt.n += n_tokens
            self._prompt.seconds += seconds

    def text(self) -> bytes:
        """Returns the metrics in Prometheus' text format."""
        # llama-server declares it as a counter; prometheus-client would append _total to the name of a counter
        kind = b"# TYPE llamacpp:n_tokens_max "
        return bytes(generate_latest(self._registry)).replace(kind + b"gauge", kind + b"counter")

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics that are not histograms."""
        slots = self._engine.slots
        n_decodes, n_served = self._engine.turns.n_decodes, self._engine.turns.n_served
        with self._lock:
            counters = {
                "prompt_tokens": (self._n_prompt, "Prompt tokens processed."),
                "prompt_tokens_cached": (self._n_cached, "Prompt tokens reused from the cache."),
                "prompt_seconds": (self._prompt_seconds, "Seconds of prompt processing."),
                "tokens_predicted": (self._n_predicted, "Tokens generated."),
                "tokens_predicted_seconds": (self._predicted_seconds, "Seconds of generation."),
                "n_decode": (n_decodes, "Calls of llama_decode."),
                **{f"spec_decode_num_{name}": (0, f"Speculative {name}: none here.") for name in SPECULATIVE},
            }
            gauges = {
                "llamacpp:n_tokens_max": (self._n_most, "Largest number of tokens in a slot."),
                "llamacpp:prompt_tokens_seconds": (self._prompt.take(), "Prompt tokens a second since the last look."),
                "llamacpp:predicted_tokens_seconds": (self._predicted.take(), "Tokens a second since the last look."),
                "llamacpp:requests_processing": (self._engine.n_busy, "Requests in slots."),
                "llamacpp:requests_deferred": (self._engine.n_waiting, "Requests in the queue."),
                "llamacpp:n_busy_slots_per_decode": (
                    n_served / max(n_decodes, 1),
                    "Slots that a decode is for, on average.",
                ),
                "kvcompose_prompt_cache_bytes": (
                    self._engine.stores.memory.n_bytes,
                    "Bytes of the copies of what slots held.",
                ),
                "kvcompose_kv_bytes": (sum(slot.kv_bytes for slot in slots), "Bytes of all slots' caches."),
            }
        for name, (value, text) in counters.items():
            yield CounterMetricFamily(f"llamacpp:{name}", text, value=value)
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
