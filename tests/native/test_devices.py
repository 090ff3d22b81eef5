"""The libraries that compute (native/devices.py): part of the build, or chosen for the CPU when the package starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvcompose_gguf import LibraryError
from kvcompose_gguf.native import bindings, library
from kvcompose_gguf.native.devices import CPU, load_backends


class Library:
    """Has a CPU device if ``has_cpu``, and if ``loads_cpu`` after it has loaded the libraries of a folder."""

    def __init__(self, has_cpu: bool, loads_cpu: bool) -> None:
        self.folders: list[bytes] = []
        self.ggml_backend_dev_by_type = lambda kind: kind == CPU and (loads_cpu if self.folders else has_cpu)
        self.ggml_backend_load_all_from_path = lambda folder: self.folders.append(folder)

    def __getattr__(self, name: str) -> Any:  # all other functions
        return SimpleNamespace()


def test_a_build_that_computes_itself_loads_nothing() -> None:
    lib = Library(True, True)
    load_backends(lib, Path("here"))
    assert lib.folders == []


def test_a_portable_build_loads_what_suits_the_cpu_from_its_own_folder() -> None:
    lib = Library(False, True)
    load_backends(lib, Path("here"))
    assert lib.folders == [b"here"]


def test_a_cpu_without_a_library_is_an_error_that_names_the_folder() -> None:
    with pytest.raises(LibraryError, match="no library in here computes on this CPU"):
        load_backends(Library(False, False), Path("here"))


def test_the_loaded_library_computes_on_a_cpu() -> None:
    lib = bindings.declare_backends(library.load().llama_cpp._lib)
    assert lib.ggml_backend_dev_by_type(CPU)
