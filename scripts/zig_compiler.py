#!/usr/bin/env python3
"""Calls zig as a compiler that takes gcc's flags; build_wheel.py writes programs that call this.

    python scripts/zig_compiler.py TARGET cc|c++ ARGUMENTS …

zig has no ``-march=armv8.2-a+dotprod``: LLVM's names of the version and of every feature go into ``-mcpu``.
"""

from __future__ import annotations

import os
import re
import sys

#: LLVM's names where they differ from gcc's
FEATURES = {"fp16": "+fullfp16", "nosve": "-sve"}


def translated(argument: str) -> str:
    """Returns a compiler's argument as zig wants it."""
    arm = re.fullmatch(r"-march=armv(\d)(?:\.(\d))?-a((?:\+\w+)*)", argument)
    if not arm:
        return argument
    version = "_".join(filter(None, arm.groups()[:2]))
    features = [FEATURES.get(name, f"+{name}") for name in arm[3].split("+")[1:]]
    return f"-mcpu=generic+v{version}a{''.join(features)}"


def main() -> None:
    target, tool, *arguments = sys.argv[1:]
    compile_for = ["-target", target] if tool in ("cc", "c++") else []
    command = [sys.executable, "-m", "ziglang", tool, *compile_for, *map(translated, arguments)]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
