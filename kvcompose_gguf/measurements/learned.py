"""What was learnt of a model from its own prompts: a ridge regression that every repeated piece of text moves.

The regression is that of ``measurements.surrogate``: log(attention of the repeat) of a token, from its cached key and
value. Keeping its sums exactly would take the square of the number of features for every KV head, 200 MB for a model of
8B parameters. So it keeps the weights, and how sure it is of them: the precision of the weights as a diagonal and
``RANK`` directions, 8 MB for such a model. The file has statistics of cached keys and values, and no text.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..kernels.threads import map_layers
from ..kernels.types import FloatArray
from ..plan.geometry import LayerGeometry
from ..scoring.evidence import Evidence, Positions
from ..support.files import cache_dir, write_file
from ..support.ranks import rank_correlation
from .surrogate import N_THREADS, features, n_features, predict_layer, target_of

Float64Array = npt.NDArray[np.float64]

VERSION = 1  # version of features and file

#: number of directions in which the precision is kept
RANK = 16

#: smallest scale: features that hardly differ in the first prompt may do so in later ones, e.g. places near the end
MIN_SCALE = np.float32(1e-3)

#: ridge penalty per token, for features with variance 1
RIDGE = 1e-2

#: older tokens count less beyond this number, so that the weights follow what the model is used for
MEMORY = 20_000

#: agreement from which on what was learnt is of use
POOR = 0.1

#: number of agreements that are remembered
N_AGREEMENTS = 3

#: steps of the power iteration that finds the directions; it begins with those of the prompt before
N_POWER = 3


@dataclass(frozen=True, eq=False)
class Regression:
    """The regression of one layer. Features are standardized by ``mean`` and ``scale``, those of the first prompt.

    Attributes:
        mean, scale: float32 ``(n_head_kv, n_features)``; 0 and 1 for the constant, which is the last feature.
        weights: of standardized features, float32 ``(n_head_kv, n_features)``.
        diagonal, factors: precision of the weights, ``diag(diagonal) + factors @ factors.T``; float32
            ``(n_head_kv, n_features)`` and float16 ``(n_head_kv, n_features, RANK)``.
    """

    mean: FloatArray
    scale: FloatArray
    weights: FloatArray
    diagonal: FloatArray
    factors: npt.NDArray[np.float16]

    @classmethod
    def empty(cls, table: FloatArray) -> Regression:
        """Returns a regression that knows nothing, standardized for features ``(n_head_kv, n, n_features)``."""
        mean, scale = table.mean(axis=1, dtype=np.float64).astype(np.float32), table.std(axis=1)
        mean[:, -1], scale[:, -1] = 0, 1
        scale = np.maximum(scale, MIN_SCALE)
        nothing = np.zeros_like(mean)
        return cls(mean, scale, nothing, nothing, np.zeros((*mean.shape, RANK), np.float16))

    @property
    def plain_weights(self) -> FloatArray:
        """Returns the weights of features that are not standardized."""
        weights = self.weights / self.scale
        weights[:, -1] -= (weights * self.mean).sum(axis=1)
        return weights

    def standardized(self, table: FloatArray) -> FloatArray:
        """Returns features ``(n_head_kv, n, n_features)`` with the mean and scale of the first prompt."""
        out: FloatArray = (table - self.mean[:, None]) / self.scale[:, None]
        return out

    def moved(self, rows: FloatArray, target: FloatArray, n_before: float, keep: float) -> Regression:
        """Returns the regression after more tokens.

        Args:
            rows: standardized features ``(n_head_kv, n, n_features)``.
            target: ``(n_head_kv, n)``.
            n_before: number of tokens learnt before.
            keep: how much these count now, at most 1.
        """
        n_features = rows.shape[2]
        factors = self.factors.astype(np.float64)
        diagonal = np.einsum("hf,fg->hfg", self.diagonal.astype(np.float64), np.eye(n_features))
        old = keep * (diagonal + factors @ factors.transpose(0, 2, 1))
        precision = old + (rows.transpose(0, 2, 1) @ rows).astype(np.float64)
        penalty = np.full(n_features, RIDGE * (keep * n_before + rows.shape[1]))
        penalty[-1] = 1e-6  # the constant is free
        wanted = old @ self.weights[:, :, None] + (rows.transpose(0, 2, 1) @ target[:, :, None]).astype(np.float64)
        weights = np.linalg.solve(precision + np.diag(penalty), wanted)[:, :, 0]
        factors = _largest(precision, factors)
        rest = np.maximum(np.einsum("hff->hf", precision) - np.square(factors).sum(axis=2), 0)
        return replace(
            self, weights=weights.astype(np.float32), diagonal=rest.astype(np.float32),
            factors=factors.astype(np.float16),
        )  # fmt: skip


def _largest(matrices: Float64Array, start: Float64Array) -> Float64Array:
    """Returns the ``RANK`` largest components of symmetric ``(n, f, f)``, as ``(n, f, RANK)`` times its transpose."""
    n_features, rank = matrices.shape[1], min(RANK, matrices.shape[1])
    basis = start[:, :, :rank] + np.random.default_rng(0).standard_normal((n_features, rank))
    for _ in range(N_POWER):
        basis = np.linalg.qr(matrices @ basis).Q
    values, vectors = np.linalg.eigh(basis.transpose(0, 2, 1) @ matrices @ basis)
    out = np.zeros((len(matrices), n_features, RANK))
    out[:, :, :rank] = basis @ (vectors * np.sqrt(np.maximum(values, 0))[:, None])
    return out


@dataclass(frozen=True, eq=False)
class Learned:
    """What was learnt of a model.

    Attributes:
        n_prompts: number of prompts that taught it.
        n_tokens: number of their tokens, as far as they still count.
        agreements: how well the prediction agreed with what was seen on the latest prompts: Spearman's correlation over
            the tokens that were repeated, mean over KV heads and layers.
        layers: the regressions.
    """

    n_prompts: int = 0
    n_tokens: float = 0.0
    agreements: tuple[float, ...] = ()
    layers: tuple[Regression, ...] = ()

    def fits(self, layers: Sequence[LayerGeometry]) -> bool:
        """Returns whether a model with these cached layers can be predicted."""
        needed = [(layer.n_head_kv, n_features(layer)) for layer in layers]
        return [layer.weights.shape for layer in self.layers] == needed

    def predict(self, evidence: Evidence) -> list[FloatArray]:
        """Returns each token's predicted attention: for each layer float32 ``(n_head_kv, N)``, in [0, 1]."""
        weights = [layer.plain_weights for layer in self.layers]
        return map_layers(lambda l: predict_layer(weights[l], evidence, l), len(weights), N_THREADS)

    def taught(self, evidence: Evidence, places: Positions, attention: Sequence[FloatArray]) -> Learned:
        """Returns what is known after one more prompt.

        Args:
            places: the tokens that were evaluated again, int32 ``(n,)``.
            attention: what these paid to the context, for each layer float32 ``(n_head_kv, N)``.
        """
        before = self if self.fits(evidence.layers) else Learned()
        keep = min(1.0, MEMORY / max(1.0, before.n_tokens))

        def teach(l: int) -> tuple[Regression, float]:
            table = np.concatenate([*features(evidence, l, places)], axis=1)
            layer = before.layers[l] if before.layers else Regression.empty(table)
            rows, target = layer.standardized(table), target_of(attention[l][:, places])
            agreement = rank_correlation((rows @ layer.weights[:, :, None])[:, :, 0], target).mean()
            return layer.moved(rows, target, before.n_tokens, keep), float(agreement)

        layers, agreements = zip(*map_layers(teach, len(evidence.layers), N_THREADS), strict=True)
        if before.layers and np.mean(agreements) < POOR:
            return Learned().taught(evidence, places, attention)  # it was learnt from another model of this name
        new = (round(float(np.mean(agreements)), 4),) if before.layers else ()
        n_tokens = keep * before.n_tokens + len(places)
        return Learned(before.n_prompts + 1, n_tokens, (*before.agreements, *new)[-N_AGREEMENTS:], layers)

    def to_bytes(self) -> bytes:
        """Returns the contents of the file that ``from_bytes`` reads: an .npz without pickles."""
        about = {"version": VERSION, "n_prompts": self.n_prompts, "n_tokens": self.n_tokens}
        arrays = {f"{name}{l}": array for l, layer in enumerate(self.layers) for name, array in vars(layer).items()}
        stream = io.BytesIO()
        text = json.dumps(about | {"agreements": self.agreements, "n_layer": len(self.layers)})
        np.savez(stream, about=np.array(text), **arrays)  # type: ignore[arg-type]
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Learned:
        """Returns what is stored in a file's contents.

        Raises:
            ConfigError: the contents are damaged, or of another version.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"]))
                if about["version"] != VERSION:
                    raise ConfigError(f"version {about['version']!r}, this is {VERSION}")
                layers = tuple(_regression(arrays, l) for l in range(int(about["n_layer"])))
            agreements = tuple(float(value) for value in about["agreements"])
            return cls(int(about["n_prompts"]), float(about["n_tokens"]), agreements, layers)
        except ConfigError:
            raise
        except Exception as error:  # zipfile, numpy and json raise many classes
            raise ConfigError(f"cannot be read: {error}") from error


def _regression(arrays: Any, l: int) -> Regression:
    layer = Regression(*(arrays[f"{name}{l}"] for name in ("mean", "scale", "weights", "diagonal", "factors")))
    shapes = {layer.mean.shape, layer.scale.shape, layer.weights.shape, layer.diagonal.shape, layer.factors.shape[:2]}
    if len(shapes) != 1 or layer.factors.shape[2:] != (RANK,):
        raise ConfigError(f"the arrays of layer {l} do not fit together")
    if not all(np.isfinite(array).all() for array in vars(layer).values()) or not (layer.scale > 0).all():
        raise ConfigError(f"layer {l} has numbers that are not finite")
    return layer


#
# files
#

#: seconds to wait for another process that is learning from a prompt of the same model
PATIENCE = 30.0


def learned_dir() -> Path:
    """Returns the folder of what was learnt of the user's models."""
    return cache_dir() / "learned"


