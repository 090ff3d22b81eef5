"""The command line, without a model: help, and one clean line for every error."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.commands import failure, loaded_by_help
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from kvcompose_gguf.bench.options import BenchOptions
from kvcompose_gguf.chat.options import ChatOptions
from kvcompose_gguf.cli import doctor as doctor_module
from kvcompose_gguf.cli.app import app
from kvcompose_gguf.cli.demo.comparison import Answers, DemoResult
from kvcompose_gguf.cli.demo.questions import Question
from kvcompose_gguf.cli.demo.tables import print_demo
from kvcompose_gguf.errors import LibraryError
from kvcompose_gguf.evaluation.options import EvalOptions
from kvcompose_gguf.models import known
from kvcompose_gguf.native import library
from kvcompose_gguf.plan.report import KVReport


@pytest.fixture
def context(tmp_path: Path) -> Path:
    file = tmp_path / "context.txt"
    file.write_text("Some text.", encoding="utf-8")
    return file


#: every command and what a user can call it with, hidden ones excepted
COMMANDS = [
    [], ["chat"], ["compress"], ["serve"], ["sessions"], ["sessions", "list"], ["sessions", "show"], ["sessions", "delete"],
    ["demo"], ["fetch"], ["bench"], ["eval"], ["learn"], ["doctor"], ["rpc-server"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_help_loads_neither_the_library_nor_the_kernels() -> None:
    text, loaded = loaded_by_help([], ["llama_cpp", "numba", "psutil", "huggingface_hub"])
    assert "serve" in text
    assert loaded == []


def test_fetch_of_an_unknown_name_lists_the_known_ones() -> None:
    assert "'nope' is not one of gemma-3-270m, smollm2" in failure(["fetch", "nope"])


def test_fetch_prints_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(known, "fetch", lambda name: tmp_path / name)
    result = CliRunner().invoke(app, ["fetch", "smollm2"])
    assert (result.exit_code, result.output.strip()) == (0, str(tmp_path / "smollm2"))


def test_every_option_has_a_help_text_of_whole_sentences() -> None:
    found = {
        f"{path} {option.opts[0]}": option.help for path, option in parameters(get_command(app)) if not option.hidden
    }
    assert len(found) > 100
    wrong = {name: text for name, text in found.items() if not text or not text[0].isupper() or not text.endswith(".")}
    assert wrong == {}


def test_every_option_names_its_default() -> None:
    silent = {}
    for path, option in parameters(get_command(app)):
        is_unset = option.default is None or option.default is False or option.default == ()
        shown = option.show_default and not is_unset
        if option.hidden:
            continue
        stated = option.required or "efault" in option.help or option.name in UNSET_IS_OFF
        if not (shown or stated or option.is_flag):
            silent[f"{path} {option.opts[0]}"] = option.help
    assert silent == {}


#: options whose help says what they do, and that do nothing without a value
UNSET_IS_OFF = {"hf_repo", "max_kv_bytes", "question", "session", "up_to", "json", "plot", "from_file", "model"}


def parameters(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every option below a command, with the command's name."""
    for option in command.params:
        if option.param_type_name == "option" and option.name != "help":
            yield path, option
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from parameters(child, f"{path} {name}".strip())


def test_the_compression_has_one_name_in_every_command() -> None:
    names = [(path, name) for path, option in parameters(get_command(app)) if not option.hidden for name in option.opts]
    for command in ("chat", "compress", "serve"):
        for name in ("--compression-ratio", "--max-kv-bytes", "--method", "--scoring"):
            assert (command, name) in names
    assert {
        ("demo", "--compression-ratio"),
        ("bench", "--compression-ratio"),
        ("eval", "--compression-ratio"),
        ("eval", "--method"),
    } <= set(names)
    assert not [
        pair
        for pair in names
        if pair[1] in ("--ratios", "--ratio", "--kv-compress", "--kv-bytes", "--kv-method", "--kv-scoring")
    ]


@pytest.mark.parametrize("command", ["bench", "eval"])
def test_the_old_name_of_the_ratios_prints_a_hint(command: str, tmp_path: Path) -> None:
    arguments = [command, str(tmp_path / "no.gguf"), "--ratios", "0.5,0.75"]
    result = CliRunner().invoke(app, arguments)
    hint, error = result.stderr.splitlines()
    assert hint == "hint: --ratios is now called --compression-ratio, the old name will be removed in the next version"
    assert "neither a file nor one of" in error
    assert "give --compression-ratio only" in failure([*arguments, "--compression-ratio", "0.5"])


@pytest.mark.parametrize("command", ["bench", "eval"])
def test_several_ratios_are_measured(monkeypatch: pytest.MonkeyPatch, command: str, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "kvcompose_gguf.bench.command.bench", lambda model, options, **_: seen.update(ratios=options.ratios)
    )
    monkeypatch.setattr("kvcompose_gguf.evaluation.command.evaluate", lambda *_, **options: seen.update(options))
    assert CliRunner().invoke(app, [command, "m.gguf", "--compression-ratio", "0.25,0.5"]).exit_code == 0
    assert seen["ratios"] == (0.25, 0.5)
    assert CliRunner().invoke(app, [command, "m.gguf"]).exit_code == 0
    assert seen["ratios"] == {"bench": BenchOptions, "eval": EvalOptions}[command]().ratios


