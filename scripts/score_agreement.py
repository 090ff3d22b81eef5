#!/usr/bin/env python3
"""How well do cheap scores agree with the repeat's?

    python scripts/score_agreement.py MODEL [--n-tokens 2048] [--samples 6]

Measures on contexts of RULER's tasks, for every layer and KV head: Spearman's rank correlation with the whole repeat's
scores; and, at 50, 75 and 87.5 % removed, the share of the kept tokens that the repeat also keeps if every layer keeps
the same number. Means over heads, layers and contexts. The method ``learned`` learns from these contexts in their
order, after what is known in the user's cache (XDG_CACHE_HOME).
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from kvcompose_gguf.load import load_model
from kvcompose_gguf.methods import make_method
from kvcompose_gguf.models.resolve import resolve_model
from kvcompose_gguf.support.ranks import rank_correlation
from kvcompose_gguf.tasks.prompts import chat_frame, prompt_tokens, sample_for
from kvcompose_gguf.tasks.texts import load_texts

RATIOS = (0.5, 0.75, 0.875)
TASKS = ("niah_single_2", "niah_multikey_1", "niah_single_3", "niah_multiquery", "qa_1", "niah_multivalue")
REPEAT = "kvcompose,scoring=repeat,scoring_chunk=None"
METHODS = (
    "kvcompose,scoring=learned", "kvcompose,scoring=learned,spot_check=0.0", "kvcompose,scoring=repeat",
    "kvcompose,scoring=repeat,in_place=True", "kvcompose,scoring=repeat,in_place=True,scoring_fraction=0.25",
    "kvcompose,scoring=window",
    "kvcompose,scoring=prefill,agg_task=mean", "knorm", "keydiff", "expected-attention", "snapkv", "random",
)  # fmt: skip


def overlap(a: np.ndarray, b: np.ndarray, ratio: float) -> float:
    n_kept = max(1, round(len(a) * (1 - ratio)))
    first, second = (np.argsort(-values, kind="stable")[:n_kept] for values in (a, b))
    return len(np.intersect1d(first, second, assume_unique=True)) / n_kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a fetched model's name or a .gguf file")
    parser.add_argument("--n-tokens", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--seed", type=int, default=51)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    path, texts = resolve_model(args.model), load_texts("auto")
    methods = {spec: make_method(spec, compression_ratio=0.5).for_model(path) for spec in (REPEAT, *METHODS)}
    llama = load_model(path, 2 * args.n_tokens + 512, fast_attention=True, threads=args.threads)
    figures: dict[str, list[list[float]]] = {spec: [] for spec in METHODS}
    seconds: dict[str, list[float]] = {spec: [] for spec in methods}
    for number in range(args.samples):
        sample = sample_for(llama, TASKS[number % len(TASKS)], args.n_tokens, number, args.seed, texts)
        context, _ = prompt_tokens(llama, sample, chat_frame(llama))
        scores = {}
        for spec, method in methods.items():
            if method.attention_request is None or "prefill" not in spec:
                llama.prefill(context)  # not part of the method's seconds
            start = time.perf_counter()
            evidence = llama.observe(context, method)
            scores[spec] = method.informed().taught_by(evidence).scores(evidence)
            seconds[spec].append(time.perf_counter() - start)
        for spec in METHODS:
            rows = []
            for mine, wanted in zip(scores[spec], scores[REPEAT], strict=True):
                for a, b in zip(mine, wanted, strict=True):
                    a = np.nan_to_num(a, posinf=float(np.finfo(np.float32).max))
                    rows.append([float(rank_correlation(a, b)), *(overlap(a, b, ratio) for ratio in RATIOS)])
            figures[spec].append(np.mean(rows, axis=0).tolist())
        print(f"{number + 1} of {args.samples}: {sample.task}, {len(context)} tokens", flush=True)
    print(f"{'':45s} seconds  rank  " + "  ".join(f"{ratio:.1%}" for ratio in RATIOS))
    result = {}
    for spec in METHODS:
        row = np.mean(figures[spec], axis=0)
        result[spec] = {"seconds": float(np.median(seconds[spec])), "rank": row[0], "overlap": row[1:].tolist()}
        shares = "  ".join(f"{share:5.1%}" for share in row[1:])
        print(f"{spec:45s} {np.median(seconds[spec]):7.2f}  {row[0]:.2f}  {shares}")
    print(json.dumps({"model": path.name, "n_tokens": args.n_tokens, "samples": args.samples, "methods": result}))


if __name__ == "__main__":
    main()
