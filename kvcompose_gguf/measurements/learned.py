"""What was learnt of a model from its own prompts: a regression for every layer, and the file that keeps it.

The file has statistics of cached keys and values, and no text.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from ..errors import ConfigError
from ..kernels.threads import map_layers
from ..kernels.types import FloatArray
from ..plan.geometry import LayerGeometry
from ..scoring.evidence import Evidence
from ..support.files import cache_dir, write_file
from ..support.ranks import rank_correlation
from .features import N_THREADS, features, n_features, predict_layer, target_of
from .regression import RANK, Regression

VERSION = 1  # version of features and file

#: largest number of a prompt's tokens that teach: it limits the memory, and one prompt's share
MOST_TOKENS = 1024

#: older tokens count less beyond this number, so that the weights follow what the model is used for
MEMORY = 20_000

#: agreement from which on what was learnt is of use
POOR = 0.1

#: number of agreements that are remembered
N_AGREEMENTS = 3


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

    def taught(self, evidence: Evidence, attention: Sequence[FloatArray]) -> Learned:
        """Returns what is known after one more prompt; ``MOST_TOKENS`` of those in ``evidence.repeated`` teach.

        Args:
            attention: what these tokens paid to the context, for each layer float32 ``(n_head_kv, N)``.
        """
        before = self if self.fits(evidence.layers) else Learned()
        keep = min(1.0, MEMORY / max(1.0, before.n_tokens))
        places = evidence.repeated
        if len(places) > MOST_TOKENS:
            places = places[np.linspace(0, len(places) - 1, MOST_TOKENS).astype(int)]

        def teach(l: int) -> tuple[Regression, float]:
            table = np.concatenate([*features(evidence, l, places)], axis=1)
            layer = before.layers[l] if before.layers else Regression.empty(table)
            rows, target = layer.standardized(table), target_of(attention[l][:, places])
            agreement = rank_correlation((rows @ layer.weights[:, :, None])[:, :, 0], target).mean()
            return layer.moved(rows, target, before.n_tokens, keep), float(agreement)

        layers, agreements = zip(*map_layers(teach, len(evidence.layers), N_THREADS), strict=True)
        if before.layers and np.mean(agreements) < POOR:
            return Learned().taught(evidence, attention)  # it was learnt from another model of this name
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
    file = file_of(family)
    if not may_learn() or not file.exists():
        return Learned()
    try:
        return load_learned(file)
    except ConfigError as error:
        warnings.warn(f"{file} {error}: the model is learnt anew", stacklevel=2)
        return Learned()


def keep_learned(family: str, teach: Callable[[Learned], Learned]) -> Learned:
    """Replaces what is known of a family of models by ``teach`` of it, and returns that.

    Processes take turns, so that none undoes what another has learnt. A damaged file is set aside.

    Raises:
        ConfigError: the folder cannot be written, the disk is full, or another process takes too long.
    """
    file = file_of(family)
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
        raise ConfigError(f"what this prompt taught is not kept in {file}: {error}") from error


def update_learned(family: str, teach: Callable[[Learned], Learned]) -> Learned:
    """Same as ``keep_learned``, but only warns if nothing can be kept; keeps nothing if learning is off."""
    if not may_learn():
        return teach(Learned())
    try:
        return keep_learned(family, teach)
    except ConfigError as error:
        warnings.warn(str(error), stacklevel=2)
        return teach(read_learned(family))


def file_of(family: str) -> Path:
    """Returns the file of what was learnt of a family of models."""
    return learned_dir() / f"{family}.npz"
