#!/usr/bin/env python3
"""How well does what was learnt from some texts predict the scores of others?

    python scripts/learning_transfer.py MODEL [--n-tokens 1024] [--test-tokens 1024] [--learn-with OTHER.gguf]

Learns from two texts of every kind, and predicts one text of each other kind: alone, and with the check that
``scoring="learned"`` makes of it. Compares with the whole repeat (``--reference``): Spearman's rank correlation; the
same tokens kept in a head if every layer keeps as many; the correlation of the layers' budgets; the same tokens in the
whole plan. Means over the texts, at 50, 75 and 87.5 % removed. Nothing that was learnt before is used.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvcompose_gguf import KVCompose, Llama
from kvcompose_gguf.learning import passages
from kvcompose_gguf.learning.quality import compare
from kvcompose_gguf.load import load_model
from kvcompose_gguf.methods.predictor import Predictor
from kvcompose_gguf.models.resolve import resolve_model
from kvcompose_gguf.native.family import family_of
from kvcompose_gguf.tasks.prompts import chat_frame, prompt_tokens, sample_for
from kvcompose_gguf.tasks.texts import load_texts

RATIOS = (0.5, 0.75, 0.875)
REPEAT = KVCompose(compression_ratio=0.5, scoring="repeat", learn=False, add_mean_across_heads=False)
REFERENCES = {
    "whole": replace(REPEAT, scoring_chunk=None),
    "in-place": replace(REPEAT, in_place=True),
    "chunks": REPEAT,
}
LEARNED = KVCompose(compression_ratio=0.5, scoring="learned", learn=False, add_mean_across_heads=False)


def text(llama: Llama, kind: str, n_tokens: int, seed: int) -> list[int]:
    """Returns the tokens of a text; the kind ``task:NAME`` is the context of one of RULER's."""
    if kind.startswith("task:"):
        sample = sample_for(llama, kind.removeprefix("task:"), n_tokens, seed, 0, load_texts("auto"))
        return prompt_tokens(llama, sample, chat_frame(llama))[0]
    return passages.text_of_kind(llama, kind, random.Random(seed), n_tokens)


def learnt(llama: Llama, method: KVCompose, texts: Sequence[list[int]]) -> KVCompose:
    """Returns the method after these prompts."""
    for tokens in texts:
        llama.reset()
        method = method.taught_by(llama.observe(tokens, method))
    return method


def row(figures: Sequence[dict[str, Any]]) -> list[float]:
    """Returns the means of ``compare``: rank, overlap of heads at each ratio, budgets, whole plans at each ratio."""
    overlap = np.mean([np.mean(each["overlap"], axis=0) for each in figures], axis=0)
    kept = np.mean([each["kept"] for each in figures], axis=0)
    rank, budgets = (float(np.mean([np.mean(each[name]) for each in figures])) for name in ("rank", "budgets"))
    return [rank, *overlap.tolist(), budgets, *kept.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a fetched model's name or a .gguf file")
    parser.add_argument("--learn-with", help="another file of the same model, to learn with")
    parser.add_argument("--learn", default=",".join(passages.KINDS), help="kinds of texts, or task:NAME of RULER's")
    parser.add_argument("--test", default=",".join(passages.KINDS))
    parser.add_argument("--n-tokens", type=int, default=1024)
    parser.add_argument("--test-tokens", type=int, default=1024)
    parser.add_argument("--n-learn", type=int, default=2, help="texts to learn from, of each kind")
    parser.add_argument("--reference", default="whole", choices=list(REFERENCES))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    os.environ["KVCOMPOSE_LEARN"] = "off"
    path = resolve_model(args.model)
    teacher = Path(args.learn_with) if args.learn_with else path
    print("the same family:", family_of(path) == family_of(teacher))
    n_ctx = 2 * max(args.n_tokens, args.test_tokens) + 512
    llama = load_model(teacher, n_ctx, fast_attention=True, threads=args.threads)
    empty = replace(LEARNED, predictor=Predictor("")).informed()
    methods = {
        kind: learnt(llama, empty, [text(llama, kind, args.n_tokens, seed) for seed in range(args.n_learn)])
        for kind in args.learn.split(",")
    }
    if teacher != path:
        llama.close()
        llama = load_model(path, n_ctx, fast_attention=True, threads=args.threads)
    alone: dict[str, list[dict[str, Any]]] = {kind: [] for kind in methods}
    checked: dict[str, list[dict[str, Any]]] = {kind: [] for kind in methods}
    notes: dict[str, list[str]] = {kind: [] for kind in methods}
    for number, kind in enumerate(args.test.split(",")):
        tokens = text(llama, kind, args.test_tokens, 100 + number)
        reference = REFERENCES[args.reference]
        llama.reset()
        evidence = llama.observe(tokens, reference)
        wanted = reference.scores(evidence)
        checks: dict[str, Any] = {}
        for taught, method in methods.items():
            if taught == kind and len(methods) > 1:
                continue
            request = method.attention_request
            if repr(request) not in checks:
                checks[repr(request)] = llama.observe(tokens, method)
            seen = checks[repr(request)]
            prediction = method.predictor.predict(evidence, ())
            alone[taught].append(compare(prediction, wanted, evidence, RATIOS))
            moved = method.taught_by(seen)
            notes[taught].append(moved.note)
            checked[taught].append(compare(moved.scores(seen), wanted, evidence, RATIOS))
        print(f"{kind}: {len(tokens)} tokens", flush=True)
    print("| learnt from | | rank | same tokens in a head | budgets | same tokens in the plan |")
    print("|---|---|---|---|---|---|")
    result: dict[str, Any] = {}
    for taught in methods:
        for name, figures in (("alone", alone[taught]), ("checked", checked[taught])):
            values = row(figures)
            result.setdefault(taught, {})[name] = values
            heads, plans = (" / ".join(f"{100 * share:.0f}" for share in part) for part in (values[1:4], values[5:]))
            print(f"| {taught} | {name} | {values[0]:.2f} | {heads} % | {values[4]:.2f} | {plans} % |")
        print(f"|  | {'; '.join(notes[taught])} |||||")
    means = {
        name: np.mean([each[name] for each in result.values()], axis=0).round(3).tolist()
        for name in ("alone", "checked")
    }
    print(json.dumps({"model": path.name, **vars(args), "means": means, "rows": result}))


if __name__ == "__main__":
    main()
