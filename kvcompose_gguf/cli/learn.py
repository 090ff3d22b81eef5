"""The ``kvcompose learn`` command, and its old name."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..errors import ConfigError
from . import options as shared


class For(str, Enum):
    """The methods that learn."""

    KVCOMPOSE = "kvcompose"
    COMPRESSKV = "compresskv"


def learn(
    model: shared.Model = None,
    files: Annotated[
        list[Path] | None,
        Argument(help="Files of text. Half of the texts to learn from come from them. By default none."),
    ] = None,
    hf_repo: shared.HfRepo = None,
    for_: Annotated[For, Option("--for", help="The method that learns.")] = For.KVCOMPOSE,
    passages: Annotated[int, Option(help="For kvcompose: number of texts to read.")] = 15,
    passage_tokens: Annotated[
        int, Option(help="For kvcompose: length of the longest of these texts in tokens.")
    ] = 2048,
    needles: Annotated[int, Option(help="For compresskv: number of facts to hide in texts and to ask for.")] = 3,
    lengths: Annotated[
        int, Option(help="For compresskv: number of prompt lengths between --shortest and --longest.")
    ] = 4,
    depths: Annotated[int, Option(help="For compresskv: number of places in a prompt where a fact is hidden.")] = 5,
    shortest: Annotated[int, Option(help="For compresskv: length of the shortest prompt in tokens.")] = 300,
    longest: Annotated[int, Option(help="For compresskv: length of the longest prompt in tokens.")] = 1200,
    errors: Annotated[int, Option(help="For compresskv: number of prompts to measure eviction errors with.")] = 12,
    data_free: Annotated[
        bool, Option("--data-free", help="For compresskv: use random tokens instead of facts in prose. Off by default.")
    ] = False,
    random_tokens: Annotated[
        int, Option(help="For compresskv, with --data-free: number of random tokens, which are repeated four times.")
    ] = 256,
    threads: shared.Threads = None,
) -> None:
    """Learn a model now, instead of from its first prompts, and measure how good the prediction is.

    For `kvcompose`, which learns from ordinary prompts as well, this reads texts of several kinds. It prints how well
    the prediction agrees with a whole repeat on texts that taught nothing. For `compresskv` it finds retrieval heads
    and eviction errors, which this method needs; an interrupted run goes on where it stopped.
    """
    name, texts = shared.model_and_files(model, [str(file) for file in files or []], hf_repo)
    if for_ == For.KVCOMPOSE:
        from ..learning.learn import LearnOptions
        from ..learning.learn import learn as run

        run(name, LearnOptions(n_passages=passages, longest=passage_tokens, files=tuple(texts)), threads)
        return
    if texts:
        raise ConfigError(f"{texts[0]}: --for compresskv reads no files")
    from ..learning.calibrate import calibrate
    from ..learning.trials import CalibrateOptions

    n_random = random_tokens if data_free else 0
    calibrate(name, CalibrateOptions(needles, lengths, depths, shortest, longest, errors, n_random), threads)


def calibrate() -> None:
    """Old name of `learn`."""
    raise ConfigError("`kvcompose calibrate` is now `kvcompose learn MODEL`; for CompressKV add --for compresskv")
