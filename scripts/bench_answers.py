#!/usr/bin/env python3
"""Does a compressed cache still know the fact?

    python scripts/bench_answers.py [--model smollm2] [--samples 20] [--modes repeat,window] [--type-kv 8]

Regime: prompts of N tokens, made of the demo document's sentences in seeded order, with one needle sentence at a seeded
depth. Each prompt is prefilled once, scored in every mode without the question, and composed at every ratio from the
same scores. Answers are greedy, 16 tokens, and right if they contain the needle's number. The last line is one JSON
document. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvcompose_gguf import KVCompose, Llama
from kvcompose_gguf.cli.demo.questions import document
from kvcompose_gguf.models.resolve import resolve_model

RATIOS = (0.5, 0.75, 0.9)
MODES: dict[str, dict[str, Any]] = {
    "repeat": {},
    "repeat-1/2": {"scoring_fraction": 0.5},
    "repeat-1/4": {"scoring_fraction": 0.25},
    "repeat-1/8": {"scoring_fraction": 0.125},
    "window": {"scoring": "window"},
    "prefill": {"scoring": "prefill", "agg_task": "mean"},
    "prefill-max": {"scoring": "prefill"},
}
PLACES = ("boathouse", "library", "old mill", "north gate", "wine cellar", "bakery", "chapel", "greenhouse")


def haystack(llama: Llama, n_tokens: int, seed: int) -> tuple[list[int], str, str]:
    """Returns the context tokens, the sentence to finish, and the number that finishes it."""
    rng = np.random.default_rng(seed)
    sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s+", document().replace("#", "")) if len(s.strip()) > 20]
    sentences = [sentences[i] for i in rng.permutation(len(sentences))]
    place, number = PLACES[seed % len(PLACES)], str(rng.integers(1000, 10000))
    question = f"The secret number of the {place} is"
    text, used = [], 0
    budget = n_tokens - len(llama.context.vocabulary.tokens(f"{question} {number}."))
    for sentence in sentences:
        used += len(llama.context.vocabulary.tokens(" " + sentence))
        if used > budget:
            break
        text.append(sentence)
    text.insert(int(rng.integers(1, len(text))), f"{question} {number}.")
    return llama.prompt_tokens(" ".join(text)), question, number


def answer(llama: Llama, prompt: list[int], n: int = 16) -> str:
    out: list[int] = []
    for token in llama.generate(prompt, temp=0.0):
        out.append(token)
        if len(out) == n:
            break
    return str(llama.detokenize(out), errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a fetched model's name or a .gguf file")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--n-tokens", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--modes", default="repeat", help=f"of {', '.join(MODES)}")
    parser.add_argument("--type-kv", type=int, default=1, help="ggml type of keys and values: 1 f16, 8 q8_0, 2 q4_0")
    args = parser.parse_args()
    modes = {name: MODES[name] for name in args.modes.split(",")}

    path = str(resolve_model(args.model))
    plain = KVCompose(compression_ratio=0.5, keep_last=0, scoring="repeat")
    llama = Llama(
        path, n_ctx=args.n_tokens + 640, n_threads=args.threads, n_threads_batch=args.threads, flash_attn=True,
        kv_compressor=plain, type_k=args.type_kv, type_v=args.type_kv, verbose=False,
    )  # fmt: skip
    right = dict.fromkeys(["full", *(f"{mode} {ratio:g}" for mode in modes for ratio in RATIOS)], 0)
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    n_bytes: dict[str, int] = {}
    start = time.perf_counter()
    for seed in range(args.samples):
        context, question, number = haystack(llama, args.n_tokens, seed)
        prompt = context + llama.context.vocabulary.tokens("\n\n" + question)
        llama.reset()
        llama.context.prefill(context)
        state = llama.save_state()
        n_bytes["full"] = llama.kv_bytes
        marks = {"full": number in answer(llama, prompt)}
        for mode, options in modes.items():
            method = replace(plain, **options)
            llama.load_state(state)
            begin = time.perf_counter()
            evidence = llama.observe(context, method)
            seconds[mode].append(time.perf_counter() - begin)
            for ratio in RATIOS:
                llama.load_state(state)
                llama.compose(replace(method, compression_ratio=ratio).plan(evidence))
                n_bytes[f"{ratio:g}"] = llama.kv_bytes
                marks[f"{mode} {ratio:g}"] = number in answer(llama, prompt)
        for name, mark in marks.items():
            right[name] += mark
        print(f"sample {seed}: {len(context)} tokens", *(f"{k}:{int(v)}" for k, v in marks.items()), flush=True)
    result = {
        "model": Path(path).name, "samples": args.samples, "n_tokens": args.n_tokens, "type_kv": args.type_kv,
        "right": right, "kv_bytes": n_bytes,
        "scoring_seconds": {mode: round(float(np.median(values)), 2) for mode, values in seconds.items()},
        "seconds": round(time.perf_counter() - start),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
