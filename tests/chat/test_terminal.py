"""``kvcompose chat`` in a real terminal: a pseudo-terminal with the process's standard streams."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.processes import environment

pexpect = pytest.importorskip("pexpect", reason="needs a terminal: pip install pexpect")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals for pexpect")

TEXT = " ".join(f"Room {i} is painted in colour {i * 37 % 101}." for i in range(24))
TIMEOUT = 60  # seconds until a test gives up: nothing waits for so long unless it is broken
PROMPT = "Ask a question"
CTRL_C, CTRL_D, ENTER, ALT_ENTER, UP = "\x03", "\x04", "\r", "\x1b\r", "\x1b[A"


class Terminal:
    """A chat in a terminal of 120 columns and 24 lines."""

    def __init__(self, folder: Path, options: dict[str, Any], shell: str = "") -> None:
        self.folder = folder
        (folder / "rooms.txt").write_text(TEXT)
        command = [sys.executable, "-m", "support.chatting", json.dumps(options)]
        if shell:  # e.g. a pipe before it
            command = ["sh", "-c", f'{shell} "$@"', "sh", *command]
        env = environment(
            XDG_DATA_HOME=str(folder / "data"),
            TERM="xterm-256color",
            PROMPT_TOOLKIT_NO_CPR="1",  # nobody answers questions about the cursor here
        )
        self._process = pexpect.spawn(
            command[0], command[1:], cwd=str(folder), env=env, encoding="utf-8", timeout=TIMEOUT, dimensions=(24, 120)
        )

    def sees(self, *patterns: str) -> str:
        """What the terminal shows up to each pattern, in order; of the last one, what matched."""
        for pattern in patterns:
            self._process.expect(pattern)
        return str(self._process.after)

    def types(self, text: str) -> None:
        """Press keys, at a prompt."""
        self._process.send(text)

    def asks(self, text: str, *patterns: str) -> str:
        """Type a line at the prompt; returns what the last pattern matches in the answer."""
        self.types(text + ENTER)
        found = self.sees(*patterns)
        self.sees(PROMPT)
        return found

    def resize(self, n_columns: int) -> None:
        """Change the terminal's width."""
        self._process.setwinsize(24, n_columns)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the test's condition holds."""
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < end, f"nothing happened, the terminal shows: {self._process.buffer}"
            time.sleep(0.01)

    def leaves(self) -> int:
        """Press Ctrl-D; returns the exit code."""
        self.types(CTRL_D)
        return self.ends()

    def ends(self) -> int:
        """The exit code, when the process has ended."""
        self._process.expect(pexpect.EOF)
        self._process.close()
        assert self._process.signalstatus is None, f"signal {self._process.signalstatus}"
        return int(self._process.exitstatus)

    @property
    def rest(self) -> str:
        """What the terminal showed between the last two patterns."""
        return str(self._process.before)

    def close(self) -> None:
        """End the process."""
        self._process.close(force=True)


