"""What ``kvcompose doctor`` reports: the native library, its devices, the fetched models, and what was learnt."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..errors import ConfigError, LibraryError
from ..measurements.learned import learned_files, load_learned
from ..models import known
from ..native import library
from ..native.about import library_info
from ..native.devices import Device
from ..support.printing import megabytes

_KIND_NAMES = {"IGPU": "integrated GPU", "ACCEL": "accelerator"}


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``ok=False`` means that compression cannot work."""

    name: str
    value: str
    ok: bool = True


def doctor(console: Console | None = None) -> bool:
    """Print the findings; returns whether all of them are fine."""
    findings = examine()
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")  # never cut the end off a path
    for finding in findings:
        table.add_row(finding.name, Text(finding.value, style="default" if finding.ok else "red"))
    (console or Console()).print(table)
    return all(finding.ok for finding in findings)


def examine() -> list[Finding]:
    """All findings; a missing or wrong library is a finding too, and raises nothing."""
    return [
        Finding("kvcompose-gguf", f"{__version__}, Python {platform.python_version()}, {platform.platform()}"),
        *_library_findings(),
        *(Finding(name, _version(name)) for name in ("numba", "numpy")),
        *(_model_finding(name) for name in known.names()),
        *(_learned_finding(file) for file in learned_files()),
    ]


def _library_findings() -> list[Finding]:
    try:
        info = library_info()
    except LibraryError as error:
        return [Finding("library folder", str(library.library_dir())), Finding("library", str(error), ok=False)]
    return [
        Finding("library", info.path),
        Finding("llama.cpp commit", info.commit),
        Finding("ABI", f"{info.abi} (this package needs {library.ABI})"),
        Finding("backends", info.backends),
        *device_findings(info.devices),
        Finding("bindings", f"llama-cpp-python {info.bindings_version} in {info.bindings_dir}"),
    ]


def device_findings(devices: Sequence[Device]) -> list[Finding]:
    """A line for every device, the processors first; layers can go to what is not a processor."""
    cpus = [Finding("CPU", str(device)) for device in devices if device.kind == "CPU"]
    others = [device for device in devices if device.kind != "CPU"]
    if not others:
        return [*cpus, Finding("GPU", "none: all layers run on the CPU")]
    return [*cpus, *(Finding(_KIND_NAMES.get(device.kind, device.kind), str(device)) for device in others)]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _learned_finding(file: Path) -> Finding:
    try:
        learned = load_learned(file)
    except ConfigError as error:
        return Finding("learnt of", f"{file.stem}: {error}")
    agreement = f", agreement {learned.agreements[-1]:.2f}" if learned.agreements else ""
    return Finding(
        "learnt of", f"{file.stem}: {learned.n_prompts} prompts{agreement}, {megabytes(file.stat().st_size)}"
    )


def _model_finding(name: str) -> Finding:
    where = known.path(name)
    if not where.exists():
        return Finding(f"model {name}", f"not fetched (kvcompose fetch {name})")
    return Finding(f"model {name}", f"{where}{'' if known.is_fetched(name) else ', damaged: fetch it again'}")
