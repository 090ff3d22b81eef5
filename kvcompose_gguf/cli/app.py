"""The ``kvcompose`` command: each handler reads its arguments and calls one function of another module.

Handlers import those modules themselves, so that ``--help`` loads neither the native library nor numba.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import KVComposeError
from . import options as shared
from .chat import chat, compress, run
from .serve import serve


class _Group(TyperGroup):
    """Ends with a red line and exit code 1 on the package's own errors; any other exception is a bug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KVComposeError as error:
            typer.secho("error: " + " ".join(str(error).split()), fg="red", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Group,
    help="Run GGUF models with a compressed KV cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

BENCH_RATIOS = "0.5,0.75,0.9"
EVAL_RATIOS = "0.25,0.5,0.75,0.875,0.9375"

app.command()(chat)
app.command()(compress)
app.command(hidden=True)(run)


@app.command()
def demo(
    compression_ratio: Annotated[float, shared.ratio_option("By default 0.75.")] = 0.75,
    threads: shared.Threads = None,
) -> None:
    """Ask a small model about a document, with the full and with the compressed cache, and compare the answers."""
    from .demo import demo

    demo(compression_ratio, threads)


@app.command()
def bench(
    model: shared.Model = None,
    hf_repo: shared.HfRepo = None,
    n_tokens: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated context sizes in tokens, e.g. 1024,2048. "
            "By default powers of two from 1024 on, up to the longest context of the model."
        ),
    ] = None,
    up_to: Annotated[int | None, typer.Option(help="Largest of the default context sizes, in tokens.")] = None,
    compression_ratio: Annotated[str | None, shared.ratios_option(BENCH_RATIOS)] = None,
    ratios: Annotated[str | None, typer.Option(hidden=True)] = None,
    kv_types: Annotated[
        str, typer.Option(help="Comma-separated types of the cached keys and values. The first is the baseline.")
    ] = "f16,q8_0",
    n_decode: Annotated[int, typer.Option(help="Number of tokens decoded in each sample.")] = 32,
    repeats: Annotated[int, typer.Option(help="Number of decode samples of each cache.")] = 5,
    threads: shared.Threads = None,
    text: Annotated[
        Path | None, typer.Option(help="Use this UTF-8 file as the context. By default random tokens are used.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write the results to this JSON file. `-` prints them as the last line.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the results into this .svg, .png or .pdf file.")] = None,
    from_file: Annotated[
        Path | None, typer.Option("--from", help="Show the results of an earlier --json file instead of measuring.")
    ] = None,
) -> None:
    """Measure how time and memory grow with the context, for full and compressed caches side by side."""
    from ..bench.runner import BenchOptions, bench, numbers

    asked = shared.renamed("--ratios", ratios, "--compression-ratio", compression_ratio)
    options = BenchOptions(
        numbers("n_tokens", n_tokens, int), up_to,
        numbers("compression_ratio", BENCH_RATIOS if asked is None else asked, float) or (),
        tuple(kv_types.split(",")), n_decode, repeats, threads, text,
    )  # fmt: skip
    name = shared.model_name(model, hf_repo) if from_file is None or hf_repo is not None else model
    bench(name, options, json_file=json, plot_file=plot, from_file=from_file)


@app.command("eval")
def evaluate(
    model: shared.Model = None,
    hf_repo: shared.HfRepo = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the run. A run that was interrupted goes on where it stopped.")
    ] = Path("eval"),
    tasks: Annotated[
        str, typer.Option(help="Comma-separated names of RULER tasks, or passkey; `all` runs all of RULER.")
    ] = "all",
    n_tokens: Annotated[int, typer.Option(min=1, help="Length of a sample in tokens, with its answer.")] = 2048,
    samples: Annotated[int, typer.Option(min=1, help="Number of samples of each task.")] = 20,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Compression method with its options, e.g. snapkv or kvcompose,scoring=window, or one of the groups "
            "@baselines, @scoring and @ablations. Repeat the option for several. By default @baselines.",
        ),
    ] = None,
    compression_ratio: Annotated[str | None, shared.ratios_option(EVAL_RATIOS)] = None,
    ratios: Annotated[str | None, typer.Option(hidden=True)] = None,
    kv_types: shared.KvTypes = "f16",
    question_seen: Annotated[
        bool, typer.Option(help="Show the question to methods that look at the last tokens of the prompt.")
    ] = False,
    chat: Annotated[bool, typer.Option(help="Use the chat format of the model, if it has one.")] = True,
    texts: Annotated[
        str,
        typer.Option(
            help="Source of prose and questions: package (a package with texts that is installed), generated, or auto "
            "(package if there is one, else generated)."
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Number of processes, which load the model each. By default one per core.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", "-t", min=1, help="Number of CPU threads of each process.")] = 1,
    quick: Annotated[bool, typer.Option(help="Run a few short samples only, which takes minutes.")] = False,
    report_only: Annotated[bool, typer.Option(help="Write the report of a finished or interrupted run.")] = False,
) -> None:
    """Compare compression methods on long-context tasks and write a report with tables and pictures.

    The model is smollm2 by default.
    """
    from ..bench.runner import numbers
    from ..evaluation.command import evaluate

    asked = shared.renamed("--ratios", ratios, "--compression-ratio", compression_ratio)
    evaluate(
        shared.model_name(model, hf_repo, default="smollm2"), out, tasks=tasks, n_tokens=n_tokens, n_samples=samples,
        methods=method or ["@baselines"],
        ratios=numbers("compression_ratio", EVAL_RATIOS if asked is None else asked, float) or (),
        types_kv=tuple(kv_types.split(",")), question_seen=question_seen, chat=chat, texts=texts, seed=seed, jobs=jobs,
        threads=threads, quick=quick, report_only=report_only,
    )  # fmt: skip


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="Name of the model, e.g. smollm2.")]) -> None:
    """Download a small model into the cache folder and print its path."""
    from ..models.known import fetch

    typer.echo(fetch(name))


