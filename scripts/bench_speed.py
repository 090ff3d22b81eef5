#!/usr/bin/env python3
"""How much faster is decoding from a compressed cache, and how long does compressing take relative to the prefill?

    python scripts/bench_speed.py [--model smollm2] [--n-tokens 8000] [--ratio 0.75] [--threads 2]

Regime: one prompt of N seeded tokens, flash attention, f16 cache. Then 32-token runs at position N from the full and
from the compressed cache alternate in one process. The last line is one JSON document. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

from kvcompose_gguf import KVCompose, Llama
from kvcompose_gguf.cli.demo.questions import document
from kvcompose_gguf.models.resolve import resolve_model
from kvcompose_gguf.native.about import library_info


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def context_tokens(llama: Llama, n_tokens: int) -> list[int]:
    """Returns prose, repeated to the length; the speed does not depend on its content."""
    tokens: list[int] = llama.prompt_tokens(document())
    return (tokens * (n_tokens // len(tokens) + 1))[:n_tokens]


def decode_seconds(llama: Llama, n_decode: int) -> float:
    """Returns the wall time of ``n_decode`` single-token decodes after the context; removes the tokens again."""
    with llama.context.undone():
        start = time.perf_counter()
        for token in range(1000, 1000 + n_decode):
            llama.eval([token])
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a fetched model's name or a .gguf file")
    parser.add_argument("--n-tokens", type=int, default=8000)
    parser.add_argument("--ratio", type=float, default=0.75)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    path = str(resolve_model(args.model))
    options = {
        "n_ctx": args.n_tokens + 256, "n_threads": args.threads, "n_threads_batch": args.threads, "flash_attn": True,
        "verbose": False,
    }  # fmt: skip
    full = Llama(path, **options)
    tokens = context_tokens(full, args.n_tokens)
    start = time.perf_counter()
    full.context.prefill(tokens)
    prefill_seconds = time.perf_counter() - start

    small = Llama(path, kv_compressor=KVCompose(compression_ratio=args.ratio, scoring="repeat"), **options)
    small.load_state(full.save_state())  # one prefill for both
    report = small.compress(tokens)

    n_decode = 32
    runs: dict[str, list[float]] = {"full": [], "compressed": []}
    for llama in (full, small):
        decode_seconds(llama, 8)  # warm-up
    for _ in range(args.repeats):
        for name, llama in (("full", full), ("compressed", small)):
            runs[name].append(n_decode / decode_seconds(llama, n_decode))

    result = {
        "model": Path(path).name, "n_tokens": args.n_tokens, "ratio": args.ratio, "threads": args.threads,
        "cpu": cpu_name(), "commit": library_info().commit[:9],
        "decode_tokens_per_second": {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in runs.items()
        },
        "decode_speedup": statistics.median(runs["compressed"]) / statistics.median(runs["full"]),
        "prefill_seconds": prefill_seconds, "score_seconds": report.score_seconds,
        "score_over_prefill": report.score_seconds / prefill_seconds,
        "plan_seconds": report.plan_seconds, "compose_seconds": report.compose_seconds,
        "plan_and_compose_over_prefill": (report.plan_seconds + report.compose_seconds) / prefill_seconds,
        "kv_bytes_full": report.kv_bytes_full, "kv_bytes_kept": report.kv_bytes_kept,
        "kv_bytes_before": report.kv_bytes_before, "kv_bytes": report.kv_bytes,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
