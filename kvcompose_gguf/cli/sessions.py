"""The ``kvcompose sessions`` commands."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Context, Option, Typer

app = Typer(help="List, show and delete saved sessions.", invoke_without_command=True, add_completion=False)
SessionName = Annotated[str, Argument(metavar="NAME", help="Name of a saved session, or path of a .kvc file.")]


@app.callback()
def sessions(ctx: Context) -> None:
    """List, show and delete saved sessions. Without a command, list them."""
    if ctx.invoked_subcommand is None:
        list_sessions()


@app.command("list")
def list_sessions() -> None:
    """List the saved sessions, newest first: name, model, tokens, size, fraction removed and age."""
    from .saved import print_sessions

    print_sessions()


@app.command("show")
def show_session(name: SessionName) -> None:
    """Verify a session and show what it holds, and how many tokens each layer keeps."""
    from .saved import print_session

    print_session(name)


@app.command("delete")
def delete_sessions(
    names: Annotated[list[str], Argument(metavar="NAME", help="Names of saved sessions, or paths of .kvc files.")],
    yes: Annotated[
        bool, Option("--yes", "-y", help="Delete without asking. By default each one is asked for.")
    ] = False,
) -> None:
    """Delete saved sessions."""
    from .saved import delete_sessions

    delete_sessions(names, yes)
