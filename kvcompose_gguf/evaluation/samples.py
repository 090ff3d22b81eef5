"""One question about a long context, and what counts as its answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The prompt is ``context + question + answer_prefix``; ``context`` is compressed before the question is known.

    A pure function of task, n_tokens, index, seed, source of text and tokenizer.

    Attributes:
        task: its name, e.g. ``niah_single_2``.
        index: number within the task.
        context: what is read and compressed.
        question: what is asked after it; begins right behind the context, newlines included.
        answer_prefix: beginning of the answer that the model is given, may be empty.
        references: parts of the right answer, or alternatives if ``metric`` is ``string_match_part``.
        max_tokens: longest answer, RULER's ``tokens_to_generate``.
        metric: ``string_match_all`` or ``string_match_part``.
        depth: where the first needle that is asked for begins, share of the haystack before it in [0, 1]; None where
            there is no needle.
        n_tokens: tokens of the prompt, without the answer.
    """

    task: str
    index: int
    context: str
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    max_tokens: int
    metric: str
    depth: float | None = None
    n_tokens: int

    @property
    def prompt(self) -> str:
        """All that the model reads."""
        return self.context + self.question + self.answer_prefix
