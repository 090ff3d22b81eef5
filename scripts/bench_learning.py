#!/usr/bin/env python3
"""How long do the first prompts of a model take, while KVCompose learns to predict its scores?

    XDG_CACHE_HOME=NEW_FOLDER python scripts/bench_learning.py MODEL [--n-tokens 2048] [--prompts 6] [--ratio 0.5]

Every prompt is one of RULER's, with its question. It is read by two objects in turn: without compression, with the same
attention kernel, and with ``KVCompose(scoring="auto")``. The time is that to the first token. ``right`` says whether
the answer of each has all that was asked for. A last prompt is read with ``spot_check=0``. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvcompose_gguf import KVCompose, Llama
from kvcompose_gguf.load import load_model
from kvcompose_gguf.models.resolve import resolve_model
from kvcompose_gguf.tasks.prompts import chat_frame, prompt_tokens, sample_for
from kvcompose_gguf.tasks.texts import load_texts

TASKS = ("niah_single_2", "niah_multikey_1", "qa_1", "niah_multiquery", "niah_single_3", "vt")


def answer(llama: Llama, prompt: list[int], n_tokens: int) -> tuple[float, str]:
    """Returns the seconds to the first token of a greedy answer, and the answer's text."""
    llama.reset()
    start = time.perf_counter()
    stream = llama.generate(prompt, temp=0.0)
    tokens = [next(stream)]
    seconds = time.perf_counter() - start
    for token in stream:
        if llama.is_end(token) or len(tokens) >= n_tokens:
            break
        tokens.append(token)
    stream.close()
    return seconds, llama.detokenize(tokens).decode("utf-8", "replace")


def is_right(text: str, references: Sequence[str]) -> bool:
    return all(reference.lower() in text.lower() for reference in references)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a fetched model's name or a .gguf file")
    parser.add_argument("--n-tokens", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    path: Path = resolve_model(args.model)
    method = KVCompose(compression_ratio=args.ratio)
    plain, ours = (
        load_model(path, args.n_tokens + 2048, each, fast_attention=True, threads=args.threads)
        for each in (None, method)
    )
    frame, texts, rows = chat_frame(plain), load_texts("auto"), []
    print("| prompt | tokens | scores | first token: without, with | ratio | right: without, with |")
    print("|---|---|---|---|---|---|")
    for number in range(args.prompts + 1):
        if number == args.prompts:
            ours.kv_compressor = replace(method, spot_check=0.0)
        sample = sample_for(plain, TASKS[number % len(TASKS)], args.n_tokens, number, args.seed, texts)
        context, question = prompt_tokens(plain, sample, frame)
        prompt = context + question
        order = (plain, ours) if number % 2 else (ours, plain)
        told = {id(llama): answer(llama, prompt, sample.max_tokens) for llama in order}
        (without, theirs), (seconds, text) = told[id(plain)], told[id(ours)]
        report = ours.kv_report
        assert report is not None
        row: dict[str, Any] = {
            "task": sample.task, "tokens": len(prompt), "scoring": report.scoring,
            "score_seconds": report.score_seconds, "prefill_seconds": report.prefill_seconds, "without": without,
            "with": seconds,
            "right": [is_right(theirs, sample.references), is_right(text, sample.references)],
        }  # fmt: skip
        rows.append(row)
        right = ", ".join("yes" if each else "no" for each in row["right"])
        print(
            f"| {number + 1} {sample.task} | {len(prompt)} | {report.scoring}, {report.score_seconds:.1f} s "
            f"| {without:.1f}, {seconds:.1f} s | {seconds / without:.2f} | {right} |",
            flush=True,
        )
    print(json.dumps({"model": path.name, "n_tokens": args.n_tokens, "ratio": args.ratio, "prompts": rows}))


if __name__ == "__main__":
    main()
