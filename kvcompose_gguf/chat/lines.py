"""What a line of a chat means: a question, or a command such as ``/add FILE``."""

from __future__ import annotations

import contextlib
import difflib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ..errors import ConfigError, KVComposeError
from ..support.documents import Document, read_document
from ..support.printing import megabytes
from .answers import Answer
from .conversation import Conversation, OnProgress
from .interrupts import Interrupts, Stopped, without_echo
from .screen import Screen

if TYPE_CHECKING:
    from ..support.progress import Progress


@dataclass(frozen=True)
class Command:
    """A command of the chat: its name, its argument (empty: none), and what it does."""

    name: str
    argument: str
    help: str


COMMANDS = (
    Command("/add", "FILE", "read another document; the conversation so far is compressed together with it"),
    Command("/memory", "", "show what every layer keeps, and the memory that this takes"),
    Command("/compress", "RATIO", "read everything again and remove this fraction of the KV entries, e.g. 0.9"),
    Command("/save", "NAME", "save the conversation, for /load or `kvcompose chat MODEL --session NAME`"),
    Command("/load", "NAME", "go on with a saved conversation"),
    Command("/clear", "", "forget questions and answers; the documents stay"),
    Command("/help", "", "show this list"),
    Command("/quit", "", "leave; so does Ctrl-D"),
)


class Chat:
    """A conversation and the screen that shows it."""

    def __init__(self, conversation: Conversation, screen: Screen) -> None:
        self.conversation, self.screen = conversation, screen
        #: a question or command failed
        self.has_failed = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/add": self._add, "/memory": self._memory, "/compress": self._compress, "/save": self._save,
            "/load": self.load, "/clear": self._clear, "/help": self._help,
        }  # fmt: skip

    def handle(self, line: str) -> bool:
        """Answer a question or carry out a command; returns whether the chat goes on."""
        line = line.strip()
        if not line:
            return True
        if line == "/quit":
            return False
        try:
            if line.startswith("/"):
                self._carry_out(line)
            else:
                self.ask(line)
        except Stopped:
            self.screen.note("stopped; the conversation is as it was")
        except KVComposeError as error:
            self.has_failed = True
            self.screen.error(error)
        return True

    def ask(self, question: str) -> Answer:
        """Show the answer to a question; the first Ctrl-C ends it.

        Raises:
            KVComposeError: the question cannot be answered.
            Stopped: Ctrl-C was pressed while the conversation was compressed again.
        """
        with without_echo(), Interrupts() as interrupts:
            with self._progress(interrupts) as on_progress:
                answer, pieces = self.conversation.ask(question, on_progress)
            with contextlib.closing(pieces):
                self.screen.answer(interrupts.until_pressed(pieces))
        self.screen.figures(answer, self.conversation.memory)
        return answer

    def read(self, documents: Sequence[Document]) -> None:
        """Read and compress documents, with a progress bar, and say what became of them.

        Raises:
            ContextLengthError: they do not fit.
            Stopped: Ctrl-C was pressed.
        """
        names = ", ".join(document.name for document in documents)
        with self._reading(f"Read {names}"), self._working() as on_progress:
            self.conversation.read(documents, on_progress)

    @contextlib.contextmanager
    def _working(self) -> Iterator[OnProgress]:
        """The work in the ``with`` block has a progress bar, and Ctrl-C stops it."""
        with without_echo(), Interrupts() as interrupts, self._progress(interrupts) as on_progress:
            yield on_progress

    @contextlib.contextmanager
    def _progress(self, interrupts: Interrupts) -> Iterator[OnProgress]:
        with self.screen.progress() as show:

            def on_progress(progress: Progress) -> None:
                show(progress)
                interrupts.check()

            yield on_progress

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Say afterwards what was read, how long it took and what is kept."""
        start = time.perf_counter()
        yield
        seconds, memory, report = time.perf_counter() - start, self.conversation.memory, self.conversation.report
        if report is None:
            least = self.conversation.method.min_tokens
            kept = f"fewer than {least} tokens are not compressed"
        else:
            sizes = f"{megabytes(memory.n_bytes)} instead of {megabytes(memory.n_bytes_full)}"
            kept = f"{report.compression_ratio:.1%} of the KV entries removed, {sizes}"
        self.screen.note(f"{what}: {memory.n_tokens:,} tokens in {seconds:.1f} s, {kept}.")

    #
    # commands
    #

    def _carry_out(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        command = next((command for command in COMMANDS if command.name == name), None)
        if command is None:
            close = difflib.get_close_matches(name, [command.name for command in COMMANDS], 1)
            hint = f"did you mean {close[0]}?" if close else "see /help, and begin questions without a slash"
            raise ConfigError(f"there is no command {name}: {hint}")
        if bool(argument.strip()) != bool(command.argument):
            raise ConfigError(f"{name} takes {command.argument or 'nothing'}: {name} {command.argument}".rstrip())
        self._commands[name](argument.strip())

    def _add(self, file: str) -> None:
        self.read([read_document(file)])

    def _memory(self, _: str) -> None:
        self.screen.memory(self.conversation.memory, self.conversation.report)

    def _compress(self, text: str) -> None:
        try:
            ratio = float(text)
        except ValueError as error:
            raise ConfigError(f"RATIO={text!r} is not a number: the fraction removed, e.g. /compress 0.9") from error
        with self._reading("Read everything again"), self._working() as on_progress:
            self.conversation.compress(ratio, on_progress)

    def _save(self, name: str) -> None:
        from ..sessions import session_path

        info = self.conversation.save(session_path(name))
        self.screen.note(f"Saved {info.path} ({megabytes(info.n_bytes)}).", has_path=True)
        self.screen.note(f"Go on from it with --session {name}.")

    def load(self, name: str) -> None:
        """Go on with a saved conversation, and say what is in it.

        Raises:
            StateError: there is no such session, or it does not fit this model.
        """
        from ..sessions import session_path

        start = time.perf_counter()
        info = self.conversation.load(session_path(name))
        seconds = time.perf_counter() - start
        names, n_answers = ", ".join(self.conversation.documents) or "no document", len(self.conversation.turns)
        self.screen.note(
            f"Loaded {name} in {seconds:.2f} s: {info.n_tokens:,} tokens, {info.n_context:,} of them compressed, about "
            f"{names}, with {n_answers} answer{'' if n_answers == 1 else 's'}."
        )

    def _clear(self, _: str) -> None:
        self.conversation.clear()
        self.screen.note("Forgot the questions and answers.")

    def _help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for command in COMMANDS:
            table.add_row(Text(f"{command.name} {command.argument}", style="bold"), command.help)
        table.add_row(Text("Enter", style="bold"), "ask; Alt-Enter or Esc Enter starts a new line")
        table.add_row(Text("Ctrl-C", style="bold"), "end the answer, or clear the line; Ctrl-D leaves")
        self.screen.show(table)
