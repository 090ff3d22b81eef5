"""Greedy answers and the logits that they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.types import FloatArray

if TYPE_CHECKING:
    from ..llama import Llama

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


def answer(llama: Llama, question: list[int], max_tokens: int, *, one_line: bool = False) -> Reply:
    """Answer ``question`` behind what is in the cache, token by token.

    Args:
        one_line: the answer ends with its first line that says something.
    """
    choices: list[int] = []
    rows = [llama.eval_logits(question)[-1]]
    _continue(llama, max_tokens, choices, rows, one_line)
    return Reply(choices, np.stack(rows), _text(llama, choices))


def answer_again(llama: Llama, question: list[int], max_tokens: int, reference: Reply, restore: Restore) -> Reply:
    """The answer of another cache, beside the logits that it has for ``reference``'s choices.

    The reference is evaluated at once, and only from the first token that this cache would have chosen differently
    on does it answer token by token: the same tokens as ``answer``'s, up to ties that rounding decides.

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
    _continue(llama, max_tokens, choices, [logits[n_same]])
    return Reply(choices, logits, _text(llama, choices))


def _continue(
    llama: Llama, max_tokens: int, choices: list[int], rows: list[FloatArray], one_line: bool = False
) -> None:
    """Choose tokens, the first of them from ``rows[-1]``, until the answer ends."""
    while True:
        token = int(rows[-1].argmax())
        choices.append(token)
        if len(choices) >= max_tokens or llama.is_end(token):
            return
        if one_line and "\n" in _text(llama, choices).lstrip():
            return
        rows.append(llama.eval_logits([token])[-1])


def _text(llama: Llama, choices: list[int]) -> str:
    ended = bool(choices) and llama.is_end(choices[-1])
    raw: bytes = llama.detokenize(choices[:-1] if ended else choices)
    return raw.decode("utf-8", errors="replace")
