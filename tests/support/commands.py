"""The command line in this process."""

from __future__ import annotations

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
