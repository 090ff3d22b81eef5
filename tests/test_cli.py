"""The command line, without a model: help, and one clean line for every error."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvcompose_gguf import demo as demo_module
from kvcompose_gguf import doctor as doctor_module
from kvcompose_gguf import models
from kvcompose_gguf import run as run_module
from kvcompose_gguf.cli import app
from kvcompose_gguf.errors import LibraryError
from kvcompose_gguf.report import KVReport


def failure(arguments: Sequence[str]) -> str:
    """The error line of a command that has to end with exit code 1 and nothing but that line."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def run_arguments(model: Path | str, context: Path, ratio: str = "0.5") -> list[str]:
    return ["run", str(model), "--context", str(context), "--question", "What?", "--compression-ratio", ratio]


@pytest.fixture
def context(tmp_path: Path) -> Path:
    file = tmp_path / "context.txt"
    file.write_text("Some text.", encoding="utf-8")
    return file


@pytest.mark.parametrize("command", [[], ["demo"], ["run"], ["fetch"], ["doctor"]])
def test_every_command_has_help(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_help_loads_neither_the_library_nor_the_kernels() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from kvcompose_gguf.cli import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
        "print([name for name in ('llama_cpp', 'numba', 'psutil') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_fetch_of_an_unknown_name_lists_the_known_ones() -> None:
    assert "'nope' is not one of gemma-3-270m, smollm2" in failure(["fetch", "nope"])


def test_fetch_prints_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "fetch", lambda name: tmp_path / name)
    result = CliRunner().invoke(app, ["fetch", "smollm2"])
    assert (result.exit_code, result.output.strip()) == (0, str(tmp_path / "smollm2"))


def test_run_without_such_a_model(tmp_path: Path, context: Path) -> None:
    assert "neither a file nor one of gemma-3-270m, smollm2" in failure(run_arguments(tmp_path / "no.gguf", context))


def test_run_without_such_a_context(tmp_path: Path) -> None:
    assert "no.txt" in failure(run_arguments("smollm2", tmp_path / "no.txt"))


@pytest.mark.parametrize("content", [b"  \n", b"\xff\xfe\x00text"], ids=["empty", "not UTF-8"])
def test_run_with_a_context_that_is_no_text(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "context.txt"
    file.write_bytes(content)
    assert "context=" in failure(run_arguments("smollm2", file))


@pytest.mark.parametrize("ratio", ["1", "-0.1", "nan"])
def test_a_ratio_out_of_range_is_found_before_any_download(
    monkeypatch: pytest.MonkeyPatch, context: Path, ratio: str
) -> None:
    monkeypatch.setattr(models, "fetch", lambda name: pytest.fail("downloaded"))
    assert "compression_ratio" in failure(run_arguments("smollm2", context, ratio))
    assert "compression_ratio" in failure(["demo", f"--compression-ratio={ratio}"])


def test_doctor_without_a_library_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise LibraryError("no library here")

    monkeypatch.setattr(doctor_module.library, "load", load)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "no library here" in result.output
    assert "numba" in result.output
    assert "model smollm2" in result.output


def test_doctor_is_content_when_every_finding_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "_library_findings", lambda: [doctor_module.Finding("library", "here")])
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0


def test_the_demo_prints_counts_layers_and_bytes() -> None:
    report = KVReport(100, np.array([25, 75]), 4_000_000, 2_000_000, 9_000_000, 3_000_000, 0, 0, 0, 0, 100, 512)
    questions = (demo_module.Question("The boat is called the", "Marigold"), demo_module.Question("The dog is", "Rex"))
    full = demo_module.Answers(("Marigold.", "Rex, and"), 2.0, 9_000_000, 300_000_000)
    compressed = demo_module.Answers(("Marigold.", "a cat"), 1.0, 3_000_000, 250_000_000)
    console = Console(record=True, width=120, file=io.StringIO())
    demo_module.print_demo(demo_module.DemoResult(questions, 5.0, full, compressed, report), console)
    text = console.export_text()
    assert "2 of 2 right" in text
    assert "1 of 2 right" in text
    assert "✗ a cat" in text
    assert [line.split()[-1] for line in text.splitlines() if "█" in line] == ["25", "75"]
    assert "9.0 MB" in text
    assert "3.0 MB" in text
    assert "250.0 MB" in text


def test_a_context_window_that_is_too_small_is_refused(monkeypatch: pytest.MonkeyPatch, context: Path) -> None:
    monkeypatch.setattr(run_module, "token_counts", lambda path, texts: [3000, 10])
    monkeypatch.setattr(models, "fetch", lambda name: Path("model.gguf"))
    line = failure([*run_arguments("smollm2", context), "--n-ctx", "1024"])
    assert "n_ctx=1024" in line
