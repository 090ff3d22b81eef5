#!/usr/bin/env python3
"""How long until the first token, with and without compression?

    python scripts/bench_ttft.py MODEL [--method kvcompose,scoring=learned] [--n-tokens 4000,8000] [--repeats 5]

Regime: one process and one context. A prompt of N seeded tokens of prose is read, greedy, until the first token. Every
repeat measures the same prompt, each time from an empty cache: unmodified llama.cpp ("plain"), our attention kernel
without compression ("read"), and the method ("compressed"). The last line is one JSON document. Run nothing else on
the machine meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from dataclasses import replace
from typing import Any

from bench_speed import context_tokens, cpu_name

from kvcompose_gguf import Llama
from kvcompose_gguf.methods import make_method
from kvcompose_gguf.models.resolve import resolve_model
from kvcompose_gguf.native.vocab_only import n_ctx_trained, open_vocabulary


def first_token_seconds(llama: Llama, tokens: list[int]) -> float:
    llama.reset()
    start = time.perf_counter()
    generated = llama.generate(tokens, temp=0.0)
    next(generated)
    seconds = time.perf_counter() - start
    generated.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a fetched model's name or a .gguf file")
    parser.add_argument("--method", default="kvcompose,scoring=learned")
    parser.add_argument("--ratio", type=float, default=0.75)
    parser.add_argument("--n-tokens", default="4000,8000")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    path = resolve_model(args.model)
    sizes = [int(n) for n in args.n_tokens.split(",")]
    method = make_method(args.method, compression_ratio=args.ratio)
    with open_vocabulary(path) as vocabulary:
        n_ctx = min(max(sizes) + 768, n_ctx_trained(vocabulary) or 1 << 30)
    llama = Llama(
        str(path), n_ctx=n_ctx, n_threads=args.threads, n_threads_batch=args.threads, flash_attn=True,
        verbose=False, kv_compressor=method,
    )  # fmt: skip
    sides = {"plain": None, "read": replace(method, min_tokens=1 << 30), "compressed": llama.kv_compressor}
    result = {"model": path.name, "method": args.method, "ratio": args.ratio, "threads": args.threads}
    result["cpu"] = cpu_name()
    for n_tokens in sizes:
        tokens = context_tokens(llama, n_tokens)
        seconds: dict[str, list[float]] = {name: [] for name in (*sides, "scoring", "plan_and_compose")}
        for _ in range(args.repeats):
            for name, side in sides.items():
                llama.kv_compressor = side
                seconds[name].append(first_token_seconds(llama, tokens))
            report = llama.kv_report
            assert report is not None, "the last side compresses"
            seconds["scoring"].append(report.score_seconds)
            seconds["plan_and_compose"].append(report.plan_seconds + report.compose_seconds)
        row: dict[str, Any] = {f"{name}_seconds": statistics.median(samples) for name, samples in seconds.items()}
        for above, below in itertools.product(("compressed", "scoring"), ("plain", "read")):
            ratios = sorted(a / b for a, b in zip(seconds[above], seconds[below], strict=True))
            row[f"{above}_over_{below}"] = {"median": statistics.median(ratios), "range": (ratios[0], ratios[-1])}
        print(n_tokens, json.dumps(row), flush=True)
        result[str(n_tokens)] = row
    print(json.dumps(result))


if __name__ == "__main__":
    main()
