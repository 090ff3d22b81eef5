"""The demo's document, and the questions about it."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass


def document() -> str:
    """Returns the demo's text: a made-up report in English, about 2,600 SmolLM2 tokens."""
    return importlib.resources.files("kvcompose_gguf").joinpath("data/observatory.md").read_text("utf-8").strip()


@dataclass(frozen=True)
class Question:
    """The beginning of a sentence, and the words that a right continuation must contain.

    These are sentences to finish, not questions: a model of 135M parameters copies well and reasons badly.
    """

    prompt: str
    expected: str

    def is_answered_by(self, answer: str) -> bool:
        """Returns whether ``answer`` contains the expected words, ignoring case."""
        return self.expected.lower() in answer.lower()


#: in the document's order; chosen so that the model answers most of them from a full cache
QUESTIONS = (
    Question("The supply boat is called the", "Marigold"),
    Question("The observatory was founded in the year", "1887"),
    Question("The first keeper of the observatory was", "Agnes Thorvald"),
    Question("The lens was ground in the city of", "Utrecht"),
    Question("The radio call sign of the station is", "Yellow Lantern"),
    Question("The dog on the island is called", "Biscuit"),
    Question("The library holds exactly", "3,412"),
    Question("The comet found by Jonas Reed was named", "Reed's Feather"),
    Question("The plates of the sky survey are stored in the", "salt cellar"),
    Question("The copper sheets of the dome were renewed by a firm from", "Lisbon"),
)
