#!/usr/bin/env python3
"""Does a model still know what was said once in a long text: with a full cache, read as a whole, or read in parts?

    python scripts/pass_keys.py MODEL [--n-tokens 4000] [--ratio 0.875] [--caches whole,512] [--texts 2]

Regime: every text has five pass keys, at 10, 30, 50, 70 and 90 % of it. It is read, and each key is asked for behind
the same cache. "Found" is whether the model says the key, greedily, in the order of the text; "nats" is the sum of
-log p of the key's tokens, the mean over the keys, which tells more of a few questions. The full cache comes first,
then learned scores with the given ``chunk`` ("whole": nothing is evicted before all is read; "default": the one of
``compression_ratio``), or the scores of the repeat ("repeat"). A prompt of 1,500 tokens, read twice, teaches, or what
earlier runs have kept: use an empty XDG_CACHE_HOME. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from typing import Any

import numpy as np
from bench_speed import context_tokens, cpu_name

from kvcompose_gguf import KVCompose, Llama
from kvcompose_gguf.load import load_model
from kvcompose_gguf.models.resolve import resolve_model

#: where the pass keys are in a text, and who has the first text's
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
KEYS = {"Anna": 5820947, "Boris": 3196402, "Clara": 7045318, "David": 9461275, "Elena": 2683590}

#: the prompt that teaches, and the tokens of an answer that has a pass key
N_FIRST, N_KEY = 1500, 12


def keys_of(text: int) -> dict[str, int]:
    """Returns the pass keys of a text; 0 is the first."""
    draw = random.Random(text)
    return {name: draw.randrange(10**6, 10**7) for name in KEYS} if text else KEYS


def with_keys(llama: Llama, tokens: list[int], keys: dict[str, int]) -> list[int]:
    """Returns ``tokens`` with the pass keys in between, cut to their length."""
    out, n_done = [], 0
    for depth, (name, key) in zip(DEPTHS, keys.items(), strict=True):
        place = int(depth * len(tokens))
        fact = f"\nThe pass key of {name} is {key}. Remember it.\n"
        out += [*tokens[n_done:place], *llama.tokenize(fact.encode(), add_bos=False)]
        n_done = place
    return (out + tokens[n_done:])[: len(tokens)]


def found_keys(llama: Llama, keys: dict[str, int]) -> list[bool]:
    """Returns for every pass key whether the model says it when it is asked behind what the cache holds."""
    out = []
    for name, key in keys.items():
        said: list[int] = []
        with llama.context.undone():
            logits = llama.context.eval_logits(_question(llama, name))
            while len(said) < N_KEY:
                said.append(int(logits[-1].argmax()))
                logits = llama.context.eval_logits(said[-1:])
        out.append(str(key) in llama.detokenize(said).decode(errors="replace"))
    return out


def nats_of_keys(llama: Llama, keys: dict[str, int]) -> list[float]:
    """Returns for every pass key the sum of -log p of its tokens, behind the question."""
    out = []
    for name, key in keys.items():
        answer = llama.tokenize(f" {key}".encode(), add_bos=False)
        with llama.context.undone():
            logits = llama.context.eval_logits(_question(llama, name) + answer[:-1])[-len(answer) :].astype(np.float64)
        log_sums = np.logaddexp.reduce(logits, axis=1)
        out.append(float((log_sums - logits[np.arange(len(answer)), answer]).sum()))
    return out


def _question(llama: Llama, name: str) -> list[int]:
    tokens: list[int] = llama.tokenize(
        f"\n\nWhat is the pass key of {name}? The pass key of {name} is".encode(), add_bos=False
    )
    return tokens


def method_of(cache: str, args: argparse.Namespace) -> KVCompose:
    """Returns the method that leaves a cache of this name."""
    if cache == "repeat":
        return KVCompose(compression_ratio=args.ratio, scoring="repeat")
    chunk = None if cache == "default" else args.n_tokens if cache == "whole" else int(cache)
    return KVCompose(compression_ratio=args.ratio, spot_check=args.spot_check, learn=False, chunk=chunk)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns for every text and cache what was found; prints it."""
    path = resolve_model(args.model)
    llama = load_model(path, args.n_tokens + 1024, None, fast_attention=True, threads=args.threads)
    tokens = context_tokens(llama, N_FIRST + args.texts * args.n_tokens)
    llama.kv_compressor = teacher = KVCompose(compression_ratio=args.ratio, spot_check=0)
    while not teacher.for_model(path).informed().predictor.is_trusted:
        llama.reset()
        llama.compress(tokens[:N_FIRST])

    out = []
    for text in range(args.texts):
        first, keys = N_FIRST + text * args.n_tokens, keys_of(text)
        prompt = with_keys(llama, tokens[first : first + args.n_tokens], keys)
        for cache in ("full", *args.caches.split(",")):
            if cache != "whole":
                llama.reset()
            if cache == "full":
                llama.kv_compressor = None
                llama.prefill(prompt)
            else:  # "whole" goes on from the full cache
                llama.kv_compressor = method_of(cache, args)
                llama.compress(prompt)
            found, nats = found_keys(llama, keys), nats_of_keys(llama, keys)
            marks = "".join("+" if hit else "-" for hit in found)
            print(f"text {text}, {cache:>6}: {marks} {sum(nats) / len(nats):5.2f} nats", flush=True)
            out.append({"text": text, "cache": cache, "found": found, "nats": nats})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a fetched model's name or a .gguf file")
    parser.add_argument("--n-tokens", type=int, default=4000)
    parser.add_argument("--ratio", type=float, default=0.875)
    parser.add_argument("--caches", default="whole,512,1024")
    parser.add_argument(
        "--spot-check", type=float, help="the share of the text that is repeated (without: the default)"
    )
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    print(f"{args.model}, {args.n_tokens} tokens, {args.ratio:.1%} removed, {cpu_name()}, {args.threads} threads")
    print(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
