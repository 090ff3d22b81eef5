"""The ``kvcompose`` command: every command has a handler, which reads its arguments and calls one function.

Handlers import what they call, so that ``--help`` loads neither the native library nor numba.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import KVComposeError
from . import options as shared
from . import sessions
from .bench import bench
from .chat import chat, compress, run
from .evaluate import evaluate
from .learn import calibrate, learn
from .llama_server_flags import without_llama_servers
from .serve import serve


class _Group(TyperGroup):
    """Ends with a red line and exit code 1 on the package's own errors; any other exception is a bug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KVComposeError as error:
            typer.secho("error: " + " ".join(str(error).split()), fg="red", err=True)
            raise typer.Exit(1) from error


class _Serve(TyperCommand):
    """Leaves out llama-server's flags that have no meaning here, with a warning."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        left, ignored = without_llama_servers(args)
        if ignored:
            typer.secho(f"warning: {', '.join(ignored)}: no meaning here, ignored", fg="yellow", err=True)
        return super().parse_args(ctx, left)


app = typer.Typer(
    cls=_Group,
    help="Run GGUF models with a compressed KV cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

app.command()(chat)
app.command()(compress)
app.command(hidden=True)(run)


@app.command()
def demo(
    compression_ratio: Annotated[float, shared.ratio_option("By default 0.75.")] = 0.75,
    threads: shared.Threads = None,
) -> None:
    """Ask a small model about a document, with the full and with the compressed cache, and compare the answers."""
    from .demo.command import demo

    demo(compression_ratio, threads)


app.command()(bench)
app.command("eval")(evaluate)


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="Name of the model, e.g. smollm2.")]) -> None:
    """Download a small model into the cache folder and print its path."""
    from ..models.known import fetch

    typer.echo(fetch(name))


app.command()(learn)
app.command(hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(calibrate)
app.command(cls=_Serve)(serve)


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="A model's name or .gguf file, to see what its cache will take.")] = "",
) -> None:
    """Show the native library, the devices and the fetched models, or what the cache of a model will take.

    No weights are read. The exit code is 1 if something is wrong, or if the model cannot be compressed.
    """
    from ..models.resolve import resolve_model
    from .doctor import doctor, doctor_of

    raise typer.Exit(0 if (doctor_of(resolve_model(model)) if model else doctor()) else 1)


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


app.add_typer(sessions.app, name="sessions")


def main() -> None:
    """Entry point of the ``kvcompose`` command."""
    for stream in (sys.stdout, sys.stderr):
        # a pipe on Windows is cp1252, which has neither the marks nor the bars
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()
