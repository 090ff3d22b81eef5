"""One question about a long context, with its right answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A sample with the prompt ``context + question + answer_prefix``; only ``context`` is compressed.

    The context is compressed before the question is known.

    A sample is a pure function of task, n_tokens, index, seed, text source and tokenizer.

    Attributes:
        task: name of the task, e.g. ``niah_single_2``.
        index: number within the task.
        context: the text that is read and compressed.
        question: the text that follows the context directly, including leading newlines.
        answer_prefix: beginning of the answer, given to the model; may be empty.
        references: parts of the right answer, or alternatives if ``metric`` is ``string_match_part``.
        max_tokens: longest answer, RULER's ``tokens_to_generate``.
        metric: ``string_match_all`` or ``string_match_part``.
        depth: depth of the first needle in the question: the share of the haystack before it, in [0, 1]. None without
            needles.
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
        """Returns the whole text that the model reads."""
        return self.context + self.question + self.answer_prefix

    @property
    def any_of(self) -> bool:
        """Returns whether the references are alternatives."""
        return self.metric == "string_match_part"
