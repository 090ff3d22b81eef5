#!/usr/bin/env python3
"""Does a long conversation below a ceiling stay cheap, and does it remember what was said?

    python scripts/long_conversation.py MODEL [--turns 40] [--share 0.25] [--document 1500]

Regime: two objects in one process, without compression and with a ceiling of a share of what the conversation would
have in a full cache at its end. Both get the same turns: first a document, then in every turn one fact ("The code of
the red door is 4821."), and a question about an earlier fact. The answers of the full cache are forced on both, so that
the conversations stay the same. At the end every fact is asked for once more, each time from the same state. "Read" is
the number of tokens that a turn evaluates; it should be that of its new tokens. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from typing import Any

from bench_speed import context_tokens

from kvcompose_gguf import KVCompose, Llama
from kvcompose_gguf.load import load_model
from kvcompose_gguf.models.resolve import resolve_model

COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey")
THINGS = ("door", "box", "car", "bag", "room", "desk", "lamp", "boat")
N_ANSWER = 24


class Side:
    """One of the two objects, and what it has read."""

    def __init__(self, llama: Llama) -> None:
        self.llama, self.n_read, self.peak = llama, 0, 0
        llama.context.through = self._through

    def _through(self, decode: Any, n_tokens: int) -> None:
        decode()
        self.n_read += n_tokens
        self.peak = max(self.peak, self.llama.kv_bytes)

    def answer(self, prompt: list[int]) -> tuple[float, list[int]]:
        """Returns the seconds to the first token, and the greedy answer."""
        start = time.perf_counter()
        stream = self.llama.generate(prompt, temp=0.0)
        tokens = [next(stream)]
        seconds = time.perf_counter() - start
        while len(tokens) < N_ANSWER and not self.llama.is_end(tokens[-1]):
            tokens.append(next(stream))
        stream.close()
        return seconds, tokens

    def text(self, tokens: list[int]) -> str:
        """Returns the text of an answer."""
        return str(self.llama.detokenize(tokens).decode("utf-8", "replace"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a fetched model's name or a .gguf file")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--document", type=int, default=1500, help="tokens of the document")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()

    rng = random.Random(1)
    names = rng.sample([f"{colour} {thing}" for colour in COLOURS for thing in THINGS], args.turns)
    facts = {name: str(rng.randint(1000, 9999)) for name in names}
    path, n_ctx = resolve_model(args.model), args.document + 160 * args.turns
    plain = Side(load_model(path, n_ctx, None, fast_attention=True, threads=args.threads))
    tokens = plain.llama.tokenize
    body = context_tokens(plain.llama, args.document)

    def framed(text: str) -> list[int]:
        turn = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        return list(tokens(turn.encode(), add_bos=False, special=True))

    def said(name: str, asked: str) -> list[int]:
        text = (
            f"<|im_start|>user\nThe code of the {name} is {facts[name]}. What is the code of the {asked}?<|im_end|>\n"
        )
        return framed(text)

    end = list(tokens(b"<|im_end|>\n", add_bos=False, special=True))
    n_turn = len(said(names[0], names[0])) + N_ANSWER // 2
    n_kept = args.share * (args.document + n_turn * args.turns)
    ours = Side(load_model(path, n_ctx, KVCompose(n_kept=n_kept), fast_attention=True, threads=args.threads))
    for prompt in (body[:1000], body[-1000:]):  # two prompts teach the scores
        ours.llama.compress(prompt)
        ours.llama.reset()
    ours.peak = 0

    conversation = list(tokens(b"<|im_start|>user\n", add_bos=False, special=True)) + list(body) + end
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        asked = names[rng.randint(max(0, number - 5), number)]
        conversation += said(name, asked)
        row: dict[str, Any] = {"tokens": len(conversation)}
        forced: list[int] = []
        for label, side in (("plain", plain), ("ours", ours)):
            side.n_read = 0
            seconds, answer = side.answer(conversation)
            found = facts[asked] in side.text(answer)
            row |= {f"{label}_read": side.n_read, f"{label}_seconds": seconds, f"{label}_right": found}
            forced = forced or answer
        rows.append(row)
        ended = plain.llama.is_end(forced[-1])
        conversation += forced[:-1] if ended else forced
        conversation += end
    right = {"plain": 0, "ours": 0}
    for name in names:
        prompt = conversation + framed(f"What is the code of the {name}?")
        for label, side in (("plain", plain), ("ours", ours)):
            right[label] += facts[name] in side.text(side.answer(prompt)[1])

    half = len(rows) // 2
    print(f"{args.turns} turns, {len(conversation)} tokens, ceiling {n_kept:.0f} rows a layer")
    print("| | first token, first and second half of the turns | read in a turn | right in turns, at the end | KV |")
    print("|---|---|---|---|---|")
    for label, side in (("plain", plain), ("ours", ours)):
        halves = (statistics.median(row[f"{label}_seconds"] for row in part) for part in (rows[1:half], rows[half:]))
        in_turns, most = sum(row[f"{label}_right"] for row in rows), max(row[f"{label}_read"] for row in rows[1:])
        print(f"| {label} | {', '.join(f'{seconds:.2f}' for seconds in halves)} s | at most {most} tokens | "
              f"{in_turns} of {len(rows)}, {right[label]} of {len(names)} | {side.peak / 1e6:.1f} MB |")  # fmt: skip
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
