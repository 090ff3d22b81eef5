"""Fetches, verifies, unpacks and patches the pinned llama.cpp source. Shared by build_native.py and patches.py."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import platformdirs

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "patches"
CACHE = Path(platformdirs.user_cache_dir("kvcompose-gguf"))

# git must write patches in the same way everywhere, whatever the user's configuration
GIT = [
    "git", "-c", "user.name=kvcompose-gguf", "-c", "user.email=kvcompose-gguf@localhost", "-c", "commit.gpgsign=false",
    "-c", "core.autocrlf=false", "-c", "init.defaultBranch=main", "-c", "format.useAutoBase=false",
]  # fmt: skip


class BuildError(SystemExit):
    """Ends the script with a sentence that says what to do."""


@dataclass(frozen=True)
class Pin:
    """The contents of patches/LLAMA_CPP_VERSION."""

    bindings: str
    archive: str
    sha256: str
    commit: str


def read_pin() -> Pin:
    return Pin(**tomllib.loads((PATCHES / "LLAMA_CPP_VERSION").read_text()))


def patch_files() -> list[Path]:
    return sorted(PATCHES.glob("*.patch"))


#: folders of patches/src, and the pattern of their files in llama.cpp: every file that matches is our own
OWN_SOURCES = {"llama": "src/llama-kvc*", "ggml-cpu": "ggml/src/ggml-cpu/ggml-cpu-kvc*", "common": "common/kvc-chat*"}


def own_sources() -> list[Path]:
    return sorted(PATCHES.glob("src/*/*"))


def place_of(source: Path) -> Path:
    """Returns the path of one of our own files, relative to llama.cpp's root."""
    return Path(OWN_SOURCES[source.parent.name]).parent / source.name


def run(command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    """Runs ``command``; if it fails, ends the script with the last lines of its output."""
    result = subprocess.run(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if result.returncode:
        tail = "\n".join(result.stdout.splitlines()[-25:])
        raise BuildError(f"{tail}\n\nfailed with exit code {result.returncode}: {' '.join(map(str, command))}")


def archive_path(pin: Pin) -> Path:
    """Returns the source archive in the user's cache; downloads it once through pip, and checks its hash every time."""
    path = CACHE / "sources" / pin.archive
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            # pip asks an archive for its metadata; LLAMA_BUILD=OFF keeps this from compiling
            env = os.environ | {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}
            run(
                [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python",
                 "-d", folder, f"llama-cpp-python=={pin.bindings}"],
                env=env,
            )  # fmt: skip
            os.replace(Path(folder) / pin.archive, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != pin.sha256:
        path.unlink()
        raise BuildError(f"{pin.archive} has sha256 {digest}, not {pin.sha256}; the file was removed: try again")
    return path


def unpack(pin: Pin, folder: Path) -> tuple[Path, Path]:
    """Unpacks into ``folder``; returns the folders of llama.cpp and of the bindings' package."""
    with tarfile.open(archive_path(pin)) as archive:
        if sys.version_info >= (3, 12):
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder)
    top = folder / pin.archive.removesuffix(".tar.gz")
    return top / "vendor" / "llama.cpp", top / "llama_cpp"


def patched_tree(pin: Pin, folder: Path, n_patches: int | None = None) -> Path:
    """Makes ``folder`` a git repository of llama.cpp; returns its tree: commit ``pristine``, then one commit per patch.

    `git apply` inside another repository changes nothing and exits 0; `git am` in a separate repository avoids this.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
        llama, _ = unpack(pin, Path(unpacked))
        (llama / ".git").unlink(missing_ok=True)  # a submodule's pointer
        shutil.move(llama, folder)
    run([*GIT, "init", "-q"], cwd=folder)
    run([*GIT, "add", "-A", "-f"], cwd=folder)
    run([*GIT, "commit", "-q", "-m", "pristine"], cwd=folder)
    run([*GIT, "tag", "pristine"], cwd=folder)
    files = patch_files()[:n_patches]
    if files:
        run([*GIT, "am", "-q", "--keep-non-patch", "--committer-date-is-author-date", *map(str, files)], cwd=folder)
        for source in own_sources():
            shutil.copy(source, folder / place_of(source))
    return folder


def export_sources(tree: Path) -> None:
    """Makes ``patches/src`` the set of our own files in ``tree``; a file that is a symlink is already in place."""
    for source in own_sources():
        if not (tree / place_of(source)).exists():
            source.unlink()
    for folder, pattern in OWN_SOURCES.items():
        for path in tree.glob(pattern):
            if not path.is_symlink():
                shutil.copy(path, PATCHES / "src" / folder / path.name)


def export_patches(tree: Path, folder: Path) -> list[Path]:
    """Writes the commits of ``tree`` after ``pristine`` as patch files into ``folder``."""
    options = ["--zero-commit", "--no-signature", "--no-numbered", "--full-index", "--keep-subject"]
    run([*GIT, "format-patch", "-q", *options, "-o", str(folder), "pristine..HEAD"], cwd=tree)
    return sorted(folder.glob("*.patch"))
