"""The prompt of a chat in a terminal: editing, history, completion."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import create_input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from ..support.files import data_dir
from .lines import COMMANDS, Chat

_PLACEHOLDER = "Ask a question. /help lists the commands."


def converse(chat: Chat) -> None:
    """Ask for questions and commands until the user leaves."""
    session: PromptSession[str] = PromptSession(
        message=FormattedText([("bold", "> ")]),
        placeholder=FormattedText([("fg:ansibrightblack", _PLACEHOLDER)]),
        prompt_continuation=FormattedText([("", "  ")]),
        history=open_history(history_file()),
        completer=ChatCompleter(),
        complete_while_typing=False,
        multiline=True,
        key_bindings=key_bindings(),
        # standard input may have been a document: the terminal is still there
        input=create_input(always_prefer_tty=True),
        output=create_output(),
    )
    while True:
        chat.screen.gap()
        try:
            line = session.prompt()
        except EOFError:
            return
        if not chat.handle(line):
            return


def history_file() -> Path:
    """The file of earlier questions, in the user's data folder."""
    return data_dir() / "chat-history"


def open_history(file: Path) -> History:
    """Earlier questions, readable by the user alone; only this chat's if the file cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        with file.open("ab"):
            return FileHistory(str(file))
    except OSError:
        return InMemoryHistory()


def key_bindings() -> KeyBindings:
    """Enter asks, Alt-Enter starts a new line, Ctrl-C clears."""
    keys = KeyBindings()

    @keys.add("enter")
    def _ask(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    @keys.add("<sigint>")
    def _clear(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    return keys


class ChatCompleter(Completer):
    """Completes commands, and the file of ``/add``."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """See ``Completer.get_completions``."""
        text = document.text_before_cursor
        if text.startswith("/add "):
            path = Document(text.removeprefix("/add "))
            yield from self._paths.get_completions(path, complete_event)
        elif text.startswith("/") and " " not in text:
            for command in COMMANDS:
                if command.name.startswith(text):
                    yield Completion(command.name, -len(text), display_meta=command.help)
