#!/usr/bin/env python3
"""Runs llama.cpp's own server tests against ``kvcompose serve`` and prints the results, next to llama-server's own.

    python scripts/llama_server_tests.py LLAMA_CPP [--llama-server BIN] [--model smollm2] [--files basic,security,...]
    python scripts/llama_server_tests.py LLAMA_CPP --record BODIES [--checkout DIR]

LLAMA_CPP is a checkout of the pinned version (patches/LLAMA_CPP_VERSION), BIN a llama-server built from it. The tests
ask for small models by name and get ``--model`` instead (scripts/llama_server_shim.py). So tests that expect a certain
model's tokens or words fail, as llama-server's column shows. Needs the packages in
tools/server/tests/requirements.txt, and pytest-timeout. The last line is one JSON document.

``--record`` writes the bodies that our server sent into one file for each test (scripts/record_bodies.py), and
``--checkout`` runs the server of another checkout. So ``diff -r`` compares two checkouts. Run one of them twice to see
which tests ask for random tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree  # parses pytest's own report
from collections import Counter
from pathlib import Path

#: the test files that need no network and no other models
FILES = (
    "tokenize,basic,security,metrics,template,ignore_eos,completion,chat_completion,slot_save,infill,embedding,"
    "ctx_shift,tool_call,compat_anthropic,compat_oai_responses"
)

#: the tests' session first starts all servers that it knows, to download models; this skips it
PLUGIN = """
def pytest_collection_finish(session):
    import utils
    utils.ServerPreset.load_all = staticmethod(lambda: None)
"""

SCRIPTS = Path(__file__).resolve().parent

Outcome = tuple[str, str]


def environment(model: str, server: str | None, checkout: Path, record: Path | None) -> dict[str, str]:
    """Returns the variables that tell the tests and the shim which server to start, and how."""
    shim = checkout.resolve() / "scripts" / "llama_server_shim.py"
    env = os.environ | {
        "LLAMA_SERVER_BIN_PATH": str(shim),
        "KVC_TEST_MODEL": model,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # the shim's python is this one
        "PYTHONPATH": f"{checkout.resolve()}:{os.environ.get('PYTHONPATH', '')}",
    }
    if server is not None:
        env["KVC_TEST_SERVER"] = str(Path(server).resolve())
    elif record is not None:
        env |= {"KVC_RECORD_SCRIPT": str(shim), "KVC_RECORD_FOLDER": str(record.resolve())}
        env["LLAMA_SERVER_BIN_PATH"] = str(SCRIPTS / "record_bodies.py")
        env["KVC_RECORD_ARGUMENTS"] = "--threads 1"  # llama.cpp's threads spin, so that two beside other work crawl
    return env


def sort_bodies(record: Path) -> None:
    """Sorts the lines of each file: tests with several clients have no fixed order."""
    for file in record.glob("*.jsonl"):
        file.write_text("".join(sorted(file.read_text("utf-8").splitlines(keepends=True))), "utf-8")


def run(tests: Path, names: list[str], env: dict[str, str], timeout: int) -> dict[str, dict[str, Outcome]]:
    """Runs the tests; returns each test's outcome and reason, by file."""
    with tempfile.TemporaryDirectory() as folder:
        report, plugin = Path(folder) / "report.xml", Path(folder) / "kvc_no_downloads.py"
        plugin.write_text(PLUGIN)
        env = env | {"PYTHONPATH": f"{folder}:{env['PYTHONPATH']}"}
        files = [f"unit/test_{name}.py" for name in names]
        options = ["-m", "not slow", "--timeout", str(timeout), f"--junitxml={report}", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "-q", "-p", plugin.stem, *files, *options]
        ended = subprocess.run(command, cwd=tests, env=env, capture_output=True, text=True)
        if not report.exists():
            sys.exit(ended.stdout[-2000:] + ended.stderr[-2000:])
        found: dict[str, dict[str, Outcome]] = {name: {} for name in names}
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            name = case.get("classname", "").rpartition("test_")[2]
            found.setdefault(name or "collection", {})[case.get("name", "")] = _outcome(case)
    return found


def _outcome(case: ElementTree.Element) -> Outcome:
    for kind in ("failure", "error", "skipped"):
        if (found := case.find(kind)) is not None:
            told = "failed" if kind == "error" else kind.replace("failure", "failed")
            return told, " ".join((found.get("message") or "").split())[:160]
    return "passed", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("--llama-server")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--files", default=FILES)
    parser.add_argument("--only", choices=("ours", "theirs"), help="run the tests with one of the two servers only")
    parser.add_argument("--record", type=Path, help="folder for the bodies of our server; must be empty")
    parser.add_argument("--checkout", type=Path, default=SCRIPTS.parent, help="checkout of our server; default: this")
    parser.add_argument("--timeout", type=int, default=90, help="seconds for a test, default 90; recording needs more")
    args = parser.parse_args()
    if args.record is not None and args.record.exists() and any(args.record.iterdir()):
        parser.error(f"{args.record} has files: give an empty folder, or one that does not exist")
    from kvcompose_gguf.models.resolve import resolve_model

    tests, names = args.llama_cpp / "tools" / "server" / "tests", args.files.split(",")
    model = str(Path(resolve_model(args.model)).resolve())
    nothing: dict[str, dict[str, Outcome]] = {name: {} for name in names}
    mine = nothing
    if args.only != "theirs":
        mine = run(tests, names, environment(model, None, args.checkout, args.record), args.timeout)
    if args.record is not None:
        sort_bodies(args.record)
    theirs = nothing
    if args.llama_server and args.only != "ours":
        theirs = run(tests, names, environment(model, args.llama_server, args.checkout, None), args.timeout)
    print("| file | passed | failed | of these also by llama-server | skipped | llama-server: passed | failed |")
    print("|---|---|---|---|---|---|---|")
    reasons = []
    for name in names:
        counts, other = (Counter(outcome for outcome, _ in side[name].values()) for side in (mine, theirs))
        failed = [test for test, (outcome, _) in mine[name].items() if outcome == "failed"]
        both = [test for test in failed if theirs[name].get(test, ("", ""))[0] == "failed"]
        print(
            f"| test_{name} | {counts['passed']} | {counts['failed']} | {len(both)} | {counts['skipped']} "
            f"| {other['passed']} | {other['failed']} |"
        )
        reasons += [f"* {name}: {test}: {mine[name][test][1]}" for test in failed if test not in both]
    print("\nFailed here and not by llama-server:\n", *reasons, sep="\n")
    print(json.dumps({"kvcompose": mine, "llama-server": theirs}))


if __name__ == "__main__":
    main()
