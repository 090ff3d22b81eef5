"""The ``kvcompose`` command: each handler reads its arguments and calls one function of another module.

Those modules are imported by the handlers, so that ``--help`` needs neither the library nor their import time.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .errors import KVComposeError
from .serve import serve


class _Group(TyperGroup):
    """Ends on one of the package's errors with a red line and exit code 1; any other exception is a bug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KVComposeError as error:
            typer.secho("error: " + " ".join(str(error).split()), fg="red", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Group,
    help="KV-cache compression inside llama.cpp.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

Ratio = Annotated[float, typer.Option("--compression-ratio", help="Fraction of the KV entries that is removed.")]
EVAL_RATIOS = "0.25,0.5,0.75,0.875,0.9375"
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; llama-cpp-python's choice by default.")]


@app.command()
def demo(compression_ratio: Ratio = 0.75, threads: Threads = None) -> None:
    """Ask a small model about a document, from the full and from the compressed cache."""
    from .demo import demo

    demo(compression_ratio, threads)


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="A .gguf file, or a name that `fetch` knows.")],
    context: Annotated[Path, typer.Option(help="The text that is read and compressed, UTF-8.")],
    question: Annotated[str, typer.Option(help="What is asked about it.")],
    compression_ratio: Ratio,
    method: Annotated[str, typer.Option(help="E.g. snapkv or kvcompose,scoring=window.")] = "kvcompose",
    n_ctx: Annotated[int | None, typer.Option(min=1, help="Cells of the cache; as many as needed by default.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    flash_attn: Annotated[bool, typer.Option(help="Flash attention for everything but the scoring.")] = True,
    threads: Threads = None,
) -> None:
    """Answer a question about a text from a compressed cache."""
    from .run import run

    run(
        model, context, question, compression_ratio, method=method,
        n_ctx=n_ctx, max_tokens=max_tokens, flash_attn=flash_attn, threads=threads,
    )  # fmt: skip


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(help="A .gguf file, or a name that `fetch` knows.")] = None,
    n_tokens: Annotated[
        str | None, typer.Option(help="Context sizes, e.g. 1024,2048; powers of two up to the model's end by default.")
    ] = None,
    up_to: Annotated[int | None, typer.Option(help="End of the default sizes.")] = None,
    ratios: Annotated[str, typer.Option(help="Fractions of the KV entries that are removed.")] = "0.5,0.75,0.9",
    kv_types: Annotated[str, typer.Option(help="Types of keys and values, the baseline's first.")] = "f16,q8_0",
    n_decode: Annotated[int, typer.Option(help="Tokens of a decode sample.")] = 32,
    repeats: Annotated[int, typer.Option(help="Decode samples of each cache.")] = 5,
    threads: Threads = None,
    text: Annotated[Path | None, typer.Option(help="The context, UTF-8; random tokens by default.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write a document; `-`: as the output's last line.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture, .svg, .png or .pdf.")] = None,
    from_file: Annotated[Path | None, typer.Option("--from", help="Show an earlier --json instead of a model.")] = None,
) -> None:
    """Measure how time and memory grow with the context, full and compressed caches in turns."""
    from .bench import BenchOptions, bench, numbers

    options = BenchOptions(
        numbers("n_tokens", n_tokens, int), up_to, numbers("ratios", ratios, float) or (),
        tuple(kv_types.split(",")), n_decode, repeats, threads, text,
    )  # fmt: skip
    bench(model, options, json_file=json, plot_file=plot, from_file=from_file)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A .gguf file, or a name that `fetch` knows.")] = "smollm2",
    out: Annotated[Path, typer.Option(help="Folder of the run; what it has is not done again.")] = Path("eval"),
    tasks: Annotated[str, typer.Option(help="`all` of RULER's, or names of theirs and passkey.")] = "all",
    n_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sample, its answer included.")] = 2048,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each task.")] = 20,
    method: Annotated[
        list[str] | None,
        typer.Option(help="E.g. kvcompose,scoring=window or @baselines, @scoring, @ablations; may be repeated."),
    ] = None,
    ratios: Annotated[str, typer.Option(help="Fractions of the KV entries that are removed.")] = EVAL_RATIOS,
    kv_types: Annotated[str, typer.Option(help="Types of keys and values.")] = "f16",
    question_seen: Annotated[bool, typer.Option(help="Methods that look at the last tokens see the question.")] = False,
    chat: Annotated[bool, typer.Option(help="Use the model's chat format, if it has one.")] = True,
    texts: Annotated[str, typer.Option(help="Prose and questions: package, generated or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; one per core by default.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each.")] = 1,
    quick: Annotated[bool, typer.Option(help="A few short samples instead: minutes.")] = False,
    report_only: Annotated[bool, typer.Option(help="Write the report of what is there.")] = False,
) -> None:
    """Compare methods on long-context tasks: answers, divergence from the full cache, budgets; a table and pictures."""
    from .bench import numbers
    from .evaluation.command import evaluate

    evaluate(
        model, out, tasks=tasks, n_tokens=n_tokens, n_samples=samples, methods=method or ["@baselines"],
        ratios=numbers("ratios", ratios, float) or (), types_kv=tuple(kv_types.split(",")),
        question_seen=question_seen, chat=chat, texts=texts, seed=seed, jobs=jobs, threads=threads, quick=quick,
        report_only=report_only,
    )  # fmt: skip


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="The model's name, e.g. smollm2.")]) -> None:
    """Download a small model into the cache folder and print its path."""
    from .models import fetch

    typer.echo(fetch(name))


