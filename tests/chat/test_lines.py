"""Commands of a chat: what each does, and what is said about a wrong one."""

from __future__ import annotations

import io
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support import tiny
from support.conversations import METHOD
from support.llamas import ONE_THREAD

from kvcompose_gguf.chat.conversation import Conversation
from kvcompose_gguf.chat.interrupts import Interrupts, Stopped
from kvcompose_gguf.chat.lines import COMMANDS, Chat
from kvcompose_gguf.chat.screen import Screen
from kvcompose_gguf.support.documents import Document

TEXT = " ".join(f"Room {i} is painted in colour {i * 37 % 101}." for i in range(12))


class Recorded:
    """A chat on a tiny model, and what it has shown."""

    def __init__(self, llm: Any) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        screen = Screen(Console(file=self.out), Console(file=self.err, width=200))
        self.chat = Chat(Conversation(llm, max_tokens=8), screen)
        self.conversation = self.chat.conversation

    def __call__(self, line: str) -> str:
        """What ``line`` shows beside an answer."""
        self.err.truncate(self.err.seek(0))
        assert self.chat.handle(line)
        return self.err.getvalue().strip()


@pytest.fixture
def talk(make_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    monkeypatch.setattr("kvcompose_gguf.sessions.info.sessions_dir", lambda: tmp_path / "sessions")
    (tmp_path / "rooms.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return Recorded(make_llama(tiny.GQA, METHOD, n_ctx=4096, **ONE_THREAD))


def test_a_question_is_answered(talk: Recorded) -> None:
    assert talk("Which colour?") == ""
    assert talk.out.getvalue().endswith("\n")
    assert [turn.question for turn in talk.conversation.turns] == ["Which colour?"]


@pytest.mark.parametrize("line", ["", "   ", "\n"])
def test_an_empty_line_is_nothing(talk: Recorded, line: str) -> None:
    assert talk(line) == ""
    assert talk.conversation.turns == []


def test_add_reads_a_file(talk: Recorded) -> None:
    said = talk("/add rooms.txt")
    assert re.fullmatch(
        r"Read rooms\.txt: \d+ tokens in [\d.]+ s, 50\.\d% of the KV entries removed, [\d.]+ MB instead of [\d.]+ MB\.",
        said,
    )
    assert talk.conversation.documents == ["rooms.txt"]
    assert talk.conversation.llm.n_context > len(TEXT)


def test_a_short_document_says_that_it_is_not_compressed(talk: Recorded) -> None:
    Path("short.txt").write_text("x")
    assert "fewer than 64 tokens are not compressed" in talk("/add short.txt")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/add nowhere.txt", "error: nowhere.txt does not exist"),
        ("/add", "error: /add takes FILE: /add FILE"),
        ("/memory now", "error: /memory takes nothing: /memory"),
        ("/compress much", "error: RATIO='much' is not a number"),
        ("/compress 2", "error: compression_ratio=2.0"),
        ("/sve x", "error: there is no command /sve: did you mean /save?"),
        ("/etc/passwd is what?", "error: there is no command /etc/passwd: see /help"),
        ("/load nothing", "nothing.kvc"),
        ("/\x1b[2J", "␛[2J"),
    ],
)
def test_a_wrong_command_says_what_is_right_and_changes_nothing(talk: Recorded, line: str, says: str) -> None:
    before = talk.conversation.memory
    said = talk(line)
    assert says in said
    assert "\x1b[2J" not in said
    assert talk.chat.has_failed
    assert talk.conversation.memory == before
    assert talk.conversation.turns == []


def test_memory_shows_layers_and_bytes(talk: Recorded) -> None:
    assert "0 tokens are compressed" in talk("/memory")
    talk("/add rooms.txt")
    said = talk("/memory")
    assert said.count("\n") >= tiny.GQA.n_layer + 1
    assert f"{talk.conversation.llm.n_context:,} tokens are compressed, 0 later ones" in said


def test_compress_takes_another_ratio(talk: Recorded) -> None:
    talk("/add rooms.txt")
    assert "90." in talk("/compress 0.9")
    assert talk.conversation.report is not None
    assert talk.conversation.report.compression_ratio == pytest.approx(0.9, abs=0.01)


def test_save_and_load_bring_a_conversation_back(talk: Recorded, tmp_path: Path) -> None:
    talk("/add rooms.txt")
    talk("Which colour?")
    said = talk("/save rooms")
    assert f"Saved {tmp_path / 'sessions' / 'rooms.kvc'} (" in said
    assert "--session rooms" in said
    turns = list(talk.conversation.turns)
    talk("And now?")
    said = talk("/load rooms")
    assert re.match(
        r"Loaded rooms in [\d.]+ s: \d+ tokens, \d+ of them compressed, about rooms\.txt, with 1 answer\.", said
    )
    assert talk.conversation.turns == turns


def test_clear_keeps_the_document(talk: Recorded) -> None:
    talk("/add rooms.txt")
    talk("Which colour?")
    assert talk("/clear") == "Forgot the questions and answers."
    assert talk.conversation.turns == []
    assert talk.conversation.documents == ["rooms.txt"]


def test_help_lists_every_command(talk: Recorded) -> None:
    said = talk("/help")
    for command in COMMANDS:
        assert f"{command.name} {command.argument}".strip() in said


def test_quit_leaves(talk: Recorded) -> None:
    assert not talk.chat.handle("/quit")


#
# Ctrl-C
#


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(talk: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = talk.conversation.llm
    generate = llm.generate

    def interrupted(prompt: Any, **sampling: Any) -> Any:
        for i, token in enumerate(generate(prompt, **sampling)):
            if i == 3:
                press()
            yield token

    monkeypatch.setattr(llm, "generate", interrupted)
    monkeypatch.setattr(llm, "is_end", lambda token: False)
    monkeypatch.setattr(llm, "piece", lambda token, special=False: b"x")
    talk("Which colour?")
    assert [turn.answer for turn in talk.conversation.turns] == ["xxxx"]
    monkeypatch.setattr(llm, "generate", generate)
    talk("And now?")
    assert [turn.answer for turn in talk.conversation.turns] == ["xxxx", "xxxxxxxx"]


def test_ctrl_c_ends_reading_and_adds_nothing(talk: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    read = talk.conversation.read

    def interrupted(documents: list[Document], on_progress: Callable[..., None]) -> None:
        press()
        read(documents, on_progress)

    monkeypatch.setattr(talk.conversation, "read", interrupted)
    assert talk("/add rooms.txt") == "stopped; the conversation is as it was"
    assert talk.conversation.documents == []
    assert not talk.chat.has_failed


def test_the_second_ctrl_c_ends_at_once_and_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        press()
        with pytest.raises(Stopped):
            interrupts.check()
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) is before
