#!/usr/bin/env python3
"""Prints what a checkout's commands print and write, as one JSON object of names and values.

    PYTHONPATH=CHECKOUT python scripts/probe_commands.py TINY_MODEL

Runs in the current folder, which is empty at first: help texts, wrong options, saved sessions, a calibration and an
evaluation. scripts/compare_checkouts.py runs this in two checkouts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from record_bodies import mask, mask_text

COMMANDS = (
    "", "demo", "chat", "compress", "bench", "eval", "fetch", "calibrate", "serve", "doctor", "rpc-server", "sessions",
    "sessions list", "sessions show", "sessions delete", "models", "nothing",
)  # fmt: skip

#: command lines that end with an error, or print something short
WRONG = (
    "chat", "chat missing.gguf", "chat MODEL missing.txt -q Who?", "chat MODEL text.txt -q Who? --compression-ratio 2",
    "chat MODEL text.txt -q Who? --method nothing", "compress MODEL missing.txt", "compress MODEL text.txt",
    "eval MODEL --tasks nothing", "eval MODEL --method @nothing", "eval MODEL --compression-ratio 1.5 --tasks passkey",
    "eval MODEL -hf a/b", "serve", "serve -m MODEL --kv-budget much", "serve -m MODEL --cache-type-k f7",
    "serve -m MODEL --compression-ratio 0.5 --method nothing", "serve -m MODEL --api-key-file missing",
    "serve -m MODEL --host nowhere.invalid", "serve -m text.txt", "bench MODEL --n-tokens many", "bench --from missing",
    "fetch nothing", "learn MODEL --for nothing",
    "calibrate MODEL", "sessions show missing", "sessions delete missing --yes",
    "rpc-server --port 0", "--version",
)  # fmt: skip

#: what works, in this order: later lines use the files of earlier ones
RIGHT = (
    "learn MODEL --for compresskv --data-free --random-tokens 64 --errors 2 -t 1",
    "learn MODEL --passages 6 --passage-tokens 400 -t 1",
    "compress MODEL text.txt -o one.kvc --compression-ratio 0.5 -t 1",
    "compress MODEL text.txt -o two.kvc --method snapkv --max-kv-bytes 300kB -t 1",
    "sessions show one.kvc", "sessions show two.kvc",
    "chat MODEL text.txt -q Who? --compression-ratio 0.6 -t 1 --max-tokens 12",
    "chat MODEL --session one.kvc -q Who? -t 1 --max-tokens 12",
    "eval MODEL --out run --tasks passkey,niah_single_1 --n-tokens 760 --samples 1 --compression-ratio 0.5,0.9 "
    "--texts generated --jobs 1 --seed 3 --method kvcompose,scoring=repeat --method compresskv "
    "--method kvcompose,scoring=learned --method unstructured --method variant,fold=1.0,correct=0.5 --method snapkv",
    "eval MODEL --out run --report-only",
    "eval MODEL --out typed --tasks passkey --n-tokens 760 --samples 1 --compression-ratio 0.5 --texts generated "
    "--jobs 1 --kv-types f16,q8_0 --method @quick --question-seen --no-chat",
)  # fmt: skip

#: fields of evaluations and calibrations that depend on the machine
MACHINE = {"environment", "resumed", "versions", "made", "model", "machine", "version"}
#: times, clocks, dates, and the bars that progress draws
TIMES = re.compile(
    r"\b\d+([.,:]\d+)* ?(ms|s|min|tokens/s|t/s|seconds?|ago|times|GB/s)\b"
    r"|\d\d:\d\d(:\d\d)?|\d{4}-\d\d-\d\d|[━╸╺─]+"
)
#: seconds in the tables of an evaluation's costs; its scores have another form
COSTS = re.compile(r"(?<![\d.])\d+\.\d\d(?![\d.])")


def run(line: str, model: str) -> dict[str, Any]:
    """Runs a command; returns its exit code and what it printed, without times."""
    words = [sys.executable, "-m", "kvcompose_gguf", *line.replace("MODEL", model).split()]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    has_costs = line.startswith("eval MODEL --out")
    printed = [plain(text, model, has_costs) for text in (done.stdout, done.stderr)]
    return {"code": done.returncode, "stdout": printed[0], "stderr": printed[1]}


def plain(text: str, model: str, has_costs: bool = False) -> list[str]:
    """Returns lines without times, progress, paths and runs of blanks, whose number follows from the times.

    Args:
        has_costs: numbers with two decimals are seconds.
    """
    text = text.replace(model, "MODEL")
    text = COSTS.sub("*", text) if has_costs else text
    lines = [mask_text(TIMES.sub("*", part.split("\r")[-1])) for part in text.split("\n")]
    return [re.sub(r" {2,}", " ", line).rstrip() for line in lines if line.strip()]


def files_of(folder: Path, model: str) -> dict[str, Any]:
    """Returns the contents of JSON, Markdown and other files: hashes of what is not text."""
    out: dict[str, Any] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and "matplotlib" not in path.parts):
        name = re.sub(r"[0-9a-f]{12,}", "*", str(file))
        if file.suffix in (".json", ".jsonl"):
            text = file.read_text("utf-8").replace(model, "MODEL")
            parts = [text] if file.suffix == ".json" else text.splitlines()
            out[name] = [without_machine(mask(json.loads(part))) for part in parts]
        elif file.suffix == ".md":
            out[name] = plain(file.read_text("utf-8"), model, has_costs=True)
        elif file.suffix not in (".svg", ".png", ".kvc", ".lock"):
            out[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return out


def without_machine(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in MACHINE and "seconds" not in key}
        return {key: without_machine(item) for key, item in kept.items()}
    return [without_machine(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    model = parser.parse_args().model
    Path("text.txt").write_text("The old keeper wrote 4711 into the book of the tower. " * 14, encoding="utf-8")
    lines = [*(f"{name} --help" for name in COMMANDS), *WRONG, *RIGHT]
    out: dict[str, Any] = {line: run(line, model) for line in lines}
    for folder in ("run", "typed", "cache", "data"):
        out |= files_of(Path(folder), model)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
