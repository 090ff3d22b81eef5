"""Questions about documents, as values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question, its right answers, and document numbers: the documents it needs, and related ones as distractors."""

    text: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    near: tuple[int, ...]


@dataclass(frozen=True)
class Questions:
    """Questions, and the documents that they are about."""

    documents: tuple[str, ...]
    items: tuple[Question, ...]
