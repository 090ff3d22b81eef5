"""Stores a model's calibration: its retrieval heads, and the error that eviction causes in each layer."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..errors import ConfigError
from ..models.hashes import model_sha256
from ..support.files import cache_dir, write_file

VERSION = 1  # version of the file format


@dataclass(frozen=True)
class Calibration:
    """Measurements of one model file, for CompressKV. Layers are the compressed ones, as in the session.

    Attributes:
        model_name: name of the file, for display.
        model_sha256: hash of the file.
        heads: semantic retrieval score of each layer and query head, not negative.
        errors: eviction error of each layer, not negative, with sum 1.
        settings: how it was measured.
        version: version of the file format.
    Raises:
        ConfigError: the version differs, or a value is invalid.
    """

    model_name: str
    model_sha256: str
    heads: tuple[tuple[float, ...], ...]
    errors: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ConfigError(f"version={self.version!r} of a calibration, {VERSION} is needed: measure it again")
        for name in ("model_name", "model_sha256"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}={getattr(self, name)!r} of a calibration is not a text")
        if not isinstance(self.settings, dict):
            raise ConfigError(f"settings={self.settings!r} of a calibration are not a table")
        if not _are_lists([self.heads, self.errors]) or not _are_lists(self.heads):
            raise ConfigError("heads of a calibration must be a list of lists, errors a list of numbers")
        if not self.heads or not all(self.heads) or len(self.errors) != len(self.heads):
            raise ConfigError(f"a calibration has heads of {len(self.heads)} layers and {len(self.errors)} errors")
        object.__setattr__(self, "heads", tuple(tuple(map(_checked, scores)) for scores in self.heads))
        object.__setattr__(self, "errors", tuple(map(_checked, self.errors)))
        if abs(sum(self.errors) - 1) > 1e-3:
            raise ConfigError(f"errors of a calibration have the sum {sum(self.errors)}, not 1")

    def to_json(self) -> str:
        """Returns the document that ``from_json`` reads."""
        # one line per layer
        fields = {name: json.dumps(value) for name, value in asdict(self).items()}
        fields["heads"] = "[\n    " + ",\n    ".join(json.dumps(scores) for scores in self.heads) + "\n  ]"
        return "{\n" + ",\n".join(f'  "{name}": {text}' for name, text in fields.items()) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Returns the calibration in a document.

        Raises:
            ConfigError: the text is not JSON, has other fields, or holds invalid values.
        """
        try:
            return cls(**json.loads(text))
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise ConfigError(f"not a calibration: {error}") from error


def load_calibration(model_path: Path) -> Calibration:
    """Returns the calibration of a model file: the user's own, or else the one in the package.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    calibration = find_measured(model_path, ".json", lambda data: Calibration.from_json(data.decode()))
    if calibration is None:
        command = f"kvcompose learn {model_path} --for compresskv"
        raise ConfigError(f"{model_path} has no calibration yet; make one with: {command}")
    return calibration


class Measured(Protocol):
    """Measurements of one model file."""

    @property
    def model_name(self) -> str: ...

    @property
    def model_sha256(self) -> str: ...


T = TypeVar("T", bound=Measured)


def find_measured(model_path: Path, ending: str, read: Callable[[bytes], T]) -> T | None:
    """Returns the measurements of a model file, from the user's folder or else the package; None if there are none.

    Files are named by the model's hash and ``ending``.

    Raises:
        ConfigError: the file is damaged.
    """
    sha256 = model_sha256(model_path)
    for folder in (calibrations_dir(), shipped_dir()):
        file = folder / f"{sha256}{ending}"
        if not file.is_file():
            continue
        try:
            measured = read(file.read_bytes())
        except (OSError, ConfigError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: {error}") from error
        if measured.model_sha256 != sha256:
            raise ConfigError(f"{file} was measured on another model, {measured.model_name}")
        return measured
    return None


def save_calibration(calibration: Calibration) -> Path:
    """Saves a calibration in the user's cache, where ``load_calibration`` finds it; returns the file."""
    file = calibrations_dir() / f"{calibration.model_sha256}.json"
    write_file(file, calibration.to_json())
    return file


def calibrations_dir() -> Path:
    """Returns the folder of the user's calibrations."""
    return cache_dir() / "calibrations"


def shipped_dir() -> Path:
    """Returns the folder of the calibrations that come with the package."""
    return Path(__file__).parents[1] / "data" / "calibrations"


def journal_file(sha256: str, settings: Mapping[str, Any], ending: str) -> Path:
    """Returns the file in which a measurement of a model saves what it has so far; other settings have another file."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return calibrations_dir() / f"{sha256}.{digest}.{ending}"


def _are_lists(values: Any) -> bool:
    return all(isinstance(value, (list, tuple)) for value in values)


def _checked(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{value!r} in a calibration is not a number of at least 0")
    return float(value)
