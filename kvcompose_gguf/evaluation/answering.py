"""Greedy answers and the logits that they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.types import FloatArray

if TYPE_CHECKING:
    from ..llama import Llama

#: tokens that are tried at once: each of them costs about a fifth of the decode that it may save
N_DRAFT = 8
#: last tokens that an answer has to have in common with an earlier one to be continued like it, the longest first
N_COMMON = (8, 4, 2)
#: between answers: no token has this number
BETWEEN = chr(0x10FFFF)

#: puts a cache back to the end of the context
Restore = Callable[[], None]


@dataclass(frozen=True, eq=False)
class Reply:
    """A greedy answer.

    Attributes:
        choices: chosen tokens, the end token included if the answer ended with one.
        logits: that each was chosen from, float32 ``(len(choices), n_vocab)``.
        text: without the end token.
    """

    choices: list[int]
    logits: FloatArray
    text: str


class Drafts:
    """Answers to one question: caches that differ a little often answer alike, or say the same again and again."""

    def __init__(self) -> None:
        self._answers = BETWEEN  # a character a token, for fast search

    def add(self, choices: list[int]) -> None:
        """Remember an answer."""
        self._answers += "".join(map(chr, choices)) + BETWEEN

    def after(self, choices: list[int], n_most: int) -> list[int]:
        """At most ``n_most`` tokens that may follow ``choices``: what followed them, or their end, before."""
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
    """Answer ``question`` behind what is in the cache, token by token.

    Args:
        one_line: the answer ends with its first line that says something.
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
    """The answer of another cache, beside the logits that it has for ``reference``'s choices.

    The reference is evaluated at once, and only from the first token that this cache would have chosen differently
    on does it answer token by token: the same tokens as ``answer``'s, up to ties that rounding decides.

    Args:
        drafts: earlier answers, which save time only.
    Returns:
        its own choices and text; the logits after question and reference, ``(len(reference.choices), n_vocab)``.
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
    """Choose tokens, the first of them from ``rows[-1]``, until the answer ends."""
    ahead: list[tuple[int, FloatArray]] = []  # tokens that were tried, and the logits after each
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
