#!/usr/bin/env python3
"""Works on the patches of llama.cpp.

python scripts/patches.py tree DIR      make a patched git tree to edit; commits after `pristine` are the patches
python scripts/patches.py export DIR    write the tree's commits, and our own files in it, back to patches/
python scripts/patches.py check         check that the patches apply, and export again byte by byte
python scripts/patches.py prefixes      compile every prefix of the series (an hour on 2 cores)
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_native import FLAGS, user_flags
from llama_source import (
    OWN_SOURCES,
    PATCHES,
    BuildError,
    export_patches,
    export_sources,
    patch_files,
    patched_tree,
    read_pin,
    run,
)


def tree(folder: Path) -> None:
    patched_tree(read_pin(), folder)
    own = OWN_SOURCES.values()
    (folder / ".git" / "info" / "exclude").write_text("\n".join([*own, ""]))
    print(f"{folder}: {len(patch_files())} commits after `pristine`; our own files are {', '.join(own)}")


def export(folder: Path) -> None:
    for path in patch_files():
        path.unlink()
    for path in export_patches(folder, PATCHES):
        print(path.name)
    export_sources(folder)


def check() -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        made = export_patches(patched_tree(read_pin(), work / "llama.cpp"), work)
        want = patch_files()
        if [p.name for p in made] != [p.name for p in want]:
            raise BuildError(f"exported {[p.name for p in made]}, patches/ has {[p.name for p in want]}")
        changed = [a.name for a, b in zip(made, want, strict=True) if a.read_bytes() != b.read_bytes()]
        if changed:
            raise BuildError(f"changed by applying and exporting: {changed}")
    print(f"{len(want)} patches apply and export byte-identical")


def prefixes() -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for n in range(1, len(patch_files()) + 1):
            source = patched_tree(read_pin(), work / f"llama.cpp-{n}", n)
            build = work / "build"  # a fixed path lets unchanged files be compiled only once
            shutil.rmtree(work / "llama.cpp", ignore_errors=True)
            source.rename(work / "llama.cpp")
            run(["cmake", "-S", str(work / "llama.cpp"), "-B", str(build), "-G", "Ninja", *FLAGS, *user_flags()])
            run(["cmake", "--build", str(build), "--target", "llama"])
            print(f"the first {n} of {len(patch_files())} patches compile", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["tree", "export", "check", "prefixes"])
    parser.add_argument("folder", type=Path, nargs="?")
    args = parser.parse_args()
    if args.command in ("tree", "export"):
        if args.folder is None:
            parser.error(f"{args.command} needs a folder")
        {"tree": tree, "export": export}[args.command](args.folder.resolve())
    else:
        {"check": check, "prefixes": prefixes}[args.command]()


if __name__ == "__main__":
    main()
