"""The ``kvcompose calibrate`` command."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

from typer import Option

from . import options as shared


class Only(str, Enum):
    """The methods that `calibrate` can be limited to."""

    SURROGATE = "surrogate"
    COMPRESSKV = "compresskv"


def calibrate(
    model: shared.Model = None,
    hf_repo: shared.HfRepo = None,
    needles: Annotated[int, Option(help="Number of facts to hide in texts and to ask for.")] = 3,
    lengths: Annotated[int, Option(help="Number of prompt lengths between --shortest and --longest.")] = 4,
    depths: Annotated[int, Option(help="Number of places in a prompt where a fact is hidden.")] = 5,
    shortest: Annotated[int, Option(help="Length of the shortest prompt in tokens.")] = 300,
    longest: Annotated[int, Option(help="Length of the longest prompt in tokens.")] = 1200,
    errors: Annotated[int, Option(help="Number of prompts to measure eviction errors with.")] = 12,
    data_free: Annotated[
        bool, Option("--data-free", help="Use random tokens instead of facts in prose. Off by default.")
    ] = False,
    random_tokens: Annotated[
        int, Option(help="With --data-free: number of random tokens, which are repeated four times.")
    ] = 256,
    passages: Annotated[int, Option(help="Number of texts to fit the surrogate to.")] = 40,
    passage_tokens: Annotated[int, Option(help="Length of the longest of these texts in tokens.")] = 2048,
    text: Annotated[
        list[Path] | None,
        Option(help="Take half of these texts from this file. Repeat the option for several. By default none."),
    ] = None,
    only: Annotated[Only | None, Option(help="Measure for this method only. By default for both.")] = None,
    threads: shared.Threads = None,
) -> None:
    """Measure once per model what the methods `kvcompose` and `compresskv` need to know about it.

    For `kvcompose,scoring=surrogate` this fits a predictor of attention; for `compresskv` it finds retrieval heads and
    eviction errors. A calibration that was interrupted goes on where it stopped.
    """
    name = shared.model_name(model, hf_repo)
    if only != Only.COMPRESSKV:
        from ..learning.fit import FitOptions, fit_surrogate

        files = tuple(str(file) for file in text or [])
        fit_surrogate(name, FitOptions(n_passages=passages, longest=passage_tokens, files=files), threads)
    if only != Only.SURROGATE:
        from ..learning.calibrate import calibrate
        from ..learning.trials import CalibrateOptions

        n_random = random_tokens if data_free else 0
        calibrate(name, CalibrateOptions(needles, lengths, depths, shortest, longest, errors, n_random), threads)
