"""What ``kvcompose doctor`` reports: is the native library there, is it ours, and what runs with it."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from types import ModuleType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import __version__, models
from .errors import LibraryError
from .native import bindings, library


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``ok=False`` means that compression cannot work like this."""

    name: str
    value: str
    ok: bool = True


def doctor(console: Console | None = None) -> bool:
    """Print the findings; returns whether all of them are fine."""
    findings = examine()
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")  # a path is no use with its end cut off
    for finding in findings:
        table.add_row(finding.name, Text(finding.value, style="default" if finding.ok else "red"))
    (console or Console()).print(table)
    return all(finding.ok for finding in findings)


def examine() -> list[Finding]:
    """Everything that can be found out; nothing is raised for a library that is missing or wrong."""
    return [
        Finding("kvcompose-gguf", f"{__version__}, Python {platform.python_version()}, {platform.platform()}"),
        *_library_findings(),
        *(Finding(name, _version(name)) for name in ("numba", "numpy")),
        *(_model_finding(name) for name in models.names()),
    ]


def _library_findings() -> list[Finding]:
    try:
        llama_cpp = library.load()
    except LibraryError as error:
        return [Finding("library folder", str(library.library_dir())), Finding("library", str(error), ok=False)]
    return _loaded_findings(llama_cpp)


def _loaded_findings(llama_cpp: ModuleType) -> list[Finding]:
    lib = bindings.declare(llama_cpp.llama_cpp._lib)
    gpu = "yes" if llama_cpp.llama_supports_gpu_offload() else "no"
    return [
        Finding("library", str(lib._name)),
        Finding("llama.cpp commit", lib.llama_kvc_commit().decode()),
        Finding("ABI", f"{lib.llama_kvc_abi()}, {library.ABI} needed"),
        Finding("backends", llama_cpp.llama_print_system_info().decode().strip()),
        Finding("GPU offload", gpu),
        Finding("bindings", f"llama-cpp-python {llama_cpp.__version__} in {llama_cpp.__path__[0]}"),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _model_finding(name: str) -> Finding:
    where = models.path(name)
    if not where.exists():
        return Finding(f"model {name}", f"not fetched (kvcompose fetch {name})")
    return Finding(f"model {name}", f"{where}{'' if models.is_fetched(name) else ', damaged: fetch it again'}")
