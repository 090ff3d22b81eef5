"""Finds the file of a model by its path, its name or its repository."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from . import hub, known


def resolve_model(model: str) -> Path:
    """Returns the path of a model; downloads a model that is not on this machine.

    Args:
        model: path of a .gguf file, a name that ``known.fetch`` knows, or ``hf://USER/REPO[:QUANT]``.
    Raises:
        ConfigError: there is no such file or name.
        DownloadError: the model could not be downloaded.
    """
    if model.startswith(hub.PREFIX):
        return hub.fetch_hub(model)
    if Path(model).is_file():
        return Path(model)
    if model in known.names():
        return known.fetch(model)
    raise ConfigError(
        f"model={model!r} is neither a file nor one of {', '.join(known.names())}: "
        "check the path, or load it from the Hugging Face hub with -hf USER/REPO"
    )
