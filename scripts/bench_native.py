#!/usr/bin/env python3
"""What do scores, scoring modes and the elastic cache cost, relative to the same work without them?

    python scripts/bench_native.py [MODEL] [--n-tokens 2048,8000] [--repeats 5] [--threads 2]

* scores: one decode of 512 tokens on top of N (KVCompose's repeat), with scoring, without scoring on the package's
  flash attention, and without scoring on llama.cpp's own;
* modes: a whole prefill, and the time that each mode adds to it;
* elastic: prefill and decoding with a cache that grows, and with one that is allocated at once.

The sides alternate within one process, with one warm-up each; medians. The last line of output is a JSON document.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kvcompose_gguf import KVCompose, Llama
from kvcompose_gguf.models.resolve import resolve_model

CHUNK = 512
N_DECODE = 64


def alternate(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each side, which run ``repeats`` times in turn after a warm-up."""
    for side in sides.values():
        side()
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            samples[name].append(round(side(), 4))
    return samples


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def show(title: str, samples: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Prints medians, and ratios to ``base`` sample by sample; returns them for the document."""
    out: dict[str, Any] = {"samples": samples, "ratio": {}}
    for name, values in samples.items():
        ratios = [value / other for value, other in zip(values, samples[base], strict=True)]
        out["ratio"][name] = round(statistics.median(ratios), 3)
        print(
            f"{title}: {name:28} {statistics.median(values):8.3f} s   {out['ratio'][name]:.3f} x {base} "
            f"({min(ratios):.2f}-{max(ratios):.2f})",
            flush=True,
        )
    return out


def bench_scores(make: Callable[..., Llama], ids: list[int], repeats: int) -> dict[str, Any]:
    llama = make(len(ids) + CHUNK + 256)
    llama.context.prefill(ids)
    session, n = llama.session, len(ids)
    session.reserve(n + CHUNK)

    def decode(fast: bool, scored: bool) -> None:
        session.set_fast_attention(fast)
        with llama.context.on_top():
            if scored:
                with session.scoring("max", n, 64 << 20):
                    llama.context.decode(ids[:CHUNK], n)
            else:
                llama.context.decode(ids[:CHUNK], n)

    sides = {
        "llama.cpp's attention": lambda: timed(lambda: decode(False, False)),
        "our attention": lambda: timed(lambda: decode(True, False)),
        "our attention with scores": lambda: timed(lambda: decode(True, True)),
    }
    samples = alternate(sides, repeats)
    llama.close()
    return show(f"decode of {CHUNK} at {n}", samples, "llama.cpp's attention")


def bench_modes(make: Callable[..., Llama], ids: list[int], repeats: int) -> dict[str, Any]:
    n = len(ids)
    llama = make(n + CHUNK + 256)

    def prefill() -> None:
        llama.kv_compressor = None
        llama.reset()
        llama.eval(ids)

    def mode(**options: Any) -> Callable[[], float]:
        def run() -> None:
            llama.kv_compressor = KVCompose(compression_ratio=0.75, **options)
            llama.reset()
            llama.compress(ids)

        return lambda: timed(run)

    sides = {
        "prefill alone": lambda: timed(prefill),
        "prefill": mode(scoring="prefill", agg_task="mean"),
        "window": mode(scoring="window"),
        "repeat 1/8": mode(scoring_fraction=0.125),
        "repeat 1/4": mode(scoring_fraction=0.25),
        "repeat 1/2": mode(scoring_fraction=0.5),
        "repeat": mode(scoring="repeat"),
    }
    samples = alternate(sides, repeats)
    llama.close()
    return show(f"prefill, scores and compose of {n}", samples, "prefill alone")


def bench_elastic(make: Callable[..., Llama], ids: list[int], n_ctx: int, repeats: int) -> dict[str, Any]:
    caches = {elastic: make(n_ctx, elastic=elastic) for elastic in (False, True)}
    seconds: dict[str, Callable[[], float]] = {}
    for elastic, llama in caches.items():
        name = "elastic" if elastic else "fixed"

        def prefill(llama: Llama = llama) -> None:
            llama.reset()
            llama.eval(ids)

        def steps(llama: Llama = llama) -> None:
            llama.reset()
            for first in range(0, len(ids), 256):  # too few at a time to allocate room for all at once
                llama.eval(ids[first : first + 256])

        def decode(llama: Llama = llama) -> None:
            with llama.context.undone():
                for token in ids[:N_DECODE]:
                    llama.eval([token])

        seconds[f"{name} in steps"] = functools.partial(timed, steps)
        seconds[f"{name} prefill"] = functools.partial(timed, prefill)
        seconds[f"{name} decode"] = functools.partial(timed, decode)
    samples = alternate(seconds, repeats)
    n_bytes = {str(elastic): llama.kv_bytes for elastic, llama in caches.items()}
    out: dict[str, Any] = {}
    for kind in ("in steps", "prefill", "decode"):
        sides = {name: values for name, values in samples.items() if name.endswith(kind)}
        out[kind] = show(f"{len(ids)} in n_ctx={n_ctx}", sides, f"fixed {kind}")
    for llama in caches.values():
        llama.close()
    return out | {"kv_bytes": n_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2", help="a .gguf file or a name; default: smollm2")
    parser.add_argument("--n-tokens", default="2048,8000")
    parser.add_argument("--parts", default="scores,modes,elastic")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--type-kv", type=int, default=1, help="ggml type: 1 f16, 8 q8_0")
    args = parser.parse_args()
    path = str(resolve_model(args.model))

    def make(n_ctx: int, **options: Any) -> Llama:
        gc.collect()
        return Llama(
            path, n_ctx=n_ctx, flash_attn=True, n_threads=args.threads, n_threads_batch=args.threads,
            type_k=args.type_kv, type_v=args.type_kv, verbose=False, **options,
        )  # fmt: skip

    document: dict[str, Any] = {
        "model": path.rsplit("/", 1)[-1], "threads": args.threads, "type_kv": args.type_kv, "cpu": cpu(),
        "results": {},
    }  # fmt: skip
    for n in map(int, args.n_tokens.split(",")):
        ids = np.random.default_rng(0).integers(100, 40000, n).tolist()
        repeats = args.repeats if n <= 4096 else max(1, args.repeats // 2)
        results = document["results"][n] = {}
        if "scores" in args.parts:
            results["scores"] = bench_scores(make, ids, args.repeats)
        if "modes" in args.parts:
            results["modes"] = bench_modes(make, ids, max(1, repeats // 2))
        if "elastic" in args.parts:
            results["elastic"] = bench_elastic(make, ids, 4 * n, repeats)
    print(json.dumps(document))


def cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
