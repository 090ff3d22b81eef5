#!/usr/bin/env python3
"""How long until the first token, with and without compression?

    python scripts/bench_ttft.py MODEL [--method kvcompose,scoring=surrogate] [--n-tokens 4000,8000] [--repeats 5]

Regime: one process and one context; a prompt of N seeded tokens of prose, greedy, until the first token is there. Every
repeat measures the plain llama.cpp cache and then the method on the same prompt, from an empty cache. The last line is
one JSON document. Give it the machine alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from bench_speed import context_tokens, cpu_name

from kvcompose_gguf import Llama
from kvcompose_gguf.methods import make_method
from kvcompose_gguf.run import resolve_model


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
    parser.add_argument("--method", default="kvcompose,scoring=surrogate")
    parser.add_argument("--ratio", type=float, default=0.75)
    parser.add_argument("--n-tokens", default="4000,8000")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    path = resolve_model(args.model)
    sizes = [int(n) for n in args.n_tokens.split(",")]
    method = make_method(args.method, compression_ratio=args.ratio)
    llama = Llama(
        str(path), n_ctx=max(sizes) + 768, n_threads=args.threads, n_threads_batch=args.threads, flash_attn=True,
        verbose=False, kv_compressor=method,
    )  # fmt: skip
    method = llama.kv_compressor
    result = {"model": path.name, "method": args.method, "ratio": args.ratio, "threads": args.threads}
    result["cpu"] = cpu_name()
    for n_tokens in sizes:
        tokens = context_tokens(llama, n_tokens)
        plain, compressed, scoring, planning = [], [], [], []
        for _ in range(args.repeats):
            llama.kv_compressor = None
            plain.append(first_token_seconds(llama, tokens))
            llama.kv_compressor = method
            compressed.append(first_token_seconds(llama, tokens))
            scoring.append(llama.kv_report.score_seconds)
            planning.append(llama.kv_report.plan_seconds + llama.kv_report.compose_seconds)
        ratios = sorted(c / p for c, p in zip(compressed, plain, strict=True))
        row = {
            "plain_seconds": statistics.median(plain), "compressed_seconds": statistics.median(compressed),
            "ratio_median": statistics.median(ratios), "ratio_least": ratios[0], "ratio_most": ratios[-1],
            "scoring_seconds": statistics.median(scoring), "plan_and_compose_seconds": statistics.median(planning),
            "scoring_share": statistics.median(s / p for s, p in zip(scoring, plain, strict=True)),
        }  # fmt: skip
        print(n_tokens, {name: round(value, 3) for name, value in row.items()}, flush=True)
        result[str(n_tokens)] = row
    print(json.dumps(result))


if __name__ == "__main__":
    main()
