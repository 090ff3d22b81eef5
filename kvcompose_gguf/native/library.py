"""Finds the patched llama.cpp and loads it under the unmodified llama-cpp-python bindings."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from ..errors import LibraryError
from . import devices, log

PACKAGE_DIR = Path(__file__).resolve().parent.parent

#: scripts/build_native.py fills this folder with the shared libraries, and the bindings if llama-cpp-python is missing
LIB_DIR = PACKAGE_DIR / "lib"
BINDINGS_DIR = LIB_DIR / "bindings"

BINDINGS_VERSION = "0.3.36"
ABI = 10

_LIB_PATH_VARIABLE = "LLAMA_CPP_LIB_PATH"


def library_dir() -> Path:
    """Returns the folder from which the bindings load libllama: the user's choice, or the package's folder."""
    return Path(os.environ.get(_LIB_PATH_VARIABLE) or LIB_DIR)


@functools.cache
def load() -> ModuleType:
    """Imports ``llama_cpp`` with the patched library.

    ``llama_cpp`` reads ``LLAMA_CPP_LIB_PATH`` on its first import (llama_cpp/llama_cpp.py), so call this before any
    other code imports it.

    Returns:
        The module ``llama_cpp``.
    Raises:
        LibraryError: the library is missing or unpatched, has another ABI, or cannot compute on this CPU, or the
            bindings have another version.
    """
    if "llama_cpp" not in sys.modules:
        folder = library_dir()
        if not any(folder.glob("*llama*")):
            raise LibraryError(
                f"no llama.cpp library in {folder}: run `python scripts/build_native.py` in the checkout, "
                f"or install a C++ compiler and reinstall"
            )
        os.environ[_LIB_PATH_VARIABLE] = str(folder)
        if importlib.util.find_spec("llama_cpp") is None:
            sys.path.append(str(BINDINGS_DIR))
    try:
        llama_cpp = importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError, FileNotFoundError) as error:
        raise LibraryError(f"llama_cpp could not be imported: {error}") from error
    check(llama_cpp)
    log.show_warnings(llama_cpp)  # not a line for every backend
    devices.load_backends(llama_cpp.llama_cpp._lib, library_dir())
    log.print_natively(llama_cpp)
    return llama_cpp


def check(llama_cpp: ModuleType) -> None:
    """Raises LibraryError unless ``llama_cpp`` is the pinned version and its library is patched and has this ABI."""
    if llama_cpp.__version__ != BINDINGS_VERSION:
        raise LibraryError(f"llama-cpp-python {llama_cpp.__version__} is installed; {BINDINGS_VERSION} is needed")
    lib = llama_cpp.llama_cpp._lib
    if not hasattr(lib, "llama_kvc_abi"):
        raise LibraryError(
            f"llama_cpp has loaded a stock llama.cpp ({lib._name}), which cannot compress a KV cache: "
            f"import kvcompose_gguf before llama_cpp, and unset {_LIB_PATH_VARIABLE} if it points elsewhere"
        )
    abi = lib.llama_kvc_abi()
    if abi != ABI:
        raise LibraryError(f"the library in {lib._name} has ABI {abi}; this package needs {ABI}: build it again")
