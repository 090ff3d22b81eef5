"""Implements ``kvcompose learn``: teaches a model's prediction with texts, and measures how good it is."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

from ..errors import ConfigError
from ..load import load_model
from ..measurements.learned import Learned, file_of, keep_learned, may_learn, read_learned
from ..methods.kvcompose import KVCompose
from ..models.resolve import resolve_model
from ..native.vocab_only import n_ctx_trained, open_vocabulary
from ..scoring.evidence import Evidence
from ..support.checks import check_positive
from .passages import MIN_TOKENS, passage, read_text
from .quality import compare, quality_tables, summary

if TYPE_CHECKING:
    from ..llama import Llama

#: one text in this many is held out: it measures the quality, and teaches nothing
HOLD_OUT = 5

#: reads a text and repeats it; its scores are the attention of the repeat
LESSON = KVCompose(
    compression_ratio=0.0, scoring="repeat", in_place=True, add_mean_across_heads=False, learn=False
)  # fmt: skip

#: the same as in the paper, in twice as many cells
WHOLE = replace(LESSON, scoring_chunk=None, in_place=False)


@dataclass(frozen=True, kw_only=True)
class LearnOptions:
    """Options of ``kvcompose learn``.

    Attributes:
        n_passages: number of texts; every fifth is held out.
        longest: length of the longest texts in tokens; others have a half or a quarter of it.
        files: the user's texts; every second text comes from them.
    Raises:
        ConfigError: an option is out of range.
    """

    n_passages: int = 15
    longest: int = 2048
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("n_passages", "longest"):
            check_positive(name, getattr(self, name))
        if self.n_passages < HOLD_OUT:
            raise ConfigError(f"n_passages={self.n_passages}, at least {HOLD_OUT} are needed: one is for validation")
        if self.longest < MIN_TOKENS:
            raise ConfigError(f"longest={self.longest}, at least {MIN_TOKENS} tokens are needed")

    @property
    def taught(self) -> list[int]:
        """Returns the numbers of the texts that teach."""
        return [number for number in range(self.n_passages) if number % HOLD_OUT != HOLD_OUT - 1]

    @property
    def held_out(self) -> list[int]:
        """Returns the numbers of the texts that measure the quality."""
        return [number for number in range(self.n_passages) if number % HOLD_OUT == HOLD_OUT - 1]


def learn(model: str, options: LearnOptions, threads: int | None = None) -> Path:
    """Teaches a model's prediction, prints its quality on texts that were held out, and returns its file.

    Every text is kept at once, as an ordinary prompt is. So an interruption loses nothing.

    Raises:
        ConfigError: the model does not exist, its context is shorter than the texts, a text cannot be used, or what it
            taught cannot be kept.
    """
    if not may_learn():
        raise ConfigError("the environment's KVCOMPOSE_LEARN=off forbids to learn")
    model_path = resolve_model(model)
    _check_length(model_path, options)
    for name in options.files:
        read_text(Path(name))
    lesson = LESSON.for_model(model_path)
    family = lesson.predictor.family
    n_ctx = -(-(2 * options.longest + 1) // 256) * 256
    console, results = Console(stderr=True), []
    with (
        contextlib.closing(load_model(model_path, n_ctx, fast_attention=True, threads=threads)) as llama,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        bar = progress.add_task("texts", total=options.n_passages)
        for number in options.taught:
            _, evidence = _observed(llama, number, options, lesson)
            keep_learned(family, partial(_taught, evidence))
            progress.advance(bar)
        known = read_learned(family)
        for number in options.held_out:
            kind, evidence = _observed(llama, number, options, WHOLE)
            results.append({"kind": kind, **compare(known.predict(evidence), WHOLE.scores(evidence), evidence)})
            progress.advance(bar)
    console = Console()
    for table in quality_tables(summary(results)):
        console.print(table)
    file = file_of(family)
    console.print(str(file), soft_wrap=True)
    return file


def _check_length(model_path: Path, options: LearnOptions) -> None:
    with open_vocabulary(model_path) as vocabulary:
        n_ctx_train = n_ctx_trained(vocabulary)
    if n_ctx_train and options.longest > n_ctx_train:
        raise ConfigError(f"texts of {options.longest} tokens are longer than {model_path} can read, {n_ctx_train}")


def _observed(llama: Llama, number: int, options: LearnOptions, method: KVCompose) -> tuple[str, Evidence]:
    """Returns the kind of a text, and what the method sees of it."""
    text = passage(llama, number, options.longest, [Path(name) for name in options.files])
    llama.reset()
    return text.kind, llama.observe(text.tokens, method)


def _taught(evidence: Evidence, known: Learned) -> Learned:
    return known.taught(evidence, LESSON.scores(evidence))
