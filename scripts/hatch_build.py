"""Build hook: a wheel includes the native library; an editable install leaves it in the checkout."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).resolve().parent))


class NativeBuildHook(BuildHookInterface):  # type: ignore[misc, type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        import sysconfig

        build_data["pure_python"] = False
        platform = os.environ.get("KVCOMPOSE_WHEEL_PLATFORM") or sysconfig.get_platform()
        # scripts/build_wheel.py has built a library, perhaps for other CPUs than this machine's
        library = os.environ.get("KVCOMPOSE_WHEEL_LIBRARY")
        if library:
            build_data["force_include"][library] = "kvcompose_gguf/lib"
        else:
            import build_native

            build_native.ensure()
            build_data["artifacts"].append("kvcompose_gguf/lib/**")
        build_data["tag"] = f"py3-none-{platform.replace('-', '_').replace('.', '_')}"
