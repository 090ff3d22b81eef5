#!/usr/bin/env python3
"""What does an answer lose that is much longer than its ceiling?

    python scripts/long_answers.py MODEL [--n-answer 4000] [--share 0.25] [--document 1500] [--newest 1024,256,64]

Regime: a document, then an answer: with a full cache, and below ceilings of a share of what the full cache has at the
end. The ceilings differ in how many of the newest tokens of the answer stay (``n_answer``, at most a quarter of the
budget). Forced: all get the same text as their answer. KL is the divergence of the next token from the full cache's,
loss that of the text; means over the first and the last quarter of the answer. Free: every side samples its own answer;
its end is forbidden. "Repeated" is the share of its pieces of 8 tokens that the answer had before: a model that loops
has a large one. Small models loop with their full cache, too, the more the lower the temperature.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from bench_speed import context_tokens
from llama_cpp import LogitsProcessorList

from kvcompose_gguf import KVCompose, Llama
from kvcompose_gguf.load import load_model
from kvcompose_gguf.models.resolve import resolve_model

#: tokens that are evaluated at once as a forced answer, and of a repeated piece
STEP, PIECE = 64, 8


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns log softmax of ``(n, n_vocab)``, float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    out: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return out


def forced(sides: dict[str, Llama], answer: list[int]) -> dict[str, dict[str, list[float]]]:
    """Returns for each side and each step of a forced answer the mean divergence from the full cache, and the loss."""
    found: dict[str, dict[str, list[float]]] = {name: {"kl": [], "loss": []} for name in sides}
    for first in range(0, len(answer) - STEP, STEP):
        part, after = answer[first : first + STEP], answer[first + 1 : first + STEP + 1]
        full = None
        for name, llama in sides.items():
            mine = log_probabilities(llama.context.eval_logits(part))
            full = mine if full is None else full
            found[name]["kl"].append(float((np.exp(full) * (full - mine)).sum(axis=1).mean()))
            found[name]["loss"].append(float(-mine[np.arange(STEP), after].mean()))
    return found


def free(llama: Llama, prompt: list[int], n_answer: int, seed: int, temperature: float) -> list[bool]:
    """Returns for every piece of an answer whether it had that piece before."""
    ends = [token for token in range(llama.n_vocab()) if llama.is_end(token)]

    def without_end(tokens: Any, logits: Any) -> Any:
        logits[ends] = -np.inf
        return logits

    llama.set_seed(seed)
    stream = llama.generate(prompt, temp=temperature, logits_processor=LogitsProcessorList([without_end]))
    said = [token for token, _ in zip(stream, range(n_answer), strict=False)]
    stream.close()
    had, out = set(), []
    for i in range(len(said) - PIECE + 1):
        piece = tuple(said[i : i + PIECE])
        out.append(piece in had)
        had.add(piece)
    return out


def quarters(values: Sequence[float]) -> tuple[float, float]:
    """Returns the means of the first and of the last quarter."""
    n = max(1, len(values) // 4)
    return float(np.mean(values[:n])), float(np.mean(values[-n:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a fetched model's name or a .gguf file")
    parser.add_argument("--n-answer", type=int, default=4000)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--document", type=int, default=1500, help="tokens of the document")
    parser.add_argument("--newest", default="1024,256,64")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the free answers")
    parser.add_argument("--seeds", type=int, default=2, help="free answers of each side, or 0")
    parser.add_argument("--question", default="Tell a long story that begins like this text.")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()

    path, n_all = resolve_model(args.model), args.document + args.n_answer
    full = load_model(path, n_all + 512, None, fast_attention=True, threads=args.threads)
    text = context_tokens(full, n_all)
    frames = (f"<|im_start|>user\n{args.question}\n\n", "<|im_end|>\n<|im_start|>assistant\n")
    begin, end = (list(full.tokenize(frame.encode(), add_bos=False, special=True)) for frame in frames)
    prompt, answer = begin + text[: args.document] + end, text[args.document :]
    sides = {"full cache": full}
    for newest in map(int, args.newest.split(",")):
        method = KVCompose(n_kept=args.share * n_all, n_answer=newest)
        sides[f"n_answer={newest}"] = load_model(path, n_all + 512, method, fast_attention=True, threads=args.threads)
    for llama in list(sides.values())[1:]:
        for tokens in (prompt[:1000], prompt[-1000:]):  # two prompts teach the scores
            llama.compress(tokens)
            llama.reset()

    repeated: dict[str, list[tuple[float, float]]] = {}
    for name, llama in sides.items():
        answers = [free(llama, prompt, args.n_answer, seed, args.temperature) for seed in range(args.seeds)]
        repeated[name] = [quarters(answer) for answer in answers]
        if answers:
            print(f"{name}: repeated {repeated[name]}", flush=True)
    for llama in sides.values():
        llama.reset()
        llama.eval(prompt)
    found = forced(sides, answer)
    print(f"document {args.document}, answer {args.n_answer} tokens, ceiling {args.share * n_all:.0f} rows a layer")
    print("first and last quarter of the answer; repeated: a mean of the free answers")
    print("| | KL | loss | repeated |")
    print("|---|---|---|---|")
    for name, figures in found.items():
        kl, loss = ("{:.3f}, {:.3f}".format(*quarters(figures[key])) for key in ("kl", "loss"))
        shares = "{:.0%}, {:.0%}".format(*np.mean(repeated[name], axis=0)) if args.seeds else "not measured"
        print(f"| {name} | {kl} | {loss} | {shares} |")
    print(json.dumps({"repeated": repeated, "forced": found}))


if __name__ == "__main__":
    main()
