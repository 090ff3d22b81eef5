"""What ``kvcompose chat`` does with its options."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

from rich.console import Console

from ..errors import ConfigError
from ..support.documents import read_documents
from .interrupts import Stopped
from .lines import Chat
from .machine import answer_json, chat_json
from .opening import open_conversation
from .options import ChatOptions
from .screen import Screen

#: exit code after Ctrl-C, as shells have it
STOPPED = 130


def chat(options: ChatOptions) -> int:
    """Hold a conversation as ``options`` say; returns the exit code of the process.

    Raises:
        KVComposeError: a document, the model, the session or an option cannot be used.
    """
    mode = _mode(options)
    documents = read_documents(options.files)
    # answers go to standard output and all else to standard error, so that a pipe has nothing but answers
    screen = Screen(Console(highlight=False), Console(stderr=True, highlight=False))
    with open_conversation(options, documents) as conversation:
        talk = Chat(conversation, screen)
        try:
            if options.session is not None:
                talk.load(options.session)
            elif documents:
                talk.read(documents)
            return mode(options, talk)
        except (Stopped, KeyboardInterrupt):
            screen.note("stopped")
            return STOPPED


#
# who asks
#


def _mode(options: ChatOptions) -> Callable[[ChatOptions, Chat], int]:
    """What asks the questions: the command line, lines of standard input, or a user at a terminal."""
    if options.json:
        if not options.questions and sys.stdin.isatty():
            raise ConfigError("--json without a question: give one with -q, or pipe questions in, one a line")
        return _answer_json
    if options.questions:
        return _answer_questions
    has_terminal = sys.stdout.isatty() and (sys.stdin.isatty() or "-" in options.files)
    return _converse if has_terminal else _answer_lines


def _converse(options: ChatOptions, talk: Chat) -> int:
    from .terminal import converse

    converse(talk)
    return 0


def _answer_questions(options: ChatOptions, talk: Chat) -> int:
    for i, question in enumerate(options.questions):
        if i:
            talk.screen.gap()
        if talk.ask(question).end == "stopped":
            raise Stopped("stopped by Ctrl-C")
    return 0


def _answer_lines(options: ChatOptions, talk: Chat) -> int:
    """Questions and commands from standard input, one a line; the exit code says whether one has failed."""
    for line in sys.stdin:
        if not talk.handle(line):
            break
    return int(talk.has_failed)


def _answer_json(options: ChatOptions, talk: Chat) -> int:
    answers = []
    for question in options.questions or tuple(line.strip() for line in sys.stdin if line.strip()):
        answer, pieces = talk.conversation.ask(question)
        with contextlib.closing(pieces):
            for _ in pieces:
                pass
        answers.append(answer_json(answer, talk.conversation.memory))
    print(chat_json(talk.conversation, answers))
    return 0