class Only(str, Enum):
    """The methods that `calibrate` can be limited to."""

    SURROGATE = "surrogate"
    COMPRESSKV = "compresskv"


@app.command()
def calibrate(
    model: shared.Model = None,
    hf_repo: shared.HfRepo = None,
    needles: Annotated[int, typer.Option(help="Number of facts to hide in texts and to ask for.")] = 3,
    lengths: Annotated[int, typer.Option(help="Number of prompt lengths between --shortest and --longest.")] = 4,
    depths: Annotated[int, typer.Option(help="Number of places in a prompt where a fact is hidden.")] = 5,
    shortest: Annotated[int, typer.Option(help="Length of the shortest prompt in tokens.")] = 300,
    longest: Annotated[int, typer.Option(help="Length of the longest prompt in tokens.")] = 1200,
    errors: Annotated[int, typer.Option(help="Number of prompts to measure eviction errors with.")] = 12,
    data_free: Annotated[
        bool, typer.Option("--data-free", help="Use random tokens instead of facts in prose. Off by default.")
    ] = False,
    random_tokens: Annotated[
        int, typer.Option(help="With --data-free: number of random tokens, which are repeated four times.")
    ] = 256,
    passages: Annotated[int, typer.Option(help="Number of texts to fit the surrogate to.")] = 40,
    passage_tokens: Annotated[int, typer.Option(help="Length of the longest of these texts in tokens.")] = 2048,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Take half of these texts from this file. Repeat the option for several. By default none."),
    ] = None,
    only: Annotated[Only | None, typer.Option(help="Measure for this method only. By default for both.")] = None,
    threads: shared.Threads = None,
) -> None:
    """Measure once per model what the methods `kvcompose` and `compresskv` need to know about it.

    For `kvcompose,scoring=surrogate` this fits a predictor of attention; for `compresskv` it finds retrieval heads and
    eviction errors. A calibration that was interrupted goes on where it stopped.
    """
    name = shared.model_name(model, hf_repo)
    if only != Only.COMPRESSKV:
        from ..learning.fit import FitOptions, fit_surrogate

        files = tuple(str(file) for file in text or [])
        fit_surrogate(name, FitOptions(n_passages=passages, longest=passage_tokens, files=files), threads)
    if only != Only.SURROGATE:
        from ..learning.calibrate import calibrate
        from ..learning.trials import CalibrateOptions

        n_random = random_tokens if data_free else 0
        calibrate(name, CalibrateOptions(needles, lengths, depths, shortest, longest, errors, n_random), threads)


app.command()(serve)


@app.command()
def doctor() -> None:
    """Show the native library, the devices and the fetched models. The exit code is 1 if something is wrong."""
    from .doctor import doctor

    raise typer.Exit(0 if doctor() else 1)


@app.command()
def rpc_server(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 50052,
    threads: Annotated[int, typer.Option("--threads", "-t", min=1, help="Number of CPU threads.")] = 4,
) -> None:
    """Compute layers of models that run on other machines, through llama.cpp's RPC.

    There is no authentication and no encryption: use it in trusted networks only.
    """
    from ..native.rpc import serve

    serve(host, port, threads)


sessions_app = typer.Typer(
    help="List, show and delete saved sessions.", invoke_without_command=True, add_completion=False
)
app.add_typer(sessions_app, name="sessions")
SessionName = Annotated[str, typer.Argument(metavar="NAME", help="Name of a saved session, or path of a .kvc file.")]


@sessions_app.callback()
def sessions(ctx: typer.Context) -> None:
    """List, show and delete saved sessions. Without a command, list them."""
    if ctx.invoked_subcommand is None:
        list_sessions()


@sessions_app.command("list")
def list_sessions() -> None:
    """List the saved sessions, newest first: name, model, tokens, size, fraction removed and age."""
    from .sessions import print_sessions

    print_sessions()


@sessions_app.command("show")
def show_session(name: SessionName) -> None:
    """Verify a session and show what it holds, and how many tokens each layer keeps."""
    from .sessions import print_session

    print_session(name)


@sessions_app.command("delete")
def delete_sessions(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME", help="Names of saved sessions, or paths of .kvc files.")
    ],
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Delete without asking. By default each one is asked for.")
    ] = False,
) -> None:
    """Delete saved sessions."""
    from .sessions import delete_sessions

    delete_sessions(names, yes)


def main() -> None:
    """Entry point of the ``kvcompose`` command."""
    for stream in (sys.stdout, sys.stderr):
        # a pipe on Windows is cp1252, which has neither the marks nor the bars
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()
