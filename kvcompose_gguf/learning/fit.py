"""Fits a surrogate: reads and repeats passages, and regresses the repeat's attention to each token on cached data."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from .. import __version__
from ..errors import ConfigError
from ..kernels import aggregate
from ..kernels.types import FloatArray
from ..load import load_model, n_ctx_trained, open_vocabulary, resolve_model
from ..measurements.calibration import calibrations_dir, model_sha256
from ..measurements.surrogate import EPS, VERSION, Surrogate, features, save_surrogate, target_of
from ..methods.base import map_layers
from ..methods.kvcompose import KVCompose
from ..scoring.evidence import Evidence
from ..support.checks import check_positive
from ..support.files import replaced
from .passages import MIN_TOKENS, Passage, passage
from .quality import compare, quality_tables, summary

if TYPE_CHECKING:
    from ..llama import Llama

Float64Array = npt.NDArray[np.float64]

#: one passage in this many is held out for validation
HOLD_OUT = 5
#: ridge penalty per token, for features with variance 1
RIDGE = 1e-3


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
    with open_vocabulary(model_path) as vocabulary:
        n_ctx_train = n_ctx_trained(vocabulary)
    if n_ctx_train and options.longest > n_ctx_train:
        raise ConfigError(f"passages of {options.longest} tokens are longer than {model_path} can read, {n_ctx_train}")
    constants = {"features": VERSION, "eps": EPS, "ridge": RIDGE, "package": __version__}
    settings = {**asdict(options), "files": [_digest(Path(name)) for name in options.files], **constants}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    sha256 = model_sha256(model_path)
    journal = calibrations_dir() / f"{sha256}.{digest}.sums.npz"
    sums = Sums.read(journal)
    sums.write(journal)  # fail now, not after the work, if the folder is not writable

    method = KVCompose(compression_ratio=0.0, scoring="repeat", scoring_chunk=options.scoring_chunk)
    n_repeated = min(options.longest, options.scoring_chunk or options.longest)
    n_ctx = -(-(options.longest + n_repeated + 1) // 256) * 256
    reader = _Reader(load_model(model_path, n_ctx, method, threads=threads), method, options)
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


#
# regression
#


class Sums:
    """Sufficient statistics of a ridge regression for every layer and KV head; the size does not depend on the text.

    Features are shifted and scaled by their mean and deviation in the first passage, so that their products keep their
    precision. The last feature is the constant.
    """

    LISTS = ("shifts", "scales", "grams", "moments")

    def __init__(self) -> None:
        self.n_passages = 0
        self.n_tokens = 0
        self.shifts: list[FloatArray] = []  # (n_head_kv, n_features), and so are the scales
        self.scales: list[FloatArray] = []
        self.grams: list[Float64Array] = []  # (n_head_kv, n_features, n_features)
        self.moments: list[Float64Array] = []  # (n_head_kv, n_features)

    def add(self, evidence: Evidence, repeated: Sequence[FloatArray]) -> None:
        """Adds a passage's tokens and its repeat's attention to them, for each layer float32 ``(n_head_kv, N)``."""
        layers = range(len(evidence.layers))
        tables = [np.concatenate([*features(evidence, l)], axis=1) for l in layers] if not self.shifts else None
        if tables is not None:
            for table in tables:
                # the mean and deviation of a constant are not exact; the intercept covers it
                shift, constant = table.mean(axis=1, dtype=np.float64).astype(np.float32), np.ptp(table, axis=1) == 0
                shift[:, -1] = 0
                self.shifts.append(shift)
                self.scales.append(np.where(constant, 1, table.std(axis=1)).astype(np.float32))
                self.grams.append(np.zeros((*shift.shape, shift.shape[1])))
                self.moments.append(np.zeros(shift.shape))

        def add(l: int) -> None:
            targets = target_of(repeated[l])
            first = 0
            for part in features(evidence, l):
                part = (part - self.shifts[l][:, None]) / self.scales[l][:, None]
                target = targets[:, first : first + part.shape[1]]
                self.grams[l] += part.transpose(0, 2, 1) @ part
                self.moments[l] += (part.transpose(0, 2, 1) @ target[:, :, None])[:, :, 0]
                first += part.shape[1]

        map_layers(add, len(evidence.layers))
        self.n_tokens += evidence.n_tokens
        self.n_passages += 1

    def solve(self) -> tuple[FloatArray, ...]:
        """Returns for each layer the weights of unscaled features, float32 ``(n_head_kv, n_features)``."""
        return tuple(map_layers(self._solve, len(self.grams)))

    def _solve(self, l: int) -> FloatArray:
        means = self.grams[l][:, :, -1] / self.n_tokens
        variances = np.einsum("hff->hf", self.grams[l]) / self.n_tokens - means**2
        penalty = RIDGE * self.n_tokens * np.maximum(variances, 1e-6)
        penalty[:, -1] = 0
        regular = self.grams[l] + penalty[:, :, None] * np.eye(penalty.shape[1])
        weights = np.linalg.solve(regular, self.moments[l][:, :, None])[:, :, 0] / self.scales[l]
        weights[:, -1] -= (weights * self.shifts[l]).sum(axis=1)
        return weights.astype(np.float32)

    def write(self, file: Path) -> None:
        """Saves the sums; raises ConfigError if the folder, which the result needs too, is not writable."""
        arrays = {f"{name}{l}": array for name in self.LISTS for l, array in enumerate(getattr(self, name))}
        try:
            with replaced(file) as unfinished:
                np.savez(unfinished, counts=[self.n_passages, self.n_tokens, len(self.grams)], **arrays)
        except OSError as error:
            raise ConfigError(f"cannot write to {file.parent}, the folder of the calibrations: {error}") from error

    @classmethod
    def read(cls, file: Path) -> Sums:
        """Returns the sums saved in ``file``, or empty ones."""
        sums = cls()
        damaged = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
        with contextlib.suppress(*damaged), np.load(file, allow_pickle=False) as arrays:
            n_passages, n_tokens, n_layer = map(int, arrays["counts"])
            lists = {
                name: [arrays[f"{name}{l}"] for l in range(n_layer)]
                for name in ("shifts", "scales", "grams", "moments")
            }
            sums.n_passages, sums.n_tokens = n_passages, n_tokens
            sums.shifts, sums.scales, sums.grams, sums.moments = (lists[name] for name in lists)
        return sums
