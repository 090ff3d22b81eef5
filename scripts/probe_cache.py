#!/usr/bin/env python3
"""Prints what a checkout computes for one model and one kind of cache, as one JSON object of names and values.

    PYTHONPATH=CHECKOUT python scripts/probe_cache.py MODEL OPTIONS SPECS FOLDER [--load]

OPTIONS is a JSON object for ``Llama``, SPECS a JSON list of methods. Arrays become hashes. FOLDER gets a session file
of each method; with ``--load`` the files are there, from another run. scripts/compare_checkouts.py runs this in two
checkouts, so it uses public names only that both have.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

N_CONTEXT, N_QUESTION, N_ANSWER = 300, 24, 12

Values = dict[str, Any]
Steps = Iterator[tuple[str, Any]]

#: what a session's description says of the moment: its header holds times, so its size changes too
CHANGING = ("path", "created", "n_bytes", "report")

#: the figures of a report that do not depend on the machine's speed
FIGURES = ("n_tokens", "n_sink", "n_recent", "kv_bytes_full", "kv_bytes_kept", "kv_bytes_before", "kv_bytes",
           "n_prefilled", "scoring_chunk")  # fmt: skip


def digest(*arrays: Any) -> str:
    """Returns a hash of dtypes, shapes and bytes."""
    value = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        value.update(f"{array.dtype} {array.shape} ".encode() + array.tobytes())
    return value.hexdigest()[:24]


def logits(llama: Any) -> str:
    """Returns a hash of the logits of the last decode's last token."""
    import llama_cpp

    pointer = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
    return digest(np.ctypeslib.as_array(pointer, shape=(llama.n_vocab(),)))