@pytest.fixture
def terminal(tiny_model: Callable[[tiny.TinyConfig], Path], tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Starts a chat on the tiny model in a terminal."""
    started: list[Terminal] = []

    def start(shell: str = "", **options: Any) -> Terminal:
        request = {"model": str(tiny_model(tiny.GQA)), "threads": 1, "max_tokens": 8, **options}
        started.append(Terminal(tmp_path, request, shell))
        return started[-1]

    yield start
    for each in started:
        each.close()


def plain(text: str) -> str:
    """Text without the sequences that colour it and move the cursor."""
    return re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>78])", "", text).replace("\r", "")


def test_a_whole_conversation(terminal: Callable[..., Terminal]) -> None:
    chat = terminal(files=["rooms.txt"])
    chat.sees(r"Reading", r"Scoring", r"Read rooms\.txt: [\d,]+ tokens in", "KV entries removed", PROMPT)
    chat.asks("Which colour has room 3?", r"tokens · [\d.]+ MB instead of [\d.]+ MB")
    chat.asks("/memory", "layer", "kept", r"tokens are compressed, [1-9]\d* later ones are kept in full")
    chat.asks("/compress 0.9", r"Read everything again: [\d,]+ tokens", r"90\.\d% of the KV")
    chat.asks("/sav x", "did you mean /save")
    chat.asks("/save rooms", r"Saved \S+rooms\.kvc \([\d.]+ MB\)")
    (chat.folder / "more.md").write_text(TEXT.replace("Room", "Hall"))
    chat.asks("/add more.md", r"Read more\.md: [\d,]+ tokens")
    chat.asks("/clear", "Forgot the questions and answers")
    chat.asks("/load rooms", r"about rooms\.txt, with 1 answer")
    chat.asks("/help", "/compress RATIO", "Ctrl-D leaves")
    chat.asks("And room 4?", r"tokens · [\d.]+ MB instead of")
    assert chat.leaves() == 0
    assert (chat.folder / "data" / "kvcompose-gguf").is_dir()


def test_ctrl_c_ends_an_answer_and_keeps_the_conversation(terminal: Callable[..., Terminal]) -> None:
    held = "held"
    chat = terminal(files=["rooms.txt"], says="Blue as the sky. Never said.", held=held, max_tokens=99)
    chat.sees(PROMPT)
    chat.types("Which colour?" + ENTER)
    chat.wait_for((chat.folder / held).exists)
    chat.types(CTRL_C)
    chat.sees("stopped", PROMPT)
    chat.asks("/save kept", "Saved")
    chat.asks("/load kept", "with 1 answer")
    (chat.folder / held).unlink()
    chat.types("And now?" + ENTER)
    chat.wait_for((chat.folder / held).exists)
    (chat.folder / held).unlink()
    chat.sees("Never said", r"tokens · ", PROMPT)
    assert chat.leaves() == 0


def test_ctrl_c_at_the_prompt_clears_the_line(terminal: Callable[..., Terminal]) -> None:
    chat = terminal(says="An answer.")
    chat.sees(PROMPT)
    chat.types("half a question" + CTRL_C)  # nothing is drawn again if both come at once
    chat.asks("/memory", "0 tokens are compressed")
    assert chat.leaves() == 0


def test_ctrl_d_leaves_and_so_does_quit(terminal: Callable[..., Terminal]) -> None:
    chat = terminal()
    chat.sees(PROMPT)
    assert chat.leaves() == 0
    chat = terminal()
    chat.sees(PROMPT)
    chat.types("/quit" + ENTER)
    assert chat.ends() == 0


def test_markdown_is_formatted(terminal: Callable[..., Terminal]) -> None:
    chat = terminal(says="# Title\n\n- **one**\n- two", max_tokens=99)
    chat.sees(PROMPT)
    chat.types("How?" + ENTER)
    chat.sees(r"tokens · ")
    lines = [line.strip() for line in plain(chat.rest).splitlines()]
    assert "Title" in lines
    assert "• one" in lines
    assert "**" not in chat.rest


def test_a_terminal_may_be_resized_at_any_time(terminal: Callable[..., Terminal]) -> None:
    says = " ".join(f"word{i}" for i in range(60))
    chat = terminal(says=says, held="held", max_tokens=999)
    chat.sees(PROMPT)
    chat.resize(80)
    chat.types("How?" + ENTER)
    chat.wait_for((chat.folder / "held").exists)
    chat.resize(40)
    (chat.folder / "held").unlink()
    chat.sees(r"tokens · ")
    # what stays is drawn for the width at the end
    shown = plain(chat.rest)
    last = shown[shown.rindex("word0 ") :]
    assert last.split()[:60] == says.split()
    assert max(len(line.rstrip()) for line in last.split("word59")[0].splitlines()) <= 40
    chat.sees(PROMPT)
    chat.resize(100)
    chat.asks("/memory", "0 tokens are compressed")
    assert chat.leaves() == 0


def test_earlier_questions_come_back_in_another_chat(terminal: Callable[..., Terminal]) -> None:
    chat = terminal(says="Yes.")
    chat.sees(PROMPT)
    chat.asks("Is it remembered?", "tokens ·")
    assert chat.leaves() == 0
    chat = terminal(says="Yes.")
    chat.sees(PROMPT)
    chat.types(UP)
    chat.sees(r"Is it remembered\?")
    history = chat.folder / "data" / "kvcompose-gguf" / "chat-history"
    assert history.stat().st_mode & 0o077 == 0, "others can read what was asked"


def test_a_question_may_have_several_lines(terminal: Callable[..., Terminal]) -> None:
    chat = terminal(says="Yes.")
    chat.sees(PROMPT)
    chat.types("first line" + ALT_ENTER + "second line" + ENTER)
    chat.sees("tokens ·", PROMPT)
    assert chat.leaves() == 0
    history = (chat.folder / "data" / "kvcompose-gguf" / "chat-history").read_text()
    assert "+first line\n+second line\n" in history


def test_commands_and_files_are_completed(terminal: Callable[..., Terminal]) -> None:
    chat = terminal()
    chat.sees(PROMPT)
    chat.types("/add roo\t")
    chat.sees(r"ms\.txt")  # only what is new is drawn
    chat.types(ENTER)
    chat.sees(r"Read rooms\.txt", PROMPT)


def test_a_document_from_standard_input_leaves_the_terminal_for_questions(terminal: Callable[..., Terminal]) -> None:
    chat = terminal("cat rooms.txt |", files=["-"])
    chat.sees(r"Read standard input: [\d,]+ tokens", PROMPT)
    chat.asks("Which colour?", "tokens ·")
    assert chat.leaves() == 0


def test_a_missing_file_ends_the_command(terminal: Callable[..., Terminal]) -> None:
    chat = terminal(files=["nowhere.txt"])
    chat.sees(r"error: nowhere\.txt does not exist")
    assert chat.ends() == 1


def test_a_session_starts_at_once(terminal: Callable[..., Terminal]) -> None:
    chat = terminal(files=["rooms.txt"])
    chat.sees(PROMPT)
    chat.asks("/save rooms", "Saved")
    assert chat.leaves() == 0
    chat = terminal(session="rooms")
    chat.sees("Loaded rooms", PROMPT)
    assert "Reading" not in chat.rest
    chat.asks("Which colour?", "tokens ·")
    assert chat.leaves() == 0


def test_file_names_and_answers_cannot_give_orders_to_the_terminal(terminal: Callable[..., Terminal]) -> None:
    name = "a\x1b]0;owned\x07.txt"
    chat = terminal(files=[name], says="\x1b]0;owned\x07\x1b[2J done", max_tokens=99)
    (chat.folder / name).write_text(TEXT)
    chat.sees(PROMPT)
    assert "\x1b]0;owned" not in chat.rest
    chat.types("How?" + ENTER)
    chat.sees("tokens ·")
    assert "\x1b]0;owned" not in chat.rest
    assert "␛[2J done" in chat.rest
