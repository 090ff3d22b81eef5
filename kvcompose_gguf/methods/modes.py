"""The values of KVCompose's option ``scoring``: which tokens look at the context, and which options they allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..scoring.requests import Prefill, Prompts, Queries, Window

if TYPE_CHECKING:
    from .kvcompose import KVCompose


@dataclass(frozen=True)
class Mode:
    """One value of the option ``scoring``.

    Attributes:
        takes: the options that only some values of ``scoring`` allow, of those that this one allows.
        queries: returns the tokens whose attention it collects; None: it collects no attention.
    """

    takes: tuple[str, ...]
    queries: Callable[[KVCompose], Queries | None]


_REPEATED = ("scoring_fraction", "instruction")

#: the values of the option ``scoring``
MODES = {
    "auto": Mode(_REPEATED, lambda method: method.repeat()),  # until ``for_model`` decides
    "learned": Mode((), lambda method: method.check()),
    "repeat": Mode(_REPEATED, lambda method: method.repeat()),
    "prompts": Mode(("prompts",), lambda method: Prompts(tuple(method.prompts), method.scoring_chunk)),
    "window": Mode((), lambda method: Window(method.window)),
    "prefill": Mode((), lambda method: Prefill()),
}