def learned_files() -> list[Path]:
    """Returns the files of what was learnt, by name."""
    return sorted(learned_dir().glob("*.npz"))


def may_learn() -> bool:
    """Returns whether what is learnt is kept and used: the environment's ``KVCOMPOSE_LEARN=off`` forbids it."""
    return os.environ.get("KVCOMPOSE_LEARN", "").lower() not in ("off", "0", "no", "false")


def load_learned(file: Path) -> Learned:
    """Returns what a file of ``learned_files`` has.

    Raises:
        ConfigError: the file cannot be read, is damaged, or is of another version.
    """
    try:
        return Learned.from_bytes(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot be read: {error}") from error


def read_learned(family: str) -> Learned:
    """Returns what is known of a family of models (``native.family.family_of``); nothing if its file is damaged."""
    file = _file_of(family)
    if not may_learn() or not file.exists():
        return Learned()
    try:
        return load_learned(file)
    except ConfigError as error:
        warnings.warn(f"{file} {error}: the model is learnt anew", stacklevel=2)
        return Learned()


def update_learned(family: str, teach: Callable[[Learned], Learned]) -> Learned:
    """Replaces what is known of a family of models by ``teach`` of it, and returns that.

    Processes take turns, so that none undoes what another has learnt. A damaged file is set aside. Nothing is kept if
    the folder cannot be written, or the disk is full.
    """
    if not may_learn():
        return teach(Learned())
    file = _file_of(family)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(file.with_suffix(".lock"), timeout=PATIENCE):
            known = read_learned(family)
            if not known.n_prompts and file.exists():
                os.replace(file, file.with_suffix(".damaged"))
            new = teach(known)
            write_file(file, new.to_bytes())
            return new
    except (OSError, filelock.Timeout) as error:
        warnings.warn(f"what this prompt taught is not kept in {file}: {error}", stacklevel=2)
        return teach(read_learned(family))


def _file_of(family: str) -> Path:
    return learned_dir() / f"{family}.npz"
