"""What ``kvcompose bench`` does: how do time and memory grow with the context, with a full and a compressed cache?

Regime: a context of N tokens is read once by each variant (full caches, and KVCompose at several ratios), in a process
of its own and with the same number of cells. Prefill, scoring, plan and compose are timed there once. Then all variants
of the size decode the same tokens at position N in turns, after a warm-up: a slow minute of the machine hits all of
them. Sampling is not included. Give it the machine alone.
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

from .bench_result import BenchResult, Environment, Measurement, Variant, read_result
from .bench_worker import Job, Worker
from .environment import system
from .errors import ConfigError, ContextLengthError
from .plots import check_plot, plot_bench
from .run import n_ctx_trained, open_vocabulary, resolve_model
from .tables import bench_table

#: as llama.cpp names them
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

_N_FIRST = 1024  # smallest of the default sizes
_N_ROOM = 512  # cells behind the context, where there are as many: one scoring chunk
_SEED = 0

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, and how often.

    Attributes:
        n_tokens: context sizes; None: powers of two from 1,024 on, and the largest that the model allows.
        up_to: end of the default sizes, None: the model's own.
        ratios: fractions that KVCompose removes, each measured with the first of ``kv_types``; the middle one with the
            others as well.
        kv_types: of keys and values, each measured with a full cache; the first full cache is the baseline.
        n_decode: tokens of a decode sample.
        repeats: decode samples of each variant and size.
        threads: None: as many as llama-cpp-python chooses.
        text: a UTF-8 file, cut or repeated to each size; None: seeded random tokens of the model's vocabulary.
    Raises:
        ConfigError: an option out of its range.
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
                raise ConfigError(f"{shown}={list(values)} has to be a list of different values, and not empty")
        for name in ("up_to", "n_decode", "repeats", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is not positive")
        for n in self.n_tokens or ():
            if n < 2:
                raise ConfigError(f"n_tokens={n} is too few, at least 2 are needed")
        for ratio in self.ratios:
            if not 0 <= ratio < 1:
                raise ConfigError(f"compression_ratio={ratio}, the fraction removed, is not in [0, 1)")
        for type_kv in self.kv_types:
            if type_kv not in KV_TYPES:
                raise ConfigError(f"kv_types={type_kv!r} is not one of {', '.join(KV_TYPES)}")

    @property
    def variants(self) -> list[Variant]:
        """What is compared, the baseline first."""
        first, *others = self.kv_types
        middle = sorted(self.ratios)[len(self.ratios) // 2]
        return [
            *(Variant(type_kv) for type_kv in self.kv_types),
            *(Variant(first, ratio) for ratio in self.ratios),
            *(Variant(type_kv, middle) for type_kv in others),
        ]

    def sizes(self, n_ctx_train: int) -> list[int]:
        """The context sizes for a model of ``n_ctx_train`` positions, ascending.

        Raises:
            ContextLengthError: one of ``n_tokens`` is too large, or not even the decode fits.
        """
        limit = n_ctx_train - self.n_decode
        too_large = [n for n in self.n_tokens or () if n > limit]
        if too_large or limit < 2:
            raise ContextLengthError(
                f"n_tokens={max(too_large, default=2)} is too large: of the model's {n_ctx_train} positions "
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
    """Measure, or read an earlier run's file, and print a table a size; write a document and a picture.

    Args:
        model: a file or a fetched model's name; None with ``from_file``.
        json_file: written after every size; ``-``: the last line of the output instead.
    Raises:
        ConfigError: before anything is measured, if an output cannot be written, or there is no such model.
    """
    _check_outputs(json_file, plot_file)
    console = _console()
    if from_file is not None:
        if model is not None:
            raise ConfigError(f"model={model!r} and from={str(from_file)!r} exclude each other")
        result = read_result(from_file)
        _print_result(result, console)
        _save(result, json_file, plot_file)
    elif model is not None:
        result = run_bench(resolve_model(model), options, console, lambda part: _save(part, json_file, plot_file))
    else:
        raise ConfigError("model is missing: a .gguf file or a name that `kvcompose fetch` knows")
    if _is_stdout(json_file):
        print(json.dumps(result.to_dict()))
    return result


def run_bench(
    model_path: Path,
    options: BenchOptions,
    console: Console | None = None,
    save: Callable[[BenchResult], None] = lambda result: None,
) -> BenchResult:
    """Measure every variant at every size.

    Args:
        console: where the tables are printed, and what happens is shown; None: nowhere.
        save: is given what there is after each size.
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
    """``n_tokens`` tokens, and a sentence about them; a smaller number gives their beginning.

    Args:
        vocabulary: the bindings' ``LlamaModel``.
        text: a UTF-8 file, repeated as often as it takes; None: random tokens. Both after BOS, if the model wants one.
    Raises:
        ConfigError: the file cannot be read, is not UTF-8 or has no token.
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
    """The comma-separated numbers in ``text``, the option ``name``'s value.

    Raises:
        ConfigError: something between two commas is no such number.
    """
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(",")) if text.strip() else ()
    except ValueError as error:
        what = "integers" if kind is int else "numbers"
        raise ConfigError(f"{name}={text!r} is not a list of {what}, separated by commas") from error


def _measure(jobs: Sequence[Job], repeats: int, console: Console) -> list[Measurement]:
    """One size: all ``jobs`` read, one after the other, then decode in turns."""
    with contextlib.ExitStack() as stack:
        # one frame a second: the spinner is drawn by a thread that shares the CPU with what is measured
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
    """Tokens that text can consist of."""
    from llama_cpp.llama_cpp import LLAMA_TOKEN_ATTR_CONTROL, LLAMA_TOKEN_ATTR_UNKNOWN, LLAMA_TOKEN_ATTR_UNUSED

    special = LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN | LLAMA_TOKEN_ATTR_UNUSED
    return [token for token in range(vocabulary.n_vocab()) if not vocabulary.token_get_attr(token) & special]


def _environment(model_path: Path, options: BenchOptions, text: str) -> Environment:
    n_cpu = os.cpu_count() or 1
    return Environment(
        **system(),
        # without a choice that of llama-cpp-python (llama.py, Llama.__init__)
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
    """At least as wide as a row of the table: a number cut short would be a wrong one."""
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
