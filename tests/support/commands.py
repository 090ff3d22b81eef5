"""The command line in this process, and what it loads in one of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from typer.testing import CliRunner

from kvcompose_gguf.cli.app import app


def failure(arguments: Sequence[str]) -> str:
    """The error line of a command that has to end with exit code 1 and nothing but that line."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def loaded_by_help(command: Sequence[str], modules: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the help of a command, and which of ``modules`` a new process has loaded after printing it."""
    code = (
        "import sys; from typer.testing import CliRunner; from kvcompose_gguf.cli.app import app; "
        f"result = CliRunner().invoke(app, {[*command, '--help']}, env={{'COLUMNS': '200', 'TERM': 'dumb'}}); "
        "assert result.exit_code == 0; print(result.output); "
        f"print(*[name for name in {[*modules]} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True)
    text, _, loaded = done.stdout.removesuffix("\n").rpartition("\n")
    return text, loaded.split()
