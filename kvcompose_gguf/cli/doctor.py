"""What ``kvcompose doctor`` reports: library, devices, fetched models, what was learnt; or one model's caches."""

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
from ..native.preview import Preview, preview
from ..support.printing import megabytes

#: numbers of tokens for which the report tells the memory
LENGTHS = (8_192, 32_768, 131_072)

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


def doctor_of(path: Path, console: Console | None = None) -> bool:
    """Print what the caches of a model will take; returns whether it can be compressed.

    Raises:
        ConfigError: llama.cpp cannot load the file.
    """
    out, found = console or Console(), preview(path)
    facts = Table.grid(padding=(0, 2))
    for finding in model_findings(path, found):
        facts.add_row(finding.name, Text(finding.value, style="default" if finding.ok else "red"))
    out.print(facts)
    if found.refused:
        return False
    memory = Table(box=None, padding=(0, 2))
    for name in ("tokens", "full cache, f16", "75 % removed"):
        memory.add_column(name, justify="right")
    for n in LENGTHS:
        n_bytes = n * found.n_bytes_token
        beyond = " (longer than it was trained for)" if n > found.n_ctx_train else ""
        memory.add_row(f"{n:,}{beyond}", megabytes(n_bytes), megabytes(n_bytes // 4))
    out.print(memory)
    return True


def model_findings(path: Path, found: Preview) -> list[Finding]:
    """A model's architecture, and which of its layers are compressed."""
    findings = [
        Finding("model", str(path)),
        Finding(
            "architecture", f"{found.architecture}, {found.n_layer} layers, trained for {found.n_ctx_train:,} tokens"
        ),
    ]
    if found.refused:
        return [*findings, Finding("refused", found.refused, ok=False)]
    kinds = {"sliding windows": found.windows, "a recurrent state": found.recurrent}
    others = " and ".join(name for name, is_there in kinds.items() if is_there)
    more = f"; there are also layers with {others}, which do not grow" if others else ""
    return [
        *findings,
        Finding("compressed", f"{len(found.layers)} layers: {_ranges([layer.il for layer in found.layers])}{more}"),
        Finding("a token", f"{found.n_bytes_token:,} bytes in these layers"),
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with their runs shortened, e.g. ``"0-3, 7"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


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