class Only(str, Enum):
    """What `calibrate` may be kept to."""

    SURROGATE = "surrogate"
    COMPRESSKV = "compresskv"


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="A .gguf file, or a name that `fetch` knows.")],
    needles: Annotated[int, typer.Option(help="Facts that are hidden and asked for.")] = 3,
    lengths: Annotated[int, typer.Option(help="Lengths of prompts, from --shortest to --longest.")] = 4,
    depths: Annotated[int, typer.Option(help="Places of a fact in its prompt.")] = 5,
    shortest: Annotated[int, typer.Option(help="Tokens of the shortest prompt.")] = 300,
    longest: Annotated[int, typer.Option(help="Tokens of the longest prompt.")] = 1200,
    errors: Annotated[int, typer.Option(help="Prompts that eviction errors are measured with.")] = 12,
    data_free: Annotated[bool, typer.Option("--data-free", help="Random tokens instead of facts in prose.")] = False,
    random_tokens: Annotated[int, typer.Option(help="With --data-free: tokens that come four times.")] = 256,
    passages: Annotated[int, typer.Option(help="Texts that the surrogate is fitted to.")] = 40,
    passage_tokens: Annotated[int, typer.Option(help="Tokens of the longest of these texts.")] = 2048,
    text: Annotated[list[Path] | None, typer.Option(help="Your own text, for half of these; may be repeated.")] = None,
    only: Annotated[Only | None, typer.Option(help="Measure for one method only.")] = None,
    threads: Threads = None,
) -> None:
    """Measure once what `kvcompose` and `compresskv` have to know about a model; an interrupted run goes on.

    For `kvcompose,scoring=surrogate` a predictor of the repeat's attention, for `compresskv` retrieval heads and
    eviction errors.
    """
    if only != Only.COMPRESSKV:
        from .surrogate_fit import FitOptions, fit_surrogate

        files = tuple(str(file) for file in text or [])
        fit_surrogate(model, FitOptions(n_passages=passages, longest=passage_tokens, files=files), threads)
    if only != Only.SURROGATE:
        from .calibrate import calibrate
        from .calibrate_trials import CalibrateOptions

        n_random = random_tokens if data_free else 0
        calibrate(model, CalibrateOptions(needles, lengths, depths, shortest, longest, errors, n_random), threads)


app.command()(serve)


@app.command()
def doctor() -> None:
    """Show the native library, its backends and the models; exit code 1 if something is wrong."""
    from .doctor import doctor

    raise typer.Exit(0 if doctor() else 1)


@app.command()
def rpc_server(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 50052,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 4,
) -> None:
    """Compute layers for models on other machines (llama.cpp's RPC; only for networks that are trusted)."""
    from .rpc import serve

    serve(host, port, threads)


def main() -> None:
    """Entry point of the ``kvcompose`` command."""
    for stream in (sys.stdout, sys.stderr):
        # a pipe on Windows is cp1252, which has neither the marks nor the bars
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()
