"""Checks that the demo's document and questions fit together, and that it asks in the right order; needs no model."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcompose_gguf import KVCompose, KVReport
from kvcompose_gguf.cli.demo import comparison
from kvcompose_gguf.cli.demo.comparison import Answers
from kvcompose_gguf.cli.demo.questions import QUESTIONS, Question, document


def test_the_document_is_a_few_thousand_tokens_long() -> None:
    # SmolLM2 makes 1.2 tokens per word here: 2,300 to 3,200 tokens
    assert 1_900 < len(document().split()) < 2_600


def test_no_sentence_of_the_document_is_repeated() -> None:
    sentences = [s.strip() for s in re.split(r"[.!?\n]+", document()) if s.strip()]
    assert len(sentences) == len(set(sentences))


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q.expected)
def test_every_answer_occurs_exactly_once(question: Question) -> None:
    assert document().lower().count(question.expected.lower()) == 1


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q.expected)
def test_an_answer_stands_in_a_sentence_about_its_question(question: Question) -> None:
    text = document()
    at = text.index(question.expected)
    sentence = text[max(text.rfind(". ", 0, at), text.rfind("\n", 0, at)) + 1 : at].lower()
    words = set(question.prompt.lower().split()) - {"the", "in", "of", "on", "by", "is", "was", "were", "are", "a"}
    assert sum(word in sentence for word in words) >= 2, (sentence, words)


def test_the_answers_are_spread_over_the_document() -> None:
    at = [document().index(question.expected) / len(document()) for question in QUESTIONS]
    assert at == sorted(at)
    assert at[0] < 0.2
    assert at[-1] > 0.7
    assert max(b - a for a, b in itertools.pairwise(at)) < 0.25


def test_no_question_gives_its_answer_away() -> None:
    assert not any(question.is_answered_by(other.prompt) for question in QUESTIONS for other in QUESTIONS)


def test_answers_are_judged_by_the_expected_words() -> None:
    questions = [Question("It is called", "Marigold"), Question("It holds", "3,412")]
    answers = Answers(("the MARIGOLD, and", "3412 books"), 0.0, 0, 0)
    assert answers.right(questions) == [True, False]


class FakeLlama:
    """A fake model that knows one answer, and forgets it when its cache is compressed."""

    def __init__(self, template: bool = False) -> None:
        self.kv_compressor: KVCompose | None = KVCompose(compression_ratio=0.5)
        self.kv_report: KVReport | None = None
        self.metadata = {"tokenizer.chat_template": "…"} if template else {}
        self.prompts: list[Any] = []
        self.closed = False

    @property
    def kv_bytes(self) -> int:
        return 1000 if self.kv_report is None else 100

    def compress(self, text: str) -> KVReport:
        assert self.kv_compressor is not None
        self.kv_report = KVReport(10, np.array([5]), 1000, 500, 1000, 100, 0, 0, 0, 0, 10, 10)
        return self.kv_report

    def create_completion(self, prompt: str, **options: Any) -> Any:
        # with a compressor the first completion would compress, and no full cache would be left to compare with
        assert (self.kv_compressor is None) == (self.kv_report is None)
        assert options["temperature"] == 0
        self.prompts.append(prompt)
        return {"choices": [{"text": " 42." if self.kv_report is None else " unknown."}]}

    def create_chat_completion(self, messages: list[Any], **options: Any) -> Any:
        self.prompts.append(messages)
        return {"choices": [{"message": {"content": " in chat "}}]}

    def close(self) -> None:
        self.closed = True


def test_the_full_cache_is_asked_before_it_is_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLlama()
    monkeypatch.setattr(comparison, "load_model", lambda *args, **kwargs: llm)
    questions = [Question("The answer is", "42")]
    result = comparison.run_demo(Path("m.gguf"), KVCompose(compression_ratio=0.5), questions=questions, text="Text.")
    assert result.full.right(questions) == [True]
    assert result.compressed.right(questions) == [False]
    assert (result.full.n_bytes_kv, result.compressed.n_bytes_kv) == (1000, 100)
    assert llm.prompts == ["Text.", "Text.\n\nThe answer is", "Text.\n\nThe answer is"]
    assert llm.closed
