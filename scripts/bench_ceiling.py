#!/usr/bin/env python3
"""What does a long prompt cost below a ceiling: memory at every moment, time to the first token, speed of the answer?

    python scripts/bench_ceiling.py MODEL --n-tokens 8000 (--ratio 0.75 | --n-kept 4000) [--repeats 3]

Regime: each side runs in a process of its own, one after the other, repeated in turn: llama.cpp's full cache with its
own kernel, and KVCompose with learned scores. A first prompt of 1,500 tokens teaches ours, and warms up both. Both read
the same N tokens and decode the same tokens behind them. "KV" is the largest number of bytes that the cache had at any
decode; "process" is the peak of the process beyond the loaded model. The last line is one JSON document. Run nothing
else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import psutil
from bench_speed import context_tokens, cpu_name

from kvcompose_gguf import KVCompose
from kvcompose_gguf.load import load_model
from kvcompose_gguf.models.resolve import resolve_model

#: the prompt before, and the room for an answer
N_FIRST, N_ANSWER = 1500, 64


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Returns the figures of one side, in the process that only does this."""
    is_ours = args.side == "ours"
    budget = {"compression_ratio": args.ratio} if args.n_kept is None else {"n_kept": args.n_kept}
    method = KVCompose(**budget) if is_ours else None
    llama = load_model(
        resolve_model(args.model), args.n_tokens + 1024, method, fast_attention=is_ours, threads=args.threads
    )
    tokens = context_tokens(llama, N_FIRST + args.n_tokens + N_ANSWER)
    first, tokens = tokens[:N_FIRST], tokens[N_FIRST:]
    prompt, answer = tokens[: args.n_tokens], tokens[args.n_tokens :]
    process, peaks = psutil.Process(), {"kv": 0, "process": 0}

    def through(decode: Any, n_tokens: int) -> None:
        decode()
        peaks["kv"] = max(peaks["kv"], llama.kv_bytes)
        peaks["process"] = max(peaks["process"], process.memory_info().rss)

    for n in (N_FIRST, N_FIRST, 32):  # two prompts teach all that is needed, the last one leaves an empty cache
        llama.reset()
        next(llama.generate(first[:n], temp=0.0))
    llama.reset()
    llama.context.through = through
    peaks["kv"] = 0
    loaded = process.memory_info().rss
    start = time.perf_counter()
    next(llama.generate(prompt, temp=0.0))
    ttft = time.perf_counter() - start
    start = time.perf_counter()
    for token in answer:
        llama.eval([token])
    seconds = time.perf_counter() - start
    report, layers = llama.kv_report, llama.kv_layers
    row = sum(layer.n_bytes_row for layer in layers)
    n_rows = 0 if method is None else method.n_composites(layers, args.n_tokens) / len(layers)
    chunk = 0 if method is None else method.chunk
    return {
        "ttft": ttft, "decode": len(answer) / seconds, "kv": peaks["kv"], "process": peaks["process"] - loaded,
        "ceiling": (n_rows + chunk) * row, "full": args.n_tokens * row,
        "n_composed": 0 if report is None else report.n_composed,
        "compose_share": 0 if report is None else (report.compose_seconds + report.plan_seconds) / ttft,
        "score_share": 0 if report is None else report.score_seconds / ttft,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a fetched model's name or a .gguf file")
    parser.add_argument("--n-tokens", type=int, default=8000)
    parser.add_argument("--ratio", type=float, default=0.75)
    parser.add_argument("--n-kept", type=float)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--side", choices=("full", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return

    runs: dict[str, list[dict[str, float]]] = {"full": [], "ours": []}
    for _ in range(args.repeats):
        for side, found in runs.items():
            command = [sys.executable, *sys.argv, "--side", side]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    full, ours = ({key: statistics.median(run[key] for run in runs[side]) for key in runs[side][0]} for side in runs)
    print(f"{args.model}, {args.n_tokens} tokens, {cpu_name()}, {args.threads} threads, medians of {args.repeats}")
    print(f"first token: {full['ttft']:.1f}, {ours['ttft']:.1f} s, ratio {ours['ttft'] / full['ttft']:.2f}")
    print(f"decoding: {full['decode']:.1f}, {ours['decode']:.1f} tokens/s, ratio {ours['decode'] / full['decode']:.2f}")
    print(f"KV at most: {full['kv'] / 1e6:.1f}, {ours['kv'] / 1e6:.1f} MB, ratio {ours['kv'] / full['kv']:.2f}; "
          f"{ours['kv'] / ours['ceiling']:.3f} of budget and chunk")  # fmt: skip
    print(f"process at most: {full['process'] / 1e6:.1f}, {ours['process'] / 1e6:.1f} MB, "
          f"ratio {ours['process'] / full['process']:.2f}")  # fmt: skip
    print(f"composed {ours['n_composed']:.0f} times, plan and compose {ours['compose_share']:.1%} of the time, "
          f"scores {ours['score_share']:.1%}")  # fmt: skip
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
