"""What is known about the loaded library, for reports."""

from __future__ import annotations

from dataclasses import dataclass

from . import bindings, library
from .devices import Device, find_devices


@dataclass(frozen=True)
class LibraryInfo:
    """The loaded library and its bindings.

    Attributes:
        path: file of the library.
        commit: llama.cpp's commit.
        abi: number of this package's interface.
        backends: llama.cpp's line about its build and the CPU features it found.
        devices: the devices that it can compute on.
        bindings_version, bindings_dir: version and folder of llama-cpp-python.
    """

    path: str
    commit: str
    abi: int
    backends: str
    devices: tuple[Device, ...]
    bindings_version: str
    bindings_dir: str


def library_info() -> LibraryInfo:
    """Loads the library and describes it.

    Raises:
        LibraryError: as :func:`library.load`.
    """
    llama_cpp = library.load()
    lib = bindings.declare(llama_cpp.llama_cpp._lib)
    return LibraryInfo(
        path=str(lib._name),
        commit=lib.llama_kvc_commit().decode(),
        abi=lib.llama_kvc_abi(),
        backends=llama_cpp.llama_print_system_info().decode().strip(),
        devices=tuple(find_devices(lib)),
        bindings_version=llama_cpp.__version__,
        bindings_dir=str(llama_cpp.__path__[0]),
    )
