"""Generates greedy answers and returns the logits behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.types import FloatArray

if TYPE_CHECKING:
    from ..llama import Llama

#: draft tokens per decode; each costs about a fifth of the decode that it may save
N_DRAFT = 8
#: last tokens that must match an earlier answer before its continuation is drafted; longest match first
N_COMMON = (8, 4, 2)
#: separates answers; no token has this number
BETWEEN = chr(0x10FFFF)

#: restores the cache to the end of the context
Restore = Callable[[], None]


@dataclass(frozen=True, eq=False)
class Reply:
    """A greedy answer.

    Attributes:
        choices: the chosen tokens, including the end token if the model produced one.
        logits: the logits from which each token was chosen, float32 ``(len(choices), n_vocab)``.
        text: the answer without the end token.
    """

    choices: list[int]
    logits: FloatArray
    text: str


class Drafts:
    """Earlier answers to one question, used as drafts, because similar caches often answer alike."""

    def __init__(self) -> None:
        self._answers = BETWEEN  # one character per token, for fast search

    def add(self, choices: list[int]) -> None:
        """Remembers an answer."""
        self._answers += "".join(map(chr, choices)) + BETWEEN

    def after(self, choices: list[int], n_most: int) -> list[int]:
        """Returns at most ``n_most`` tokens that followed the end of ``choices`` in an earlier answer or this one."""
        own = "".join(map(chr, choices))
        beginnings = [BETWEEN + own, *(own[-n:] for n in N_COMMON if n <= len(own))]
        seen = self._answers + own[:-1]
        for beginning in beginnings:
            at = seen.rfind(beginning)
            if at >= 0:
                following = seen[at + len(beginning) :][: max(0, n_most)]
                return [ord(token) for token in following.split(BETWEEN)[0]]
        return []


def answer(llama: Llama, question: list[int], max_tokens: int, *, one_line: bool = False) -> Reply:
    """Answers ``question`` after the tokens in the cache, one token per decode.

    Args:
        one_line: stop after the first line that is not blank.
    """
    choices: list[int] = []
    rows = [llama.eval_logits(question)[-1]]
    _continue(llama, max_tokens, choices, rows, one_line)
    return Reply(choices, np.stack(rows), _text(llama, choices))


def answer_again(
    llama: Llama,
    question: list[int],
    max_tokens: int,
    reference: Reply,
    restore: Restore,
    drafts: Drafts | None = None,
) -> Reply:
    """Returns this cache's own answer, and its logits for the tokens of ``reference``.

    Evaluates the whole reference in one call. Decodes token by token only from the first token that this cache would
    choose differently. The tokens equal those of ``answer``, except for ties that rounding decides.

    Args:
        drafts: earlier answers; they only save time.
    Returns:
        this cache's choices and text, and its logits after the question and the reference,
        ``(len(reference.choices), n_vocab)``.
    """
    n_context = llama.n_tokens
    logits = llama.eval_logits(question + reference.choices[:-1])[len(question) - 1 :]
    greedy = logits.argmax(axis=1)
    different = np.flatnonzero(greedy != reference.choices)
    if not different.size:
        return Reply(reference.choices, logits, reference.text)
    n_same = int(different[0])
    choices = reference.choices[:n_same]
    if llama.can_truncate:
        llama.truncate(n_context + len(question) + n_same)
    else:
        restore()
        llama.eval_logits(question + choices)
    _continue(llama, max_tokens, choices, [logits[n_same]], drafts=drafts if llama.can_truncate else None)
    return Reply(choices, logits, _text(llama, choices))


def _continue(
    llama: Llama,
    max_tokens: int,
    choices: list[int],
    rows: list[FloatArray],
    one_line: bool = False,
    drafts: Drafts | None = None,
) -> None:
    """Appends tokens to ``choices`` until the answer ends; the first one is chosen from ``rows[-1]``."""
    ahead: list[tuple[int, FloatArray]] = []  # drafted tokens, and the logits after each
    while True:
        token = int(rows[-1].argmax())
        choices.append(token)
        if len(choices) >= max_tokens or llama.is_end(token):
            break
        if one_line and "\n" in _text(llama, choices).lstrip():
            break
        if ahead and ahead[0][0] == token:
            rows.append(ahead.pop(0)[1])
            continue
        _forget(llama, len(ahead))
        draft = drafts.after(choices, min(N_DRAFT, max_tokens - len(choices) - 1)) if drafts else []
        logits = llama.eval_logits([token, *draft])
        rows.append(logits[0])
        ahead = list(zip(draft, logits[1:], strict=True))
    _forget(llama, len(ahead))


def _forget(llama: Llama, n_last: int) -> None:
    if n_last:
        llama.truncate(llama.n_tokens - n_last)


def _text(llama: Llama, choices: list[int]) -> str:
    ended = bool(choices) and llama.is_end(choices[-1])
    raw: bytes = llama.detokenize(choices[:-1] if ended else choices)
    return raw.decode("utf-8", errors="replace")
