"""A conversation as the text that a model continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from ..errors import ConfigError
from ..native.chat_library import ChatTemplate, Rendered


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        question: what the user asked.
        answer: what the model said, as it said it; empty: it has not answered yet.
        context: text of the documents that were read just before the question; empty: there were none.
    """

    question: str
    answer: str = ""
    context: str = ""


class Format(Protocol):
    """A way to write a conversation."""

    @property
    def name(self) -> str:
        """``"template"`` or ``"plain"``, for saved sessions."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer, beside the model's own end tokens."""

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """The text of all turns, up to where the answer of the last one begins."""


class PlainFormat:
    """Questions and answers as plain text, for models without a chat template.

    Args:
        system: instructions before everything else; empty: none.
    """

    name = "plain"
    stops = ("\nQuestion:",)

    def __init__(self, system: str = "") -> None:
        self._system = system

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """See ``Format.render``."""
        parts = [self._system] if self._system else []
        for turn in turns:
            parts += [turn.context] if turn.context else []
            parts += [f"Question: {turn.question}\nAnswer:{turn.answer}"]
        return Rendered(prompt="\n\n".join(parts))


class TemplateFormat:
    """The chat template of a model.

    Args:
        template: writes the messages.
        system: the system message; empty: the template's own, or none.
        began: what the template takes for the present time, so that a conversation reads the same on every day.
    """

    name = "template"
    stops: tuple[str, ...] = ()

    def __init__(self, template: ChatTemplate, system: str, began: datetime) -> None:
        self._template, self._system = template, system
        self._time = {"now": int(began.timestamp()), "chat_template_kwargs": {
            "datetime": began.strftime("%b %d %Y"), "date_string": began.strftime("%d %b %Y"),
        }}  # fmt: skip

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """See ``Format.render``.

        Raises:
            ConfigError: the template refuses the messages.
        """
        messages = [{"role": "system", "content": self._system}] if self._system else []
        for turn in turns[:-1]:
            messages += [_question(turn), {"role": "assistant", "content": turn.answer}]
        messages += [_question(turn) for turn in turns[-1:]]
        try:
            return self._template.render(messages, reasoning_format="auto", **self._time)
        except ConfigError as error:
            raise ConfigError(f"the model's chat template refuses this conversation: {error}") from error


def _question(turn: Turn) -> dict[str, str]:
    content = f"{turn.context}\n\n{turn.question}" if turn.context else turn.question
    return {"role": "user", "content": content}


def make_format(llm: Any, system: str, began: datetime) -> Format:
    """The format of a model's chat template, or the plain one if its file has no template."""
    source = llm.metadata.get("tokenizer.chat_template")
    if not source:
        return PlainFormat(system)
    bos, eos = (
        llm.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""
        for token in (llm.token_bos(), llm.token_eos())
    )
    return TemplateFormat(ChatTemplate(source, bos, eos, llm.adds_bos), system, began)


#
# turns as messages: JSON values of a saved session
#


def to_messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """The turns as chat messages; a question has its documents' text as ``context``."""
    out: list[dict[str, str]] = []
    for turn in turns:
        context = {"context": turn.context} if turn.context else {}
        out += [{"role": "user", "content": turn.question, **context}, {"role": "assistant", "content": turn.answer}]
    return out


def from_messages(messages: Sequence[dict[str, str]]) -> list[Turn]:
    """The turns that ``to_messages`` was given."""
    pairs = zip(messages[::2], messages[1::2], strict=True)
    return [Turn(user["content"], model["content"], user.get("context", "")) for user, model in pairs]