def tokens(n_vocab: int, n: int, seed: int) -> list[int]:
    """Returns ``n`` tokens, with passages that come twice, as texts have them."""
    found = np.random.default_rng(seed).integers(3, n_vocab, n)
    found[n // 2 : n // 2 + n // 5] = found[: n // 5]
    return [int(token) for token in found]


def prompt(llama: Any) -> tuple[list[int], list[int]]:
    """Returns the context, and the question that follows it."""
    n_vocab = llama.n_vocab()
    return tokens(n_vocab, N_CONTEXT, 1), tokens(n_vocab, N_QUESTION, 2)


def greedy(llama: Any, prompt: list[int]) -> list[int]:
    stream = llama.generate(prompt, temp=0.0)
    with closing(stream):
        return [token for token, _ in zip(stream, range(N_ANSWER), strict=False)]


def outcome(step: Callable[[], Any]) -> Any:
    """Returns a step's value, or the error that it raised: errors are a part of the behaviour."""
    try:
        return step()
    except Exception as error:
        return f"{type(error).__name__}: {re.sub(r'/[^ ]*/', '*/', str(error))}"


def until_an_error(steps: Steps) -> Steps:
    """Yields the steps up to the first that raises, and that error in its place."""
    while (step := outcome(lambda: next(steps, None))) is not None:
        yield ("error", step) if isinstance(step, str) else step


def figures(report: Any) -> Values:
    return {name: getattr(report, name) for name in FIGURES} | {"n_kept": report.n_kept.tolist()}


def without_times(completion: Any) -> Any:
    return {name: value for name, value in completion.items() if name not in ("id", "created", "model")}


def probe_plan(llama: Any, method: Any) -> Steps:
    """Yields what a method sees of a context, and what it makes of it."""
    context, question = prompt(llama)
    evidence = llama.observe(context, method, question)
    yield "attention", digest(*evidence.attention)
    scores = method.scores(evidence)
    yield "scores", digest(*scores)
    plan = method.plan(evidence, scores)
    yield "plan", plan.n_kept.tolist()
    yield "plan cells", digest(*(plan.rows if hasattr(plan, "rows") else plan.visible))
    llama.compose(plan)
    yield "logits of the composed plan", digest(llama.eval_logits(question))


def probe_cache(llama: Any, method: Any, path: Path) -> Steps:
    """Yields a compressed cache, what it answers, and what its saved states and files bring back."""
    context, question = prompt(llama)
    llama.reset()
    llama.kv_compressor = method
    yield "compress", figures(llama.compress(context))
    yield "rows", [vars(llama.kv_cells(il)) for il in range(len(llama.kv_layers))]
    info = llama.save_session(path, {"tokens": N_CONTEXT})
    yield "session", {name: repr(value) for name, value in vars(info).items() if name not in CHANGING}
    state = llama.save_state()
    yield "state bytes", hashlib.sha256(bytes(state.llama_state)).hexdigest()[:24]
    llama.eval(question)
    yield "logits", logits(llama)
    yield "tokens", greedy(llama, context + question)
    yield "tokens of another question", greedy(llama, context + question[::-1])
    llama.load_state(state)
    yield "logits of a loaded state", digest(llama.eval_logits(question))
    llama.reset()
    llama.load_session(path)
    yield "logits of a loaded session", digest(llama.eval_logits(question))
    llama.reset()
    yield "tokens of a prompt", greedy(llama, context + question)
    yield "report of a prompt", figures(llama.kv_report)
    yield "bytes", llama.kv_bytes
    llama.kv_compressor = None
    yield "tokens without a method", greedy(llama, context + question)
    yield "bytes without a method", llama.kv_bytes
    llama.kv_compressor = method
    llama.compress(context)
    llama.eval(question)
    llama.truncate(N_CONTEXT + 5)
    yield "logits after truncate", digest(llama.eval_logits(question[:7]))


def probe_method(llama: Any, spec: str, path: Path) -> Steps:
    """Yields everything that one method does with one context."""
    from kvcompose_gguf.methods import make_method

    method = make_method(spec, compression_ratio=0.6, min_tokens=64).for_model(Path(llama.model_path))
    llama.kv_compressor = None
    llama.reset()
    yield from until_an_error(probe_plan(llama, method))
    yield from until_an_error(probe_cache(llama, method, path))


def probe_text(llama: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields calls of the bindings' interface on a compressed cache, and calls that are refused."""
    from kvcompose_gguf import KVCompose

    text = "The old keeper wrote the numbers 4711 and 0815 into the book of the tower. " * 8
    method = KVCompose(compression_ratio=0.5, scoring="repeat", min_tokens=64, keep_last=8)
    yield "compressor", lambda: setattr(llama, "kv_compressor", method)
    ask = {"max_tokens": N_ANSWER, "temperature": 0.0}
    yield "completion", lambda: without_times(llama.create_completion(text + "Which numbers?", **ask))
    yield "echo", lambda: without_times(llama.create_completion(text + "Who wrote?", echo=True, **ask))
    parts = lambda: [without_times(part) for part in llama.create_completion(text, stream=True, **ask)]  # noqa: E731
    yield "stream", parts
    chat = [{"role": "user", "content": text + "Which numbers?"}]
    yield "chat", lambda: without_times(llama.create_chat_completion(chat, **ask))
    yield "seed", lambda: without_times(llama.create_completion(text, max_tokens=8, temperature=1.0, seed=5))
    yield "text report", lambda: figures(llama.kv_report)
    yield "empty prompt", lambda: llama.compress([])
    yield "too long", lambda: llama.compress([5] * 5000)
    yield "not a plan", lambda: llama.compose(None)
    yield "not a method", lambda: setattr(llama, "kv_compressor", "kvcompose")
    yield "missing session", lambda: llama.load_session("/nowhere/a.kvc")
    yield "session of another model", lambda: llama.load_session(Path(__file__))
    yield "budget", lambda: KVCompose(compression_ratio=1.5)
    yield "closed", lambda: (llama.close(), llama.eval([5]))


def load_saved(llama: Any, folder: Path, spec: str, index: int) -> Steps:
    """Yields what follows from a session that this or another checkout saved."""
    from kvcompose_gguf.methods import make_method

    path = folder / f"{index}.kvc"
    if not path.exists():
        return
    context, question = prompt(llama)
    llama.reset()
    llama.kv_compressor = make_method(spec, compression_ratio=0.6, min_tokens=64).for_model(Path(llama.model_path))
    info = llama.load_session(path)
    yield "session", {name: repr(value) for name, value in vars(info).items() if name not in CHANGING}
    llama.eval(question)
    yield "logits", logits(llama)
    yield "tokens", greedy(llama, context + question)
    llama.reset()
    llama.load_session(path)
    yield "logits of a loaded session", digest(llama.eval_logits(question))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("options", type=json.loads)
    parser.add_argument("specs", type=json.loads)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--load", action="store_true", help="load the sessions in FOLDER instead of writing them")
    args = parser.parse_args()
    from kvcompose_gguf import Llama

    out: Values = {}
    args.folder.mkdir(parents=True, exist_ok=True)
    defaults = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "n_batch": 128, "verbose": False}
    with closing(Llama(args.model, **(defaults | args.options))) as llama:
        for index, spec in enumerate(args.specs):
            path = args.folder / f"{index}.kvc"
            steps = load_saved(llama, args.folder, spec, index) if args.load else probe_method(llama, spec, path)
            for name, value in until_an_error(steps):
                out[f"{spec}: {name}"] = value
        if not args.load:
            for name, step in probe_text(llama):
                out[f"text: {name}"] = outcome(step)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
