#!/usr/bin/env python3
"""llama.cpp's own server tests against ``kvcompose serve``: a table of what passes.

    python scripts/llama_server_tests.py LLAMA_CPP [--model smollm2] [--files basic,security,...]

LLAMA_CPP is a checkout of the pinned version (patches/LLAMA_CPP_VERSION). The tests ask for small models by name and
get ``--model`` instead (scripts/llama_server_shim.py), so those that expect a certain model's tokens or words fail; the
table has their reasons. Needs what tools/server/tests/requirements.txt lists.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree  # pytest's own report
from collections import Counter
from pathlib import Path

#: of those that can be run without a network and other models
FILES = "tokenize,basic,security,metrics,template,ignore_eos,completion,chat_completion,slot_save,infill"


def run(tests: Path, name: str, model: str, seconds: int) -> list[tuple[str, str, str]]:
    """Each test of a file, what became of it, and why."""
    env = os.environ | {
        "LLAMA_SERVER_BIN_PATH": str(Path(__file__).parent.resolve() / "llama_server_shim.py"),
        "KVC_TEST_MODEL": str(Path(model).resolve()) if Path(model).exists() else model,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # the shim's python is this one
    }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            f"unit/test_{name}.py",
            "-m",
            "not slow",
            f"--junitxml={report}",
        ]
        subprocess.run([*command, "-p", "no:cacheprovider"], cwd=tests, env=env, timeout=seconds, capture_output=True)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return [(case.get("name", ""), *_outcome(case)) for case in cases]


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for kind in ("failure", "error", "skipped"):
        if (found := case.find(kind)) is not None:
            return kind, " ".join((found.get("message") or "").split())[:110]
    return "passed", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--files", default=FILES)
    parser.add_argument("--seconds", type=int, default=1800, help="for each file")
    args = parser.parse_args()
    tests = args.llama_cpp / "tools" / "server" / "tests"
    table, reasons = [], []
    for name in args.files.split(","):
        cases = run(tests, name, args.model, args.seconds)
        counts = Counter(outcome for _, outcome, _ in cases)
        table.append(
            f"| test_{name} | {counts['passed']} | {counts['failure'] + counts['error']} | {counts['skipped']} |"
        )
        print(table[-1], flush=True)
        reasons += [f"* {name}: {test}: {why}" for test, outcome, why in cases if outcome in ("failure", "error")]
    print("\n| file | passed | failed | skipped |\n|---|---|---|---|", *table, "", *reasons, sep="\n")


if __name__ == "__main__":
    main()
