"""A growing conversation as tokens, so that what the cache holds is continued token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..llama import Llama


@dataclass(frozen=True)
class Anchor:
    """Tokens that the cache holds, and the text that they stand for, without BOS."""

    text: str
    tokens: tuple[int, ...]


class Tokens:
    """Tokenizes prompts so that they begin with what the cache holds.

    A tokenizer may divide an answer in another way than the model wrote it. The cache would then have to be read again
    from the first difference on, and models with sliding windows cannot even go back so far.
    """

    def __init__(self, llm: Llama) -> None:
        self._llm = llm
        self._context: Anchor | None = None
        self._all: Anchor | None = None

    def of(self, text: str) -> list[int]:
        """Tokens of a prompt, with BOS if the model wants one."""
        for anchor in (self._all, self._context):
            if anchor is not None and text.startswith(anchor.text):
                rest = self._rest(text[len(anchor.text) :].encode("utf-8", "replace"))
                if rest is not None:
                    return [*anchor.tokens, *rest]
        return list(self._llm.tokenize(text.encode("utf-8", "replace"), add_bos=self._llm.adds_bos, special=True))

    def text(self, tokens: Sequence[int]) -> str:
        """The text of a prompt's tokens, without BOS."""
        if self._llm.adds_bos and tokens and tokens[0] == self._llm.token_bos():
            tokens = tokens[1:]
        return b"".join(self._llm.piece(token, special=True) for token in tokens).decode("utf-8", "replace")

    def compressed(self, tokens: Sequence[int]) -> None:
        """Remember the compressed context: later prompts begin with exactly these tokens."""
        self._context, self._all = Anchor(self.text(tokens), tuple(tokens)), None

    def continued(self, text: str, tokens: Sequence[int]) -> None:
        """Remember a prompt and its answer, with the answer's tokens as the model wrote them."""
        self._all = Anchor(text, tuple(tokens))

    def loaded(self) -> None:
        """Remember what a session has brought into the cache."""
        tokens = list(self._llm.eval_tokens)
        self.compressed(tokens[: self._llm.n_context])
        self._all = Anchor(self.text(tokens), tuple(tokens))

    def _rest(self, raw: bytes) -> list[int] | None:
        """Tokens of a text in the middle, or None if the tokenizer changes it, e.g. puts a space before every text."""
        if not raw:
            return []
        tokens = list(self._llm.tokenize(raw, add_bos=False, special=True))
        return tokens if b"".join(self._llm.piece(token, special=True) for token in tokens) == raw else None
