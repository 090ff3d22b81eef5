"""Asks a full and a compressed cache the same questions about a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from rich.console import Console

from ...load import load_model
from ...methods.kvcompose import KVCompose
from ...plan.report import KVReport
from ...support.timing import timed
from .questions import QUESTIONS, Question, document

if TYPE_CHECKING:
    from ...llama import Llama

N_CTX = 4096
N_ANSWER = 12  # the fact comes first; after it a model of this size begins to repeat itself


@dataclass(frozen=True)
class Answers:
    """One round of all questions.

    Attributes:
        texts: the model's answers, in the order of the questions.
        seconds: wall time of all answers, without reading the document.
        n_bytes_kv: bytes allocated for the KV cache at the end.
        n_bytes_rss: memory of the process at the end.
    """

    texts: tuple[str, ...]
    seconds: float
    n_bytes_kv: int
    n_bytes_rss: int

    def right(self, questions: Sequence[Question]) -> list[bool]:
        """Returns for each of the ``questions`` whether its answer is right."""
        return [question.is_answered_by(text) for question, text in zip(questions, self.texts, strict=True)]


@dataclass(frozen=True, eq=False)
class DemoResult:
    """The answers from a full and a compressed cache; ``prefill_seconds`` is the time to read the document once."""

    questions: tuple[Question, ...]
    prefill_seconds: float
    full: Answers
    compressed: Answers
    report: KVReport


def run_demo(
    model_path: Path,
    method: KVCompose,
    *,
    questions: Sequence[Question] = QUESTIONS,
    text: str | None = None,
    threads: int | None = None,
    console: Console | None = None,
) -> DemoResult:
    """Asks ``questions`` about ``text``, greedily, before and after compressing its cache.

    Args:
        text: None: the demo's own document.
        console: shows progress, if it is a terminal; None: shows nothing.
    """
    console = console or Console(quiet=True)
    text = document() if text is None else text
    with console.status("loading the model") as status:
        llm = load_model(model_path, N_CTX, method, threads=threads)
        try:
            status.update("reading the document")
            llm.kv_compressor = None
            _, prefill_seconds = _timed_completion(llm, text, 1)
            full = _ask(llm, text, questions, lambda n: status.update(f"full cache: {n}"))
            status.update("compressing the cache")
            llm.kv_compressor = method
            report = llm.compress(text)
            compressed = _ask(llm, text, questions, lambda n: status.update(f"compressed cache: {n}"))
        finally:
            llm.close()
    return DemoResult(tuple(questions), prefill_seconds, full, compressed, report)


def _ask(llm: Llama, text: str, questions: Sequence[Question], show: Callable[[str], None]) -> Answers:
    """Asks all ``questions`` about ``text``, which is in the cache already; calls ``show`` before each of them."""
    answers, seconds = [], 0.0
    for i, question in enumerate(questions):
        show(f"question {i + 1} of {len(questions)}")
        answer, elapsed = _timed_completion(llm, f"{text}\n\n{question.prompt}", N_ANSWER)
        answers.append(answer.strip())
        seconds += elapsed
    return Answers(tuple(answers), seconds, llm.kv_bytes, psutil.Process().memory_info().rss)


def _timed_completion(llm: Llama, prompt: str, max_tokens: int) -> tuple[str, float]:
    """The greedy continuation of ``prompt`` up to the end of the line, and its seconds."""
    output, seconds = timed(lambda: llm.create_completion(prompt, max_tokens=max_tokens, temperature=0, stop=["\n"]))
    return output["choices"][0]["text"], seconds
