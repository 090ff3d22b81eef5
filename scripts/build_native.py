#!/usr/bin/env python3
"""Builds the patched llama.cpp and puts it where kvcompose_gguf finds it (kvcompose_gguf/lib).

    python scripts/build_native.py
    CMAKE_ARGS="-DGGML_CUDA=on" python scripts/build_native.py      (GGML_METAL, GGML_VULKAN, … alike)

The user's cache keeps the result under a hash of version, patches and flags; the next checkout or CI run copies it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from llama_source import CACHE, ROOT, BuildError, own_sources, patch_files, patched_tree, read_pin, run, unpack

LIB_DIR = ROOT / "kvcompose_gguf" / "lib"

FLAGS = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DGGML_RPC=ON",  # small; it listens only if `kvcompose rpc-server` is started
    # all libraries in one folder, without symlinks, which a wheel cannot hold
    "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH=" + ("@loader_path" if sys.platform == "darwin" else "$ORIGIN"),
    *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "EXAMPLES", "TOOLS", "SERVER", "APP")),
]


def user_flags() -> list[str]:
    """Returns CMAKE_ARGS without the flag that stops llama-cpp-python from building its own llama.cpp."""
    return [flag for flag in shlex.split(os.environ.get("CMAKE_ARGS", "")) if not flag.startswith("-DLLAMA_BUILD=")]


def cpu_id() -> str:
    """Identifies the CPU: ggml compiles for the build machine's CPU, so another CPU must not reuse the build."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def build_key(flags: list[str], stock: bool) -> str:
    digest = hashlib.sha256(b"stock" if stock else b"patched")
    patches = [] if stock else [*patch_files(), *own_sources()]
    for path in [ROOT / "patches" / "LLAMA_CPP_VERSION", *patches]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update("\0".join([sys.platform, platform.machine(), cpu_id(), *FLAGS, *flags]).encode())
    return digest.hexdigest()[:20]


def need(program: str, hint: str) -> str:
    found = shutil.which(program)
    if not found:
        raise BuildError(f"{program} is needed to build llama.cpp: {hint}")
    return found


def build(target: Path, flags: list[str], jobs: int, stock: bool) -> None:
    """Compiles into ``target``, which appears only after everything has succeeded."""
    need("git", "install git")
    cmake = need("cmake", "`pip install cmake ninja`, or your system's package")
    pin = read_pin()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as name:
        work = Path(name)
        n_patches = 0 if stock else len(patch_files())
        print(f"llama.cpp {pin.commit[:9]} of llama-cpp-python {pin.bindings}: unpack, {n_patches} patches", flush=True)
        tree = patched_tree(pin, work / "llama.cpp", n_patches)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = [cmake, "-S", str(tree), "-B", str(work / "build"), *generator, *FLAGS,
                     f"-DLLAMA_BUILD_COMMIT={pin.commit}", *flags]  # fmt: skip
        run(configure)
        print(f"compile with {jobs} jobs (minutes)", flush=True)
        run([cmake, "--build", str(work / "build"), "--config", "Release", "-j", str(jobs), "--target", "llama",
             *([] if stock else ["kvc-chat"])])  # fmt: skip

        out = work / "lib"
        out.mkdir()
        patterns = ("*.so", "*.dylib", "*.dll", "*.metallib")
        for path in (p for pattern in patterns for p in (work / "build" / "bin").rglob(pattern)):
            shutil.copy(path, out / path.name)
        # a sanitized library needs its runtime loaded first, and another machine's cannot be loaded here
        if not stock and not any("-fsanitize" in flag or "SYSTEM_PROCESSOR" in flag for flag in flags):
            check_symbols(out)

        _, bindings = unpack(pin, work / "sdist")
        shutil.copytree(bindings, out / "bindings" / "llama_cpp", ignore=shutil.ignore_patterns("lib", "__pycache__"))
        shutil.copy(bindings.parent / "LICENSE.md", out / "bindings" / "LICENSE.llama-cpp-python.md")
        shutil.copy(tree / "LICENSE", out / "LICENSE.llama.cpp")
        with contextlib.suppress(OSError):  # another process may have finished the same build first
            os.replace(out, target)
    if not target.exists():
        raise BuildError(f"{target} could not be written")


def check_symbols(folder: Path) -> None:
    """Raises if the libraries lack our functions; after a failed patch libllama would still load."""
    for name, function in (("llama", "llama_kvc_abi"), ("kvc-chat", "kvc_chat_abi")):
        library = next((p for p in folder.iterdir() if p.stem in (f"lib{name}", name)), None)
        if library is None:
            raise BuildError(f"the build left no lib{name} in {folder}: {sorted(p.name for p in folder.iterdir())}")
        if not hasattr(ctypes.CDLL(str(library)), function):
            raise BuildError(f"{library.name} was built without the patches")


def cached_build(jobs: int | None = None, stock: bool = False, flags: list[str] | None = None) -> Path:
    """Returns the folder of the libraries in the user's cache; compiles them if they are missing.

    Args:
        stock: build unmodified llama.cpp, which tests compare with.
        flags: flags for cmake, instead of those in CMAKE_ARGS.
    """
    flags = user_flags() if flags is None else flags
    target = CACHE / "native" / build_key(flags, stock)
    if not target.exists():
        start = time.monotonic()
        build(target, flags, jobs or os.cpu_count() or 1, stock)
        print(f"built in {time.monotonic() - start:.0f} s, kept in {target}", flush=True)
    return target


def ensure(jobs: int | None = None) -> Path:
    """Fills kvcompose_gguf/lib from the cache; returns it."""
    target = cached_build(jobs)
    stamp = LIB_DIR / "BUILD_KEY"
    if not stamp.exists() or stamp.read_text() != target.name:
        shutil.rmtree(LIB_DIR, ignore_errors=True)
        shutil.copytree(target, LIB_DIR)
        stamp.write_text(target.name)
    return LIB_DIR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-j", "--jobs", type=int, help="number of compiler processes; default: one per core")
    parser.add_argument(
        "--stock", action="store_true", help="build llama.cpp without patches for the tests; it stays in the cache"
    )
    args = parser.parse_args()
    if args.stock:
        print(f"stock library: {cached_build(args.jobs, stock=True)}")
    else:
        print(f"native library: {ensure(args.jobs)}")


if __name__ == "__main__":
    main()
