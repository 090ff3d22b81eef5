"""The regression of a surrogate: sums over tokens, whose size does not depend on the text, and their solution."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..kernels.threads import map_layers
from ..kernels.types import FloatArray
from ..measurements.surrogate import features, target_of
from ..scoring.evidence import Evidence
from ..support.files import replaced

Float64Array = npt.NDArray[np.float64]

#: ridge penalty per token, for features with variance 1
RIDGE = 1e-3


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
            lists = {name: [arrays[f"{name}{l}"] for l in range(n_layer)] for name in cls.LISTS}
            sums.n_passages, sums.n_tokens = n_passages, n_tokens
            sums.shifts, sums.scales, sums.grams, sums.moments = (lists[name] for name in lists)
        return sums
