#!/usr/bin/env python3
"""Do memory and speed stay the same however much is read below a ceiling?

    python scripts/bench_endless.py MODEL [--n-tokens 100000] [--n-kept 2048] [--block 10000]

Regime: one process. Prose, repeated without end, is evaluated 512 tokens at a time, as if it were one conversation. The
cache has a ceiling of ``n_kept`` rows a layer on average. The first block teaches the scores and fills the cache. Every
block prints the memory of cache and process, and the tokens per second. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import time

import psutil
from bench_speed import context_tokens, cpu_name

from kvcompose_gguf import KVCompose
from kvcompose_gguf.load import load_model
from kvcompose_gguf.models.resolve import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a fetched model's name or a .gguf file")
    parser.add_argument("--n-tokens", type=int, default=100_000)
    parser.add_argument("--n-kept", type=float, default=2048)
    parser.add_argument("--block", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()

    method = KVCompose(n_kept=args.n_kept)
    llama = load_model(
        resolve_model(args.model), args.n_tokens + 1024, method, fast_attention=True, threads=args.threads
    )
    tokens, process, blocks = context_tokens(llama, args.n_tokens), psutil.Process(), []
    print(f"{args.model}, {args.n_kept:.0f} rows a layer, {cpu_name()}, {args.threads} threads")
    print("| tokens read | cache | process | tokens/s | composed |")
    print("|---|---|---|---|---|")
    for first in range(0, args.n_tokens, args.block):
        part, largest, start = tokens[first : first + args.block], 0, time.perf_counter()
        for at in range(0, len(part), 512):
            llama.eval(part[at : at + 512])
            largest = max(largest, llama.kv_bytes)
        seconds, report = time.perf_counter() - start, llama.kv_report
        n_composed = 0 if report is None else report.n_composed
        blocks.append((llama.n_tokens, largest, process.memory_info().rss, len(part) / seconds, n_composed))
        n_tokens, kv, rss, speed, _ = blocks[-1]
        print(f"| {n_tokens:,} | {kv / 1e6:.2f} MB | {rss / 1e6:.1f} MB | {speed:.0f} | {n_composed} |", flush=True)
    later = blocks[1:]
    for name, i in (("cache", 1), ("process", 2), ("tokens/s", 3)):
        values = [block[i] for block in later]
        print(f"{name}: largest over smallest block after the first {max(values) / min(values):.3f}")
    print(json.dumps(blocks))


if __name__ == "__main__":
    main()
