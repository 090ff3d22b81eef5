"""What was measured once about a model: which heads retrieve, and what every layer loses by eviction."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import platformdirs

from . import models
from .errors import ConfigError
from .files import write_file

VERSION = 1  # of the file format


@dataclass(frozen=True)
class Calibration:
    """Measurements of one model file, for CompressKV. Layers are the compressed ones, those of the session.

    Attributes:
        model_name: of the file, for humans.
        model_sha256: of the file.
        heads: semantic retrieval score for each layer and query head, not negative.
        errors: eviction error of each layer, not negative, with sum 1.
        settings: how it was measured.
        version: of the file format.
    Raises:
        ConfigError: another version, or values that are not these.
    """

    model_name: str
    model_sha256: str
    heads: tuple[tuple[float, ...], ...]
    errors: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ConfigError(f"version={self.version!r} of a calibration, {VERSION} is needed: calibrate again")
        for name in ("model_name", "model_sha256"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}={getattr(self, name)!r} of a calibration is not a text")
        if not isinstance(self.settings, dict):
            raise ConfigError(f"settings={self.settings!r} of a calibration are not a table")
        if not _are_lists([self.heads, self.errors]) or not _are_lists(self.heads):
            raise ConfigError("heads and errors of a calibration are not lists, of a list a layer and of numbers")
        if not self.heads or not all(self.heads) or len(self.errors) != len(self.heads):
            raise ConfigError(f"a calibration has heads of {len(self.heads)} layers and {len(self.errors)} errors")
        object.__setattr__(self, "heads", tuple(tuple(map(_checked, scores)) for scores in self.heads))
        object.__setattr__(self, "errors", tuple(map(_checked, self.errors)))
        if abs(sum(self.errors) - 1) > 1e-3:
            raise ConfigError(f"errors of a calibration have the sum {sum(self.errors)}, not 1")

    def to_json(self) -> str:
        """The document that ``from_json`` reads."""
        # a line a layer
        fields = {name: json.dumps(value) for name, value in asdict(self).items()}
        fields["heads"] = "[\n    " + ",\n    ".join(json.dumps(scores) for scores in self.heads) + "\n  ]"
        return "{\n" + ",\n".join(f'  "{name}": {text}' for name, text in fields.items()) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """The calibration of a document.

        Raises:
            ConfigError: not JSON, other fields, or values that are not a calibration's.
        """
        try:
            return cls(**json.loads(text))
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise ConfigError(f"not a calibration: {error}") from error


def load_calibration(model_path: Path) -> Calibration:
    """The calibration of a model file: the user's own, or else the one that the package has.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    calibration = find_measured(model_path, ".json", lambda data: Calibration.from_json(data.decode()))
    if calibration is None:
        raise ConfigError(f"{model_path} has no calibration yet, make one: kvcompose calibrate {model_path}")
    return calibration


class Measured(Protocol):
    """What was measured of one model file."""

    @property
    def model_name(self) -> str: ...

    @property
    def model_sha256(self) -> str: ...


T = TypeVar("T", bound=Measured)


def find_measured(model_path: Path, ending: str, read: Callable[[bytes], T]) -> T | None:
    """What was measured of a model file, kept as its hash and ``ending``: the user's own, or else the package's.

    Raises:
        ConfigError: it is damaged.
    """
    sha256 = model_sha256(model_path)
    for folder in (calibrations_dir(), Path(__file__).parent / "data" / "calibrations"):
        file = folder / f"{sha256}{ending}"
        if not file.is_file():
            continue
        try:
            measured = read(file.read_bytes())
        except (OSError, ConfigError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: {error}") from error
        if measured.model_sha256 != sha256:
            raise ConfigError(f"{file} was measured of another model, {measured.model_name}")
        return measured
    return None


def save_calibration(calibration: Calibration) -> Path:
    """Keep a calibration in the user's cache, where ``load_calibration`` finds it; returns the file."""
    file = calibrations_dir() / f"{calibration.model_sha256}.json"
    write_file(file, calibration.to_json())
    return file


def calibrations_dir() -> Path:
    """The folder of the user's calibrations."""
    return Path(platformdirs.user_cache_dir("kvcompose-gguf")) / "calibrations"


def model_sha256(model_path: Path) -> str:
    """sha256 of a file; it is read again only if its path, size or time of change is another one.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        status = model_path.stat()
        key = f"{model_path.resolve()} {status.st_size} {status.st_mtime_ns}"
        memory = calibrations_dir() / "sha256.json"
        known: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):
            known = dict(json.loads(memory.read_text("utf-8")))
        if key not in known:
            known[key] = models.sha256(model_path)
            with contextlib.suppress(OSError):  # a folder that cannot be written: hashed again the next time
                write_file(memory, json.dumps(known, indent=1))
        return known[key]
    except OSError as error:
        raise ConfigError(f"{model_path} cannot be read: {error}") from error


def _are_lists(values: Any) -> bool:
    return all(isinstance(value, (list, tuple)) for value in values)


def _checked(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{value!r} in a calibration is not a number from 0 on")
    return float(value)
