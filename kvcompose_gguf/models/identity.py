"""Checks that a saved cache fits the model, its settings and this version of the library."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, StateError

#: number and bytes of the evenly spread parts of a model file that are hashed; other weights differ in every part
N_PARTS, PART_BYTES = 256, 4096


@dataclass(frozen=True)
class Identity:
    """The model, settings and versions that cached keys and values depend on.

    Attributes:
        model_name: name of the model's file, for people.
        model_id: the result of ``model_id(path)``.
        settings: context options that change the stored data, by their names in ``Llama(...)``.
        versions: versions of the programs that write and read a state.
    """

    model_name: str
    model_id: str
    settings: dict[str, Any]
    versions: dict[str, str]

    @property
    def key(self) -> str:
        """Returns a short hash of everything that a saved cache must match, for names of folders."""
        what = [self.model_id, sorted(self.settings.items(), key=str), self.versions.get("llama.cpp")]
        return hashlib.sha256(repr(what).encode()).hexdigest()[:32]

    def check_loads(self, saved: Identity, what: str) -> None:
        """Raises StateError with the first difference, unless a context of this identity can continue from ``saved``.

        Args:
            what: name of the saved cache, for the message.
        """
        if saved.model_id != self.model_id:
            raise StateError(
                f"{what} was made with the model {saved.model_name} ({saved.model_id[:8]}), "
                f"this one is {self.model_name} ({self.model_id[:8]}): load it with its own model"
            )
        for name in sorted(saved.settings.keys() | self.settings.keys()):
            theirs, ours = saved.settings.get(name), self.settings.get(name)
            if theirs != ours:
                raise StateError(f"{what} was made with {name}={theirs}, this context has {name}={ours}: use the same")
        if saved.versions.get("llama.cpp") != self.versions.get("llama.cpp"):
            raise StateError(f"{what} was written by {_programs(saved)}, this is {_programs(self)}: make a new one")


def _programs(identity: Identity) -> str:
    versions = identity.versions
    return f"llama.cpp {versions.get('llama.cpp')} in kvcompose-gguf {versions.get('kvcompose-gguf')}"


def model_id(model_path: Path) -> str:
    """Returns a hash of a model file's size and of evenly spread parts of it; takes milliseconds for any size.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        with model_path.open("rb") as file:
            n_bytes = file.seek(0, 2)
            digest = hashlib.sha256(n_bytes.to_bytes(8, "little"))
            for i in range(N_PARTS):
                file.seek(max(0, n_bytes - PART_BYTES) * i // (N_PARTS - 1))
                digest.update(file.read(PART_BYTES))
    except OSError as error:
        raise ConfigError(f"{model_path} cannot be read: {error}") from error
    return digest.hexdigest()[:32]
