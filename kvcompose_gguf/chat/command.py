"""What ``kvcompose chat`` does with its options."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ContextLengthError
from ..load import load_model
from ..methods import make_method
from ..models.resolve import resolve_model
from ..native.vocab_only import n_ctx_trained, open_vocabulary
from ..support.checks import check_integer, check_number, check_positive
from .interrupts import Stopped

if TYPE_CHECKING:
    from .commands import Chat
    from .conversation import Conversation
    from .documents import Document

#: the fraction removed if neither it nor a number of bytes is given
DEFAULT_RATIO = 0.5  # where answers are still those of the full cache (docs/evaluation.md)
#: tokens of the smallest context that is made for a model that was trained for so many
MIN_CONTEXT = 32768
#: tokens that a question and its answer need at least
MIN_ROOM = 64
#: exit code after Ctrl-C, as shells have it
STOPPED = 130


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Options of ``kvcompose chat``.

    Attributes:
        model: path of a .gguf file, or a name that ``kvcompose fetch`` knows.
        files: documents that are read first; ``-`` is standard input.
        questions: questions to answer, one after the other; empty: the terminal or standard input asks.
        session: name or path of a saved session to go on with, instead of files.
        json: print one JSON document instead of text.
        compression_ratio: fraction of the KV entries that is removed, in [0, 1); ``DEFAULT_RATIO`` if
            ``max_kv_bytes`` is not given either.
        max_kv_bytes: bytes that the compressed context may take, instead of ``compression_ratio``.
        method: a text for ``make_method``, e.g. ``"kvcompose"`` or ``"snapkv,window=32"``.
        scoring: the method's ``scoring`` option; None: the method's default.
        ctx_size: longest conversation in tokens; None: as many as the documents need, up to the model's training
            length.
        max_tokens: longest answer in tokens.
        temperature: 0: always the most probable token.
        repeat_penalty: divides the logits of the answer's latest tokens, against answers that run in circles; 1: off.
            Above 1, small models also misspell names that they copy from a document.
        seed: seed of the sampler; None: another one each time.
        system: system prompt, or None.
        flash_attn: use flash attention for everything but the scoring.
        threads: CPU threads; None: llama-cpp-python's choice.
    Raises:
        ConfigError: an option is out of its range, or two options contradict each other.
    """

    model: str
    files: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    session: str | None = None
    json: bool = False
    compression_ratio: float | None = None
    max_kv_bytes: int | None = None
    method: str = "kvcompose"
    scoring: str | None = None
    ctx_size: int | None = None
    max_tokens: int = 1024
    temperature: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None
    system: str | None = None
    flash_attn: bool = True
    threads: int | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature)
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} is negative or not finite: 0 is greedy, 0.8 is usual")
        for name in ("ctx_size", "threads", "max_kv_bytes"):
            check_integer(name, getattr(self, name), optional=True)
            check_positive(name, getattr(self, name))
        check_number("repeat_penalty", self.repeat_penalty)
        check_positive("repeat_penalty", self.repeat_penalty)
        check_integer("max_tokens", self.max_tokens)
        check_positive("max_tokens", self.max_tokens)
        if self.compression_ratio is not None and self.max_kv_bytes is not None:
            raise ConfigError(
                f"compression_ratio={self.compression_ratio} and max_kv_bytes={self.max_kv_bytes} are two budgets: "
                "give one of them"
            )
        if self.session is not None and self.files:
            raise ConfigError(
                f"session={self.session!r} has its own documents: leave out {', '.join(self.files)}, "
                "and add files in the chat with /add"
            )


def chat(options: ChatOptions) -> int:
    """Hold a conversation as ``options`` say; returns the exit code of the process.

    Raises:
        KVComposeError: a document, the model, the session or an option cannot be used.
    """
    from rich.console import Console

    from .commands import Chat
    from .documents import read_documents
    from .screen import Screen

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


@contextlib.contextmanager
def open_conversation(options: ChatOptions, documents: Sequence[Document] = ()) -> Iterator[Conversation]:
    """A conversation that has room for ``documents``, which are not read yet, or for the session of ``options``.

    Raises:
        ContextLengthError: they do not fit; the model's weights were not read.
        KVComposeError: the model, the session or an option cannot be used.
    """
    from .conversation import Conversation

    method = make_method(options.method, **_method_options(options))
    model_path = resolve_model(options.model)
    n_ctx = _context_size(model_path, options, documents)
    seed: dict[str, Any] = {} if options.seed is None else {"seed": options.seed}
    llm = load_model(model_path, n_ctx, method, flash_attn=options.flash_attn, threads=options.threads, **seed)
    with contextlib.closing(llm):
        yield Conversation(
            llm,
            system=options.system or "",
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            repeat_penalty=options.repeat_penalty,
        )


def _method_options(options: ChatOptions) -> dict[str, Any]:
    """The budget and what else ``make_method`` is given."""
    out: dict[str, Any] = {} if options.scoring is None else {"scoring": options.scoring}
    if options.max_kv_bytes is not None:
        return {**out, "max_kv_bytes": options.max_kv_bytes}
    return {
        **out,
        "compression_ratio": DEFAULT_RATIO if options.compression_ratio is None else options.compression_ratio,
    }


def _context_size(model_path: Path, options: ChatOptions, documents: Sequence[Document]) -> int:
    """Cells for the conversation: what was asked for, or twice what is read and at least ``MIN_CONTEXT``.

    The cache has memory for what it holds only; a longer context than needed costs buffers for computing.
    """
    from ..sessions import describe, session_path

    with open_vocabulary(model_path) as vocabulary:
        trained = n_ctx_trained(vocabulary) or MIN_CONTEXT
        counts = [
            len(vocabulary.tokenize(document.text.encode("utf-8", "replace"), False, True)) for document in documents
        ]
    if options.session is not None:
        counts.append(describe(session_path(options.session)).n_tokens)
    limit = options.ctx_size or trained
    if sum(counts) + MIN_ROOM > limit:
        names = ", ".join(document.name for document in documents) or f"session {options.session}"
        raise ContextLengthError(
            f"{names}: {sum(counts):,} tokens do not fit into the context of {limit:,} with {MIN_ROOM} for a question. "
            + _advice(options, trained, sum(counts))
        )
    return options.ctx_size or min(trained, max(MIN_CONTEXT, 2 * sum(counts)))


def _advice(options: ChatOptions, trained: int, n_tokens: int) -> str:
    if options.ctx_size is not None and n_tokens + MIN_ROOM <= trained:
        return f"Use a larger --ctx-size, the model was trained for {trained:,} tokens"
    return f"The model was trained for {trained:,} tokens: use a model with a longer context, or a shorter text"


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
    from .machine import answer_json, chat_json

    answers = []
    for question in options.questions or tuple(line.strip() for line in sys.stdin if line.strip()):
        answer, pieces = talk.conversation.ask(question)
        with contextlib.closing(pieces):
            for _ in pieces:
                pass
        answers.append(answer_json(answer, talk.conversation.memory))
    print(chat_json(talk.conversation, answers))
    return 0
