"""A conversation about documents, without a terminal: what is read, compressed, asked, answered and saved."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ContextLengthError, StateError
from ..methods.continuing import has_grown
from ..plan import seam
from ..support.documents import Document, join_documents
from . import prompts
from .answers import Answer, Piece, Writer
from .prompts import PlainFormat, Turn
from .tokens import Tokens

if TYPE_CHECKING:
    from ..llama import Llama
    from ..methods import Method
    from ..native.chat_library import Rendered
    from ..plan.report import KVReport
    from ..sessions import SessionInfo
    from ..support.progress import Progress

#: tokens that a question and its answer need at least
MIN_ROOM = 64

OnProgress = Callable[["Progress"], None]

_VERSION = 1  # of what is saved beside the cache


@dataclass(frozen=True)
class Memory:
    """What the cache holds.

    Attributes:
        n_tokens: tokens in the context.
        n_context: tokens of them that are compressed.
        n_bytes: bytes of the rows that the cache holds.
        n_bytes_full: bytes that the rows of all these tokens would have without compression.
        n_bytes_allocated: bytes of the cache, with the room for new tokens.
    """

    n_tokens: int
    n_context: int
    n_bytes: int
    n_bytes_full: int
    n_bytes_allocated: int


class Conversation:
    """Questions and answers about documents on one compressed cache.

    Documents are compressed together with everything that was said before them. What is said later stays in full, until
    it is more than what was compressed: then all of it is compressed again.

    Args:
        llm: the model, with the method that compresses; the conversation does not close it.
        system: system prompt; empty: the template's own, or none.
        max_tokens: longest answer.
        temperature: 0: always the most probable token.
        repeat_penalty: divides the logits of the answer's latest tokens; 1: off.
        began: what the template takes for the present time.
    """

    def __init__(
        self,
        llm: Llama,
        *,
        system: str = "",
        max_tokens: int = 1024,
        temperature: float = 0.0,
        repeat_penalty: float = 1.0,
        began: datetime | None = None,
    ) -> None:
        if llm.kv_compressor is None:
            raise ConfigError("llm has no kv_compressor: a conversation needs Llama(..., kv_compressor=KVCompose(...))")
        self.llm = llm
        self.turns: list[Turn] = []
        #: names of the documents that were read
        self.documents: list[str] = []
        self._waiting = ""  # text of documents that the next question is about
        self._system, self._began = system, began or datetime.now(timezone.utc).astimezone()
        self._max_tokens, self._temperature, self._repeat_penalty = max_tokens, temperature, repeat_penalty
        self._format = prompts.make_format(llm, system, self._began)
        self._tokens = Tokens(llm)

    @property
    def method(self) -> Method:
        """The method that compresses."""
        method = self.llm.kv_compressor
        assert method is not None  # __init__ checks it, and nothing here takes it away
        return method

    @property
    def report(self) -> KVReport | None:
        """Figures of the compression, None if nothing is compressed."""
        return self.llm.kv_report if self.llm.n_context else None

    @property
    def memory(self) -> Memory:
        """What the cache holds now."""
        layers = self.llm.kv_layers
        used = sum(layer.n_bytes_row * self.llm.kv_cells(il).n_rows_used for il, layer in enumerate(layers))
        full = self.llm.n_tokens * sum(layer.n_bytes_row for layer in layers)
        return Memory(self.llm.n_tokens, self.llm.n_context, used, full, self.llm.kv_bytes)

    #
    # reading
    #

    def read(self, documents: Sequence[Document], on_progress: OnProgress | None = None) -> None:
        """Read documents, and compress everything from the beginning of the conversation to their end.

        If it fails, or ``on_progress`` raises, the conversation is what it was, and the next question reads it again.

        Raises:
            ContextLengthError: they do not fit behind what was said; nothing was read.
        """
        waiting = "\n\n".join(filter(None, [self._waiting, join_documents(documents)]))
        tokens = self._beginning(waiting)
        names = [document.name for document in documents]
        if len(tokens) + MIN_ROOM > self.llm.n_ctx():
            raise ContextLengthError(
                f"{', '.join(names)}: the conversation would have {len(tokens):,} tokens with this text, "
                f"but the context holds {self.llm.n_ctx():,} and a question needs {MIN_ROOM}: {self._advice()}"
            )
        self._compress(tokens, on_progress)
        self._waiting = waiting
        self.documents += names

    def compress(self, compression_ratio: float, on_progress: OnProgress | None = None) -> None:
        """Read the conversation again and compress all of it so far, with this fraction removed.

        Raises:
            ConfigError: the ratio is not in [0, 1).
        """
        self.llm.kv_compressor = replace(
            self.method, compression_ratio=compression_ratio, max_kv_bytes=None, n_kept=None
        )
        self._compress(self._beginning(self._waiting), on_progress)

    def clear(self) -> None:
        """Forget questions and answers; the documents stay."""
        self._waiting = "\n\n".join(filter(None, [*(turn.context for turn in self.turns), self._waiting]))
        self.turns = []

    def _beginning(self, waiting: str) -> list[int]:
        """Tokens of the conversation up to the next question, whatever that will be."""
        a, z = (self._tokens.of(self._format.render([*self.turns, Turn(q, "", waiting)]).prompt) for q in ("A", "Z"))
        return a[: seam.common_prefix(a, z)]

    def _compress(self, tokens: Sequence[int], on_progress: OnProgress | None) -> None:
        self.llm.compress(tokens, on_progress)
        self._tokens.compressed(tokens)

    #
    # asking
    #

    def ask(self, question: str, on_progress: OnProgress | None = None) -> tuple[Answer, Generator[Piece, None, None]]:
        """An answer, and the pieces that bring it; closing the generator stops the answer and keeps what was said.

        Args:
            on_progress: called while the conversation is compressed again.
        Raises:
            ConfigError: the question is empty.
            ContextLengthError: it does not fit; the conversation is what it was.
        """
        turn = Turn(question.strip(), "", self._waiting)
        if not turn.question:
            raise ConfigError("the question is empty: write one")
        rendered = self._format.render([*self.turns, turn])
        prompt = self._tokens.of(rendered.prompt)
        if len(prompt) + MIN_ROOM > self.llm.n_ctx():
            raise ContextLengthError(
                f"the conversation would have {len(prompt):,} tokens with this question, but the context holds "
                f"{self.llm.n_ctx():,} and an answer needs {MIN_ROOM}: {self._advice()}"
            )
        self._keep_small(prompt, on_progress)
        answer = Answer(turn.question, len(prompt))
        return answer, self._pieces(answer, turn, rendered, prompt)

    def _keep_small(self, prompt: Sequence[int], on_progress: OnProgress | None) -> None:
        """Compress all before the question if the cache holds another text, or more was said than it has compressed."""
        n_context, method = self.llm.n_context, self.method
        known = list(self.llm.eval_tokens)[:n_context]
        if list(prompt[:n_context]) == known and not has_grown(len(prompt), n_context, method):
            return
        n_before = len(self._beginning(self._waiting))
        # a text that was pasted into the question may be long, too
        n = n_before if n_before >= method.min_tokens else len(prompt) - method.keep_last
        if n >= method.min_tokens:
            self._compress(prompt[:n], on_progress)

    def _pieces(
        self, answer: Answer, turn: Turn, rendered: Rendered, prompt: Sequence[int]
    ) -> Generator[Piece, None, None]:
        writer = Writer(self.llm, answer, rendered, self._format.stops)
        n_most = min(self._max_tokens, self.llm.n_ctx() - len(prompt))
        try:
            yield from writer.pieces(prompt, n_most, temp=self._temperature, repeat_penalty=self._repeat_penalty)
            if answer.end == "max_tokens" and n_most < self._max_tokens:
                answer.end = "context"
        finally:
            writer.finish()
            if answer.text.strip() or answer.end != "stopped":
                self.turns.append(replace(turn, answer=answer.text))
                self._waiting = ""
            if not writer.is_cut:
                self._tokens.continued(rendered.prompt + writer.text, [*prompt, *writer.tokens])

    def _advice(self) -> str:
        trained = self.llm.n_ctx_train
        longer = f"start with --ctx-size {trained}, " if trained > self.llm.n_ctx() else ""
        return f"{longer}give a shorter text, or forget the questions and answers with /clear"

    #
    # sessions
    #

    def save(self, path: str | Path) -> SessionInfo:
        """Write the conversation and its cache to a file.

        Raises:
            StateError: the file cannot be written.
        """
        return self.llm.save_session(path, {"chat": self._state()})

    def load(self, path: str | Path) -> SessionInfo:
        """Go on with a saved conversation, or with a context that something else has saved, as a document.

        Raises:
            StateError: the file is missing or damaged, or does not fit this model; the conversation is what it was.
        """
        from ..sessions import describe

        info = describe(Path(path))
        state = info.extra.get("chat")
        if state is not None and state.get("version") != _VERSION:
            raise StateError(f"{path} is a chat of version {state.get('version')}, this is version {_VERSION}: update")
        info = self.llm.load_session(path)
        self._tokens.loaded()
        if state is None:
            self._adopt(Path(path).name)
        else:
            self._restore(state)
        return info

    def _state(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "system": self._system,
            "began": self._began.isoformat(),
            "format": self._format.name,
            "messages": prompts.to_messages(self.turns),
            "documents": list(self.documents),
            "waiting": self._waiting,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._system, self._began = state["system"], datetime.fromisoformat(state["began"])
        plain = state["format"] == PlainFormat.name
        self._format = PlainFormat(self._system) if plain else prompts.make_format(self.llm, self._system, self._began)
        self.turns, self.documents = prompts.from_messages(state["messages"]), list(state["documents"])
        self._waiting = state["waiting"]

    def _adopt(self, name: str) -> None:
        """Take a cache of unknown origin for a document: questions follow it as plain text."""
        self._system, self._format = "", PlainFormat()
        self.turns, self.documents = [], [name]
        self._waiting = self._tokens.text(list(self.llm.eval_tokens))
