"""GGUF files from the Hugging Face hub, in the hub's own cache and with its token.

A model is written USER/REPO or USER/REPO:QUANT, as llama.cpp's ``-hf`` takes it.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ConfigError, DownloadError

#: what a model's name begins with where names, paths and repositories are allowed
PREFIX = "hf://"
DEFAULT_QUANT = "Q4_K_M"

_SPEC = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?", re.ASCII)
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.ASCII)
_QUANT = re.compile(r"(?<![A-Za-z0-9])(?:UD-)?(?:I?Q\d|TQ\d|MXFP\d|BF16|F16|F32)(?:_[A-Z0-9]+)*(?![A-Za-z0-9])", re.I)


@dataclass(frozen=True)
class HubModel:
    """A repository, and which of its files is meant; ``quant=None``: Q4_K_M, or else the first one."""

    repo: str
    quant: str | None = None


def parse_spec(spec: str) -> HubModel:
    """The model that a text such as ``"USER/REPO:Q8_0"`` means.

    Raises:
        ConfigError: the text has another form.
    """
    match = _SPEC.fullmatch(spec.removeprefix(PREFIX))
    if match is None:
        raise ConfigError(f"hf_repo={spec!r} is not USER/REPO or USER/REPO:QUANT, e.g. unsloth/Qwen3-0.6B-GGUF:Q8_0")
    # llama.cpp takes ":latest" for no quant
    return HubModel(match[1], None if (match[2] or "latest").lower() == "latest" else match[2])


def fetch_hub(spec: str) -> Path:
    """The path of a model in the hub's cache, downloaded if it is not there yet; of a split model the first part.

    Without a connection, or with ``HF_HUB_OFFLINE=1``, a copy in the cache is used.

    Args:
        spec: ``USER/REPO`` or ``USER/REPO:QUANT``.
    Raises:
        ConfigError: ``spec`` has another form, or the repository has no GGUF file of this quantization.
        DownloadError: there is no such repository, it cannot be read, or it cannot be reached and is not in the cache.
    """
    model = parse_spec(spec)
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    from requests.exceptions import ConnectionError, Timeout

    if constants.HF_HUB_OFFLINE:
        return _cached(model, "HF_HUB_OFFLINE is set")
    with _explained(model.repo), _quiet_without_terminal():
        try:
            files = [sibling.rfilename for sibling in HfApi().model_info(model.repo).siblings or []]
            chosen = choose_files(model, files)
            folder = snapshot_download(model.repo, allow_patterns=[glob.escape(file) for file in chosen])
        except (OfflineModeIsEnabled, ConnectionError, Timeout, LocalEntryNotFoundError):
            return _cached(model, f"{constants.ENDPOINT} cannot be reached")
        path = Path(folder) / chosen[0]
        # the hub's client falls back to what the cache has when the connection ends between two requests
        if not all((Path(folder) / file).is_file() for file in chosen):
            raise DownloadError(f"hf_repo={model.repo!r}: the download of {chosen[0]} did not finish, try again")
        return path


def choose_files(model: HubModel, files: Sequence[str]) -> list[str]:
    """The file of a model, or all parts of it in order.

    Args:
        files: paths in the repository.
    Raises:
        ConfigError: none of them is a GGUF file of this quantization.
        DownloadError: a part is missing.
    """
    models = sorted(file for file in files if file.endswith(".gguf") and "mmproj" not in PurePosixPath(file).name)
    if not models:
        raise ConfigError(f"hf_repo={model.repo!r} has no .gguf model: look for a repository of GGUF files")
    found = [file for file in models if _is_quant(file, model.quant or DEFAULT_QUANT)]
    if not found and model.quant is not None:
        raise ConfigError(
            f"hf_repo={model.repo!r} has no file of quantization {model.quant!r}, it has {', '.join(_quants(models))}"
        )
    return _with_parts(model, (found or models)[0], models)


def _is_quant(file: str, quant: str) -> bool:
    """Whether a path names a quantization as a whole word: Q4_K is not in Q4_K_M, and Q4_XS not in IQ4_XS."""
    pattern = rf"(?<![A-Za-z0-9]){re.escape(quant)}(?![A-Za-z0-9_])"
    return re.search(pattern, file.removesuffix(".gguf"), re.IGNORECASE) is not None


def _quants(models: Sequence[str]) -> list[str]:
    """What each file can be asked for by, its own name where that is not known."""
    found = []
    for file in models:
        names = _QUANT.findall(PurePosixPath(file).name.removesuffix(".gguf"))
        found.append(names[-1] if names else file)
    return list(dict.fromkeys(found))


def _with_parts(model: HubModel, file: str, models: Sequence[str]) -> list[str]:
    match = _SHARD.fullmatch(file)
    if match is None:
        return [file]
    parts = [f"{match[1]}-{i:05}-of-{match[3]}.gguf" for i in range(1, int(match[3]) + 1)]
    missing = [part for part in parts if part not in models]
    if missing:
        raise DownloadError(f"hf_repo={model.repo!r} lacks {missing[0]}, one of {len(parts)} parts of a model")
    return parts


def _cached(model: HubModel, reason: str) -> Path:
    """The model in the cache.

    Args:
        reason: why it is not downloaded, for the error.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    advice = "connect to the network and try again"
    if "HF_HUB_OFFLINE" in reason:
        advice = "unset HF_HUB_OFFLINE to download it"
    try:
        folder = Path(snapshot_download(model.repo, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise DownloadError(f"hf_repo={model.repo!r} is not in the cache, and {reason}: {advice}") from error
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*.gguf") if file.is_file()]
    try:
        return folder / choose_files(model, files)[0]
    except (ConfigError, DownloadError) as error:
        raise DownloadError(f"{error} in the cache, and {reason}: {advice}") from error


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turns the client's exceptions into sentences; the order matters, some classes derive from others."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise DownloadError(
            f"hf_repo={repo!r} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"hf_repo={repo!r} does not exist at {constants.ENDPOINT}, or it is private: check the name, and for a "
            "private one log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except HfHubHTTPError as error:
        raise DownloadError(f"hf_repo={repo!r} cannot be read: {_answer_of(error)}") from error
    except HFValidationError as error:
        raise ConfigError(f"hf_repo={repo!r} is not a name of a repository: {error}") from error
    except OSError as error:
        raise DownloadError(f"hf_repo={repo!r} cannot be downloaded: {error}") from error


def _answer_of(error: Any) -> str:
    """What the server said, in words."""
    status = error.response.status_code if error.response is not None else None
    if status in (401, 403):
        return f"the hub refused the token (HTTP {status}): log in again with `hf auth login`, or change HF_TOKEN"
    if status == 429:
        return "the hub limits requests (HTTP 429): wait some minutes, or log in with `hf auth login`"
    return f"{error}" if status is None else f"the hub answered HTTP {status}: try again later"


@contextlib.contextmanager
def _quiet_without_terminal() -> Iterator[None]:
    """Without the client's progress bars where standard error is not a terminal."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled() or "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
