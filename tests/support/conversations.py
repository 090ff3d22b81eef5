"""Conversations about two documents, on tiny models whose tokens are bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from kvcompose_gguf import KVCompose
from kvcompose_gguf.chat.answers import Answer
from kvcompose_gguf.chat.conversation import Conversation
from kvcompose_gguf.support.documents import Document
from support import tiny

#: with it the tiny model's answers are whole characters; other bytes come back as U+FFFD from a saved conversation
METHOD = KVCompose(compression_ratio=0.5, min_tokens=64, keep_last=8, scoring="repeat", in_place=False)

GEMMA = tiny.ARCHITECTURES["gemma3"]  # sliding windows of 64

TEXT = " ".join(f"Room {i} of the tower is painted in colour {i * 37 % 101}." for i in range(12))

DOCUMENT = Document("tower.txt", TEXT, "text")

OTHER = Document("cellar.md", TEXT.replace("tower", "cellar"), "text")


def byte_tokens(raw: bytes, add_bos: bool = True) -> list[int]:
    """A token a byte. The tiny vocabulary has no token for a space, so that llama.cpp's tokens have another text."""
    return [1] * add_bos + [3 + byte for byte in raw]


class Counted:
    """Counts the tokens that a Llama evaluates."""

    def __init__(self, llm: Any) -> None:
        self.n = 0
        evaluate = llm.context.eval

        def count(tokens: Any) -> None:
            self.n += len(tokens)
            evaluate(tokens)

        llm.context.eval = count

    def during(self, work: Callable[[], Any]) -> int:
        """Tokens that ``work`` evaluates."""
        before = self.n
        work()
        return self.n - before


def ask(conversation: Conversation, question: str, n_pieces: int | None = None, **options: Any) -> Answer:
    """The answer, or its first pieces."""
    answer, pieces = conversation.ask(question, **options)
    for _ in itertools.islice(pieces, n_pieces):
        pass
    pieces.close()
    return answer


def prompt_of(conversation: Conversation) -> bytes:
    """The text in the cache."""
    return b"".join(conversation.llm.piece(token) for token in conversation.llm.eval_tokens)
