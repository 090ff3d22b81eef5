"""Answers ``kvcompose bench``: how do time and memory grow with the context, with a full and a compressed cache?

Regime: each variant (full caches, and KVCompose at several ratios) reads a context of N tokens once, in its own process
and with the same number of cells. Prefill, scoring, plan and compose are timed there once. Then, after a warm-up, all
variants of a size take turns decoding the same tokens at position N, so that a slow minute of the machine affects all
of them. Sampling is not included. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..errors import ConfigError
from ..load import n_ctx_trained, open_vocabulary
from ..native.environment import system
from .measured_cache import VariantRun
from .options import N_ROOM, BenchOptions
from .process import VariantProcess
from .result import BenchResult, Environment, Measurement

_SEED = 0


def run_bench(model_path: Path, options: BenchOptions, console: Console | None = None) -> Iterator[BenchResult]:
    """Measures every variant at every size; yields a result without measurements, then all so far after each size.

    Args:
        console: shows the progress, if it is a terminal; None: shows nothing.
    Raises:
        ConfigError: llama.cpp cannot load the model, or the text of ``options`` cannot be used.
        ContextLengthError: a size is too large for the model.
    """
    console = console or Console(quiet=True)
    with open_vocabulary(model_path) as vocabulary:
        n_ctx_train = n_ctx_trained(vocabulary)
        sizes = options.sizes(n_ctx_train)
        tokens, text = context_tokens(vocabulary, max(sizes) + options.n_decode, options.text)
    environment = _environment(model_path, options, text)
    arguments = asdict(options) | {"n_tokens": sizes, "text": None if options.text is None else str(options.text)}
    arguments |= {name: list(arguments[name]) for name in ("ratios", "kv_types")}
    result = BenchResult(environment, arguments, (), complete=False)
    yield result
    for n_tokens in sizes:
        n_room = max(N_ROOM, options.n_decode)
        n_ctx = min(-(-(n_tokens + n_room) // 256) * 256, n_ctx_train)
        context, decoded = tokens[:n_tokens], tokens[n_tokens : n_tokens + options.n_decode]
        runs = [
            VariantRun(model_path, variant, n_ctx, environment.n_threads, environment.n_threads_batch, context, decoded)
            for variant in options.variants
        ]
        measured = (*result.measurements, *_measure(runs, options.repeats, console))
        result = BenchResult(environment, arguments, measured, complete=n_tokens == sizes[-1])
        yield result


def context_tokens(vocabulary: Any, n_tokens: int, text: Path | None) -> tuple[list[int], str]:
    """Returns ``n_tokens`` tokens, and a sentence about their source; a smaller number returns a prefix of them.

    Args:
        vocabulary: the bindings' ``LlamaModel``.
        text: a UTF-8 file, repeated to the length; None: random tokens. Both start with BOS if the model uses one.
    Raises:
        ConfigError: the file cannot be read, is not UTF-8 or contains no token.
    """
    bos = [vocabulary.token_bos()] if vocabulary.add_bos_token() and vocabulary.token_bos() != -1 else []
    if text is None:
        drawn = np.random.default_rng(_SEED).choice(_ordinary_tokens(vocabulary), n_tokens)
        return (bos + drawn.tolist())[:n_tokens], f"random ordinary tokens, numpy default_rng({_SEED})"
    try:
        body = vocabulary.tokenize(text.read_text("utf-8").encode(), False, False)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text={str(text)!r} cannot be read: {error}") from error
    if not body:
        raise ConfigError(f"text={str(text)!r} is empty")
    return (bos + body * -(-n_tokens // len(body)))[:n_tokens], f"{text.name}, {len(body)} tokens, cut or repeated"


def _measure(runs: Sequence[VariantRun], repeats: int, console: Console) -> list[Measurement]:
    """Measures one size: every variant reads its context in turn, then all decode in turns."""
    with contextlib.ExitStack() as stack:
        # one frame a second, because the spinner's thread shares the CPU with the measurement
        status = stack.enter_context(console.status("", refresh_per_second=1))
        processes, readings = [], []
        for run in runs:
            status.update(f"{len(run.tokens):,} tokens: {run.variant.name} reads")
            process = stack.enter_context(VariantProcess(run))
            readings.append(process.read())
            process.decode()  # warm-up
            processes.append(process)
        rounds = []
        for i in range(repeats):
            status.update(f"{len(runs[0].tokens):,} tokens: decoding, round {i + 1} of {repeats}")
            rounds.append([process.decode() for process in processes])
        memories = [process.memory() for process in processes]
    return [
        Measurement(
            run.variant, len(run.tokens), run.n_ctx, len(run.decoded),
            decode_seconds=samples, **asdict(reading), **asdict(memory),
        )
        for run, reading, samples, memory in zip(runs, readings, zip(*rounds, strict=True), memories, strict=True)
    ]  # fmt: skip


def _ordinary_tokens(vocabulary: Any) -> list[int]:
    """Returns the tokens that ordinary text can contain."""
    from llama_cpp.llama_cpp import LLAMA_TOKEN_ATTR_CONTROL, LLAMA_TOKEN_ATTR_UNKNOWN, LLAMA_TOKEN_ATTR_UNUSED

    special = LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN | LLAMA_TOKEN_ATTR_UNUSED
    return [token for token in range(vocabulary.n_vocab()) if not vocabulary.token_get_attr(token) & special]


def _environment(model_path: Path, options: BenchOptions, text: str) -> Environment:
    n_cpu = os.cpu_count() or 1
    return Environment(
        **system(),
        # the default is llama-cpp-python's (llama.py, Llama.__init__)
        n_threads=options.threads or max(n_cpu // 2, 1),
        n_threads_batch=options.threads or n_cpu,
        model=model_path.name,
        model_bytes=model_path.stat().st_size,
        text=text,
    )
