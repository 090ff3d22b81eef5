#!/usr/bin/env python3
"""Is one build of the library as fast as another, e.g. a portable wheel's as the one for this machine's own CPU?

    python scripts/bench_builds.py MODEL FOLDER FOLDER [--n-tokens 2048] [--repeats 7] [--threads 2]

A FOLDER has the shared libraries (``kvcompose_gguf/lib``); the first is the base of the ratios. Regime: every
measurement has a process of its own, the builds take turns. It reads N tokens of prose into an empty cache, without
scores (llama.cpp's attention) and with them (ours), and decodes 64 tokens behind them. Medians, and the median of the
ratios of neighbours with their range. The last line is one JSON document. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench_speed import context_tokens, cpu_name

from kvcompose_gguf import Llama

N_DECODE = 64


def measure(model: str, n_tokens: int, threads: int) -> dict[str, float]:
    """Returns the seconds of each kind of work with the library that this process has loaded."""
    llama = Llama(
        model, n_ctx=n_tokens + 512, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False
    )
    tokens = context_tokens(llama, n_tokens)
    llama.eval(tokens[:300])  # warms up
    seconds = {}
    for name in ("prefill", "prefill with scores"):
        llama.reset()
        start = time.perf_counter()
        if name == "prefill":
            llama.eval(tokens)
        else:
            with llama.session.scoring("max", n_tokens, 64 << 20):
                llama.eval(tokens)
        seconds[name] = time.perf_counter() - start
    start = time.perf_counter()
    for token in tokens[:N_DECODE]:
        llama.eval([token])
    return seconds | {"decoding": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a .gguf file")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--n-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.model, args.n_tokens, args.threads)))
        return

    samples: dict[str, list[dict[str, float]]] = {str(folder): [] for folder in args.folders}
    for _ in range(args.repeats):
        for folder, results in samples.items():
            env = os.environ | {"LLAMA_CPP_LIB_PATH": str(Path(folder).resolve())}
            command = [sys.executable, *sys.argv, "--measure"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{args.model}, {args.n_tokens} tokens, {cpu_name()}, {args.threads} threads, {args.repeats} in turn")
    base, *others = samples
    for kind in samples[base][0]:
        for folder in others:
            pairs = list(zip(samples[base], samples[folder], strict=True))
            ratios = [a[kind] / b[kind] for a, b in pairs]
            a, b = (statistics.median(result[kind] for result in samples[side]) for side in (base, folder))
            print(f"{kind}: {a:.2f} s, {folder} {b:.2f} s, speed {statistics.median(ratios):.3f} "
                  f"({min(ratios):.2f}-{max(ratios):.2f})")  # fmt: skip
    facts = {"model": Path(args.model).name, "n_tokens": args.n_tokens, "threads": args.threads, "cpu": cpu_name()}
    print(json.dumps(facts | {"seconds": samples}))


if __name__ == "__main__":
    main()
