#!/usr/bin/env python3
"""What does a long prompt cost below a ceiling: memory at every moment, time to the first token, speed of the answer?

    python scripts/bench_ceiling.py MODEL --n-tokens 8000 (--ratio 0.75 | --n-kept 4000) [--repeats 3] [--sides ours]

Regime: each side runs in a process of its own, one after the other, repeated in turn: llama.cpp's full cache with its
own kernel, and KVCompose with learned scores. A first prompt of 1,500 tokens teaches ours, and warms up both. Both read
the same N tokens and decode the same tokens behind them. Five pass keys are hidden at 10, 30, 50, 70 and 90 % of the
text; each is then asked for behind the same cache, greedily ("found", in this order). "KV" is the largest number of
bytes that the cache had at any decode; "process" is the peak of the process beyond the loaded model. The last line is
one JSON document. Run nothing else on the machine meanwhile.
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
from pass_keys import KEYS, N_FIRST, found_keys, with_keys

from kvcompose_gguf import KVCompose
from kvcompose_gguf.load import load_model
from kvcompose_gguf.models.resolve import resolve_model

#: the room for an answer
N_ANSWER = 64


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of one side, in the process that only does this."""
    is_ours = args.side == "ours"
    budget = {"compression_ratio": args.ratio} if args.n_kept is None else {"n_kept": args.n_kept}
    method = KVCompose(**budget) if is_ours else None
    llama = load_model(
        resolve_model(args.model), args.n_tokens + 1024, method, fast_attention=is_ours, threads=args.threads
    )
    tokens = context_tokens(llama, N_FIRST + args.n_tokens + N_ANSWER)
    first, tokens = tokens[:N_FIRST], tokens[N_FIRST:]
    prompt, answer = with_keys(llama, tokens[: args.n_tokens], KEYS), tokens[args.n_tokens :]
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
    llama.context.through = lambda decode, n_tokens: decode()
    found = found_keys(llama, KEYS)
    report, layers = llama.kv_report, llama.kv_layers
    row, n_tokens = sum(layer.n_bytes_row for layer in layers), args.n_tokens
    n_rows = 0 if method is None else method.n_composites(layers, n_tokens) / len(layers)
    chunk = 0 if method is None else method.chunk_for(layers, n_tokens)
    return {
        "ttft": ttft, "decode": len(answer) / seconds, "kv": peaks["kv"], "process": peaks["process"] - loaded,
        "ceiling": (n_rows + chunk) * row, "full": args.n_tokens * row,
        "n_composed": 0 if report is None else report.n_composed,
        "compose_share": 0 if report is None else (report.compose_seconds + report.plan_seconds) / ttft,
        "score_share": 0 if report is None else report.score_seconds / ttft, "found": found,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a fetched model's name or a .gguf file")
    parser.add_argument("--n-tokens", type=int, default=8000)
    parser.add_argument("--ratio", type=float, default=0.75)
    parser.add_argument("--n-kept", type=float)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--sides", choices=("both", "ours"), default="both", help="ours: without the full cache")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--side", choices=("full", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return

    runs: dict[str, list[dict[str, Any]]] = {"full": [], "ours": []} if args.sides == "both" else {"ours": []}
    for _ in range(args.repeats):
        for side, results in runs.items():
            command = [sys.executable, *sys.argv, "--side", side]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    sides = {side: {key: statistics.median(run[key] for run in results) for key in results[0] if key != "found"}
             for side, results in runs.items()}  # fmt: skip
    ours = sides["ours"]
    print(f"{args.model}, {args.n_tokens} tokens, {cpu_name()}, {args.threads} threads, medians of {args.repeats}")

    def line(what: str, key: str, unit: str, scale: float = 1, more: str = "") -> None:
        values = ", ".join(f"{side[key] / scale:.1f}" for side in sides.values())
        ratio = f", ratio {ours[key] / sides['full'][key]:.2f}" if "full" in sides else ""
        print(f"{what}: {values} {unit}{ratio}{more}")

    line("first token", "ttft", "s")
    line("decoding", "decode", "tokens/s")
    line("KV at most", "kv", "MB", 1e6, f"; {ours['kv'] / ours['ceiling']:.3f} of budget and chunk")
    line("process at most", "process", "MB", 1e6)
    print(f"composed {ours['n_composed']:.0f} times, plan and compose {ours['compose_share']:.1%} of the time, "
          f"scores {ours['score_share']:.1%}")  # fmt: skip
    for side, results in runs.items():
        print(f"pass keys found, {side}: {''.join('+' if hit else '-' for hit in results[-1]['found'])}")
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
