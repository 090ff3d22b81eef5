"""Implements ``kvcompose bench``: how do time and memory grow with the context, with a full and a compressed cache?

Regime: each variant (full caches, and KVCompose at several ratios) reads a context of N tokens once, in its own process
and with the same number of cells. Prefill, scoring, plan and compose are timed there once. Then, after a warm-up, all
variants of a size take turns decoding the same tokens at position N, so that a slow minute of the machine affects all
of them. Sampling is not included. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.text import Text

from ..cli.tables import bench_table
from ..errors import ConfigError, ContextLengthError
from ..load import n_ctx_trained, open_vocabulary, resolve_model
from ..native.environment import system
from ..native.kv_types import KV_TYPES
from ..support.plots import check_plot, plot_bench
from .result import BenchResult, Environment, Measurement, Variant, read_result
from .worker import Job, Worker

_N_FIRST = 1024  # smallest default size
_N_ROOM = 512  # cells after the context, if the model has room for them: one scoring chunk
_SEED = 0

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class BenchOptions:
    """Options of a benchmark.

    Attributes:
        n_tokens: context sizes; None: powers of two from 1,024 on, and the largest that the model allows.
        up_to: upper limit of the default sizes; None: the model's limit.
        ratios: fractions that KVCompose removes. Each is measured with the first of ``kv_types``, and the middle one
            with the other types as well.
        kv_types: types of keys and values, each measured with a full cache; the first full cache is the baseline.
        n_decode: tokens per decode sample.
        repeats: decode samples per variant and size.
        threads: None: llama-cpp-python's default.
        text: a UTF-8 file, cut or repeated to each size; None: seeded random tokens of the model's vocabulary.
    Raises:
        ConfigError: an option is out of range.
    """

    n_tokens: tuple[int, ...] | None = None
    up_to: int | None = None
    ratios: tuple[float, ...] = (0.5, 0.75, 0.9)
    kv_types: tuple[str, ...] = ("f16", "q8_0")
    n_decode: int = 32
    repeats: int = 5
    threads: int | None = None
    text: Path | None = None

    def __post_init__(self) -> None:
        for name in ("n_tokens", "ratios", "kv_types"):
            values = getattr(self, name)
            if values is not None and (len(values) == 0 or len(set(values)) < len(values)):
                shown = "compression_ratio" if name == "ratios" else name  # the option's name
                raise ConfigError(f"{shown}={list(values)} must be a list of different values and not empty")
        for name in ("up_to", "n_decode", "repeats", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is not positive")
        for n in self.n_tokens or ():
            if n < 2:
                raise ConfigError(f"n_tokens={n} is too small; use 2 or more")
        for ratio in self.ratios:
            if not 0 <= ratio < 1:
                raise ConfigError(f"compression_ratio={ratio}: the fraction removed must be in [0, 1)")
        for type_kv in self.kv_types:
            if type_kv not in KV_TYPES:
                raise ConfigError(f"kv_types={type_kv!r} is not one of {', '.join(KV_TYPES)}")

    @property
    def variants(self) -> list[Variant]:
        """Returns the variants to compare, the baseline first."""
        first, *others = self.kv_types
        middle = sorted(self.ratios)[len(self.ratios) // 2]
        return [
            *(Variant(type_kv) for type_kv in self.kv_types),
            *(Variant(first, ratio) for ratio in self.ratios),
            *(Variant(type_kv, middle) for type_kv in others),
        ]

    def sizes(self, n_ctx_train: int) -> list[int]:
        """Returns the context sizes for a model trained for ``n_ctx_train`` positions, ascending.

        Raises:
            ContextLengthError: one of ``n_tokens`` is too large, or the decode alone does not fit.
        """
        limit = n_ctx_train - self.n_decode
        too_large = [n for n in self.n_tokens or () if n > limit]
        if too_large or limit < 2:
            raise ContextLengthError(
                f"n_tokens={max(too_large, default=2)} is too large: of the model's {n_ctx_train} positions, "
                f"n_decode={self.n_decode} leaves {max(limit, 0)}"
            )
        if self.n_tokens is not None:
            return sorted(self.n_tokens)
        top = min(max(n_ctx_train - max(_N_ROOM, self.n_decode), 2), self.up_to or n_ctx_train)
        powers = [_N_FIRST << i for i in range(n_ctx_train.bit_length())]
        return [*(n for n in powers if n < top), top]


def bench(
    model: str | None,
    options: BenchOptions,
    *,
    json_file: Path | None = None,
    plot_file: Path | None = None,
    from_file: Path | None = None,
) -> BenchResult:
    """Measures, or reads an earlier run's file. Prints a table per size; writes the JSON document and the picture.

    Args:
        model: a file, or the name of a fetched model; None with ``from_file``.
        json_file: written after every size; ``-`` prints the document as the last line of the output instead.
    Raises:
        ConfigError: an output cannot be written, or the model does not exist; raised before anything is measured.
    """
    _check_outputs(json_file, plot_file)
    console = _console()
    if from_file is not None:
        if model is not None:
            raise ConfigError(f"model={model!r} and from={str(from_file)!r} cannot be combined")
        result = read_result(from_file)
        _print_result(result, console)
        _save(result, json_file, plot_file)
    elif model is not None:
        result = run_bench(resolve_model(model), options, console, lambda part: _save(part, json_file, plot_file))
    else:
        raise ConfigError("model is missing: give a .gguf file or a name that `kvcompose fetch` knows")
    if _is_stdout(json_file):
        print(json.dumps(result.to_dict()))
    return result


def run_bench(
    model_path: Path,
    options: BenchOptions,
    console: Console | None = None,
    save: Callable[[BenchResult], None] = lambda result: None,
) -> BenchResult:
    """Measures every variant at every size.

    Args:
        console: prints the tables and the progress; None: prints nothing.
        save: called with the results so far after each size.
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
    _print_result(result, console)
    for n_tokens in sizes:
        n_room = max(_N_ROOM, options.n_decode)
        n_ctx = min(-(-(n_tokens + n_room) // 256) * 256, n_ctx_train)
        context, decoded = tokens[:n_tokens], tokens[n_tokens : n_tokens + options.n_decode]
        jobs = [
            Job(model_path, variant, n_ctx, environment.n_threads, environment.n_threads_batch, context, decoded)
            for variant in options.variants
        ]
        measured = (*result.measurements, *_measure(jobs, options.repeats, console))
        result = BenchResult(environment, arguments, measured, complete=n_tokens == sizes[-1])
        console.print(bench_table(result, n_tokens))
        save(result)
    return result


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


def numbers(name: str, text: str | None, kind: type[Number]) -> tuple[Number, ...] | None:
    """Returns the comma-separated numbers in ``text``, the value of option ``name``.

    Raises:
        ConfigError: an item is not a number of this kind.
    """
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(",")) if text.strip() else ()
    except ValueError as error:
        what = "integers" if kind is int else "numbers"
        raise ConfigError(f"{name}={text!r} is not a comma-separated list of {what}") from error


def _measure(jobs: Sequence[Job], repeats: int, console: Console) -> list[Measurement]:
    """Measures one size: every job reads its context in turn, then all decode in turns."""
    with contextlib.ExitStack() as stack:
        # one frame a second, because the spinner's thread shares the CPU with the measurement
        status = stack.enter_context(console.status("", refresh_per_second=1))
        workers, readings = [], []
        for job in jobs:
            status.update(f"{len(job.tokens):,} tokens: {job.variant.name} reads")
            worker = stack.enter_context(Worker(job))
            readings.append(worker.read())
            worker.decode()  # warm-up
            workers.append(worker)
        rounds = []
        for i in range(repeats):
            status.update(f"{len(jobs[0].tokens):,} tokens: decoding, round {i + 1} of {repeats}")
            rounds.append([worker.decode() for worker in workers])
        memories = [worker.memory() for worker in workers]
    return [
        Measurement(
            job.variant, len(job.tokens), job.n_ctx, len(job.decoded),
            decode_seconds=samples, **asdict(reading), **asdict(memory),
        )
        for job, reading, samples, memory in zip(jobs, readings, zip(*rounds, strict=True), memories, strict=True)
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


def _print_result(result: BenchResult, console: Console) -> None:
    env, arguments = result.environment, result.arguments
    lines = (
        f"{env.model} ({env.model_bytes / 1e6:.0f} MB), llama.cpp {env.llama_cpp_commit[:9]}, {env.cpu}",
        f"{env.n_threads} threads, {env.n_threads_batch} for batches; flash attention; {env.text}",
        f"N = {', '.join(f'{n:,}' for n in arguments['n_tokens'])}; "
        f"{arguments['repeats']} rounds of {arguments['n_decode']} tokens",
    )
    console.print(Text("\n".join(lines)), soft_wrap=True)
    for n_tokens in result.sizes:
        console.print(bench_table(result, n_tokens))


def _console() -> Console:
    """Returns a console at least as wide as a table row, because a truncated number would be wrong."""
    return Console(width=max(Console().width, 110))


def _is_stdout(json_file: Path | None) -> bool:
    return json_file is not None and str(json_file) == "-"


def _check_outputs(json_file: Path | None, plot_file: Path | None) -> None:
    if plot_file is not None:
        check_plot(plot_file)
    for name, file in (("json", json_file), ("plot", plot_file)):
        if file is None or _is_stdout(file):
            continue
        is_new = not file.exists()
        try:
            with file.open("ab"):
                pass
        except OSError as error:
            raise ConfigError(f"{name}={str(file)!r} cannot be written: {error}") from error
        if is_new:
            file.unlink()


def _save(result: BenchResult, json_file: Path | None, plot_file: Path | None) -> None:
    if json_file is not None and not _is_stdout(json_file):
        json_file.write_text(json.dumps(result.to_dict(), indent=1) + "\n", "utf-8")
    if plot_file is not None:
        plot_bench(result, plot_file)
