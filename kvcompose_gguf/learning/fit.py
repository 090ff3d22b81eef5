"""Fits a surrogate: reads and repeats passages, and regresses the repeat's attention to each token on cached data."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from .. import __version__
from ..errors import ConfigError
from ..kernels import aggregate
from ..kernels.types import FloatArray
from ..load import load_model
from ..measurements.calibration import journal_file
from ..measurements.surrogate import EPS, VERSION, Surrogate, save_surrogate
from ..methods.kvcompose import KVCompose
from ..models.hashes import model_sha256
from ..models.resolve import resolve_model
from ..native.vocab_only import n_ctx_trained, open_vocabulary
from ..scoring.evidence import Evidence
from ..support.checks import check_positive
from .passages import MIN_TOKENS, Passage, passage
from .quality import compare, quality_tables, summary
from .sums import RIDGE, Sums

if TYPE_CHECKING:
    from ..llama import Llama

#: one passage in this many is held out for validation
HOLD_OUT = 5


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Options of a fit.

    Attributes:
        n_passages: number of passages; every fifth is for validation.
        longest: length of the longest passages in tokens; others have a half or a quarter of it.
        files: the user's texts; every second passage comes from them.
        scoring_chunk: chunk of the repeat that supplies the target attention, as ``KVCompose.scoring_chunk``. The whole
            repeat, as in the paper, scores slightly better than chunks, and predicting it costs the same.
    Raises:
        ConfigError: an option is out of range.
    """

    n_passages: int = 40
    longest: int = 2048
    files: tuple[str, ...] = ()
    scoring_chunk: int | None = None

    def __post_init__(self) -> None:
        for name in ("n_passages", "longest", "scoring_chunk"):
            check_positive(name, getattr(self, name))
        if self.n_passages < HOLD_OUT:
            raise ConfigError(f"n_passages={self.n_passages}, at least {HOLD_OUT} are needed: one is for validation")
        if self.longest < MIN_TOKENS:
            raise ConfigError(f"longest={self.longest}, at least {MIN_TOKENS} tokens are needed")

    @property
    def fitted(self) -> list[int]:
        """Returns the numbers of the passages to fit to."""
        return [number for number in range(self.n_passages) if number % HOLD_OUT != HOLD_OUT - 1]

    @property
    def held_out(self) -> list[int]:
        """Returns the numbers of the passages for validation."""
        return [number for number in range(self.n_passages) if number % HOLD_OUT == HOLD_OUT - 1]


def fit_surrogate(model: str, options: FitOptions, threads: int | None = None) -> Path:
    """Fits a surrogate to a model, prints its quality, and returns the file in which ``KVCompose`` finds it.

    After an interruption, a call with the same options continues after the last saved passage.

    Raises:
        ConfigError: the model does not exist, its context is shorter than the passages, or a text cannot be used.
    """
    model_path = resolve_model(model)
    _check_length(model_path, options)
    settings = _settings(options)
    sha256 = model_sha256(model_path)
    journal = journal_file(sha256, settings, "sums.npz")
    sums = Sums.read(journal)
    sums.write(journal)  # fail now, not after the work, if the folder is not writable

    method = KVCompose(compression_ratio=0.0, scoring="repeat", scoring_chunk=options.scoring_chunk)
    n_repeated = min(options.longest, options.scoring_chunk or options.longest)
    n_ctx = -(-(options.longest + n_repeated + 1) // 256) * 256
    reader = _Reader(load_model(model_path, n_ctx, fast_attention=True, threads=threads), method, options)
    console = Console(stderr=True)
    with (
        contextlib.closing(reader.llama),
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        bar = progress.add_task("passages", total=options.n_passages, completed=sums.n_passages)
        for number in options.fitted[sums.n_passages :]:
            _, evidence, repeated = reader.read(number)
            sums.add(evidence, repeated)
            sums.write(journal)
            progress.advance(bar)
        fitted = Surrogate(model_path.name, sha256, sums.solve(), settings)
        results = []
        for number in options.held_out:
            text, evidence, repeated = reader.read(number)
            results.append({"kind": text.kind, **compare(fitted.predict(evidence), repeated, evidence)})
            progress.advance(bar)
    fitted = replace(fitted, quality=summary(results))
    file = save_surrogate(fitted)
    with contextlib.suppress(OSError):
        journal.unlink()
    console = Console()
    for table in quality_tables(fitted.quality):
        console.print(table)
    console.print(str(file), soft_wrap=True)
    return file


def _check_length(model_path: Path, options: FitOptions) -> None:
    with open_vocabulary(model_path) as vocabulary:
        n_ctx_train = n_ctx_trained(vocabulary)
    if n_ctx_train and options.longest > n_ctx_train:
        raise ConfigError(f"passages of {options.longest} tokens are longer than {model_path} can read, {n_ctx_train}")


def _settings(options: FitOptions) -> dict[str, Any]:
    """Returns what decides the result, for the file and the journal's name."""
    constants = {"features": VERSION, "eps": EPS, "ridge": RIDGE, "package": __version__}
    return {**asdict(options), "files": [_digest(Path(name)) for name in options.files], **constants}


@dataclass(frozen=True)
class _Reader:
    """Reads passages with the model."""

    llama: Llama
    method: KVCompose
    options: FitOptions

    def read(self, number: int) -> tuple[Passage, Evidence, list[FloatArray]]:
        """Returns a passage, its cached data, and its repeat's attention, for each layer float32 ``(n_head_kv, N)``."""
        text = passage(self.llama, number, self.options.longest, [Path(name) for name in self.options.files])
        self.llama.reset()
        evidence = self.llama.observe(text.tokens, self.method)
        repeated = [
            aggregate.aggregate_group(attention, layer.n_head_kv, self.method.agg_group)
            for attention, layer in zip(evidence.attention, evidence.layers, strict=True)
        ]
        return text, evidence, repeated


def _digest(file: Path) -> str:
    try:
        return f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