@pytest.mark.parametrize("ratio", ["1", "-0.1", "nan"])
@pytest.mark.parametrize("command", ["chat", "compress", "run", "demo"])
def test_a_ratio_out_of_range_is_found_before_any_download(
    monkeypatch: pytest.MonkeyPatch, context: Path, command: str, ratio: str
) -> None:
    monkeypatch.setattr(known, "fetch", lambda name: pytest.fail("downloaded"))
    arguments = {
        "chat": ["smollm2", str(context), "-q", "What?"], "compress": ["smollm2", str(context), "-o", "name"], "demo": [],
        "run": ["smollm2", "--context", str(context), "--question", "What?"],
    }  # fmt: skip
    result = CliRunner().invoke(app, [command, *arguments[command], f"--compression-ratio={ratio}"])
    assert result.exit_code == 1
    assert "error: compression_ratio=" in result.stderr


#
# chat, and run, its old name
#


@pytest.fixture
def chats(monkeypatch: pytest.MonkeyPatch) -> list[ChatOptions]:
    """The options of every chat that a command has begun; none takes place."""
    seen: list[ChatOptions] = []
    monkeypatch.setattr("kvcompose_gguf.chat.command.chat", lambda options: seen.append(options) or 3)
    return seen


def test_a_chat_gets_all_of_its_options(chats: list[ChatOptions]) -> None:
    result = CliRunner().invoke(
        app,
        ["chat", "m.gguf", "a.md", "-", "-q", "One?", "--question", "Two?", "--json", "--max-kv-bytes", "512MB", "--method",
         "snapkv", "--scoring", "window", "-c", "4096", "-n", "9", "--temp", "0.5", "--seed", "7", "--system", "Be brief.",
         "--no-flash-attn", "-t", "2"],
    )  # fmt: skip
    assert result.exit_code == 3  # what chat returned
    assert chats == [
        ChatOptions(
            model="m.gguf", files=("a.md", "-"), questions=("One?", "Two?"), json=True, max_kv_bytes=512_000_000,
            method="snapkv", scoring="window", ctx_size=4096, max_tokens=9, temperature=0.5, seed=7, system="Be brief.",
            flash_attn=False, threads=2,
        )
    ]  # fmt: skip


def test_a_conversation_is_sampled_and_answers_for_scripts_are_greedy(chats: list[ChatOptions]) -> None:
    for arguments in ([], ["-q", "Why?"], ["--json"], ["--session", "s"]):
        CliRunner().invoke(app, ["chat", "m.gguf", *arguments])
    assert [options.temperature for options in chats] == [0.8, 0, 0, 0.8]
    assert {options.max_tokens for options in chats} == {ChatOptions(model="m").max_tokens}
    assert chats[3] == ChatOptions(model="m.gguf", session="s", temperature=0.8)


def test_with_a_model_of_the_hub_every_argument_is_a_document(chats: list[ChatOptions]) -> None:
    CliRunner().invoke(app, ["chat", "-hf", "user/repo", "a.md", "b.md"])
    assert (chats[0].model, chats[0].files) == ("hf://user/repo", ("a.md", "b.md"))


def test_two_budgets_are_one_too_many(chats: list[ChatOptions]) -> None:
    for command in (["chat", "m.gguf"], ["compress", "m.gguf", "a.md", "-o", "s"]):
        assert "are two budgets" in failure([*command, "--compression-ratio", "0.5", "--max-kv-bytes", "1GB"])
    assert "max_kv_bytes='much' is not a size" in failure(["chat", "m.gguf", "--max-kv-bytes", "much"])
    assert chats == []


def test_run_is_a_chat_with_one_question_and_a_hint(chats: list[ChatOptions]) -> None:
    result = CliRunner().invoke(
        app,
        ["run", "m.gguf", "--context", "a.md", "--question", "Why?", "--compression-ratio", "0.5", "--method", "snapkv",
         "--n-ctx", "512", "--max-tokens", "7", "--no-flash-attn", "--threads", "1"],
    )  # fmt: skip
    assert result.stderr.startswith("hint: `kvcompose run` is now `kvcompose chat MODEL FILE -q QUESTION`")
    assert chats == [
        ChatOptions(
            model="m.gguf", files=("a.md",), questions=("Why?",), compression_ratio=0.5, method="snapkv", ctx_size=512,
            max_tokens=7, temperature=0, flash_attn=False, threads=1,
        )
    ]  # fmt: skip
    commands = get_command(app)
    assert isinstance(commands, TyperGroup)
    assert commands.commands["run"].hidden


def test_a_model_that_there_is_not_is_one_line(tmp_path: Path, context: Path) -> None:
    assert "neither a file nor one of gemma-3-270m, smollm2" in failure(
        ["chat", str(tmp_path / "no.gguf"), str(context), "-q", "?"]
    )


def test_doctor_without_a_library_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise LibraryError("no library here")

    monkeypatch.setattr(library, "load", load)
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
    questions = (Question("The boat is called the", "Marigold"), Question("The dog is", "Rex"))
    full = Answers(("Marigold.", "Rex, and"), 2.0, 9_000_000, 300_000_000)
    compressed = Answers(("Marigold.", "a cat"), 1.0, 3_000_000, 250_000_000)
    console = Console(record=True, width=120, file=io.StringIO())
    print_demo(DemoResult(questions, 5.0, full, compressed, report), console)
    text = console.export_text()
    assert "2 of 2 right" in text
    assert "1 of 2 right" in text
    assert "✗ a cat" in text
    assert [line.split()[-1] for line in text.splitlines() if "█" in line] == ["25", "75"]
    assert "9.0 MB" in text
    assert "3.0 MB" in text
    assert "250.0 MB" in text
