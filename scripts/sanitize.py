#!/usr/bin/env python3
"""Runs the native tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer (Linux, GCC or Clang).

    python scripts/sanitize.py [pytest arguments]      (default: the tests of the native part)

The build takes minutes and stays in the user's cache. Exits with pytest's exit code. A finding of AddressSanitizer ends
the test process with a report. UBSan's findings are printed; lines about llama.cpp's own sources are not ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_native import cached_build
from llama_source import ROOT, BuildError

SANITIZE = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-omit-frame-pointer -g1"
FLAGS = [
    f"-DCMAKE_C_FLAGS={SANITIZE}",
    f"-DCMAKE_CXX_FLAGS={SANITIZE}",
    "-DGGML_OPENMP=OFF",  # its runtime is not instrumented
]
TESTS = ["scores", "compose", "native", "elastic", "kv_types", "architectures", "probes"]


def runtime(name: str) -> str:
    """Returns the path of the compiler's shared sanitizer runtime."""
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        raise BuildError(f"{compiler} has no {name}: install its sanitizer runtime")
    return path


def main() -> None:
    target = cached_build(flags=FLAGS)
    tests = sys.argv[1:] or [f"tests/native/test_{name}.py" for name in TESTS]
    env = os.environ | {
        "LLAMA_CPP_LIB_PATH": str(target),
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')} {runtime('libstdc++.so')}",
        # Python keeps some memory until it exits
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    sys.exit(subprocess.run([sys.executable, "-m", "pytest", "-q", "-s", *tests], cwd=ROOT, env=env).returncode)


if __name__ == "__main__":
    main()
