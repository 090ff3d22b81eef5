"""Describes the machine and the versions that measured numbers depend on."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

from .. import __version__


def system() -> dict[str, Any]:
    """Returns date (UTC, ISO 8601), versions, processor and system as JSON values; the names are ``Environment``'s."""
    from . import bindings, library

    llama_cpp = library.load()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "package_version": __version__,
        "llama_cpp_commit": bindings.declare(llama_cpp.llama_cpp._lib).llama_kvc_commit().decode(),
        "backends": llama_cpp.llama_print_system_info().decode().strip(),
        "cpu": cpu_name(),
        "n_cpu": os.cpu_count() or 1,
        "os": platform.platform(),
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """Returns the CPU's model name as the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]
