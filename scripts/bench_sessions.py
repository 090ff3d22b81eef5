#!/usr/bin/env python3
"""What does a session file cost, and does it survive killed writers and flipped bits?

    python scripts/bench_sessions.py MODEL [--n-tokens 4000] [--repeats 5] [--kills 200] [--flips 1000]

Regimes: a document of N seeded tokens of prose is read and compressed (75 % removed) once, saved, and loaded into an
empty context `--repeats` times. `--kills`: a process loads the session, saves it in a loop, and is killed with SIGKILL
at a random moment; the file has to be whole each time. `--flips`: one random bit of the file is flipped; loading has to
raise StateError each time. The last line is one JSON document. Give it the machine alone.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_speed import context_tokens, cpu_name

from kvcompose_gguf import KVCompose, Llama, StateError, sessions
from kvcompose_gguf.models.resolve import resolve_model

WRITER = """
import sys
from kvcompose_gguf import Llama

model, file, n_ctx, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
llm = Llama(model, n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False)
number = llm.load_session(file).extra["number"]
while True:
    number += 1
    llm.save_session(file, {"number": number})
    print(number, flush=True)
"""


def measure(llama: Llama, file: Path, n_tokens: int, repeats: int) -> dict[str, Any]:
    """Size of the file, and seconds to read the document and to load the session."""
    tokens = context_tokens(llama, n_tokens)
    start = time.perf_counter()
    report = llama.compress(tokens)
    read_seconds = time.perf_counter() - start
    save_seconds, load_seconds = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        info = llama.save_session(file, {"number": 0})
        save_seconds.append(time.perf_counter() - start)
    for _ in range(repeats):
        llama.reset()
        start = time.perf_counter()
        llama.load_session(file)
        load_seconds.append(time.perf_counter() - start)
    return {
        "n_tokens": n_tokens,
        "file_bytes": info.n_bytes,
        "row_bytes": report.kv_bytes_kept,
        "file_over_rows": info.n_bytes / report.kv_bytes_kept,
        "full_row_bytes": report.kv_bytes_full,
        "read_seconds": read_seconds,
        "save_seconds": statistics.median(save_seconds),
        "load_seconds": statistics.median(load_seconds),
        "read_over_load": read_seconds / statistics.median(load_seconds),
    }


def flip(llama: Llama, file: Path, n_flips: int, chosen: random.Random) -> dict[str, int]:
    """Loads of a file with one flipped bit: refused, and accepted."""
    counts = {"refused": 0, "accepted": 0}
    n_bytes = file.stat().st_size
    with file.open("r+b", buffering=0) as raw:
        for _ in range(n_flips):
            at, bit = chosen.randrange(n_bytes), 1 << chosen.randrange(8)
            raw.seek(at)
            (byte,) = raw.read(1)
            raw.seek(at)
            raw.write(bytes([byte ^ bit]))
            try:
                llama.load_session(file)
                counts["accepted"] += 1
            except StateError:
                counts["refused"] += 1
            raw.seek(at)
            raw.write(bytes([byte]))
    llama.load_session(file)
    return counts


def kill(model: Path, file: Path, n_kills: int, n_ctx: int, threads: int, chosen: random.Random) -> dict[str, Any]:
    """Files after each SIGKILL: whole, and broken; and how many saves had ended in all."""
    counts = {"whole": 0, "broken": 0, "in_the_middle": 0}
    command = [sys.executable, "-c", WRITER, str(model), str(file), str(n_ctx), str(threads)]
    for _ in range(n_kills):
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        start = time.perf_counter()
        writer.stdout.readline()
        time.sleep(chosen.random() * 3 * (time.perf_counter() - start))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        left = [folder for folder in file.parent.glob(".write-*") if any(folder.iterdir())]
        counts["in_the_middle"] += bool(left)
        for folder in file.parent.glob(".write-*"):
            for part in folder.iterdir():
                part.unlink()
            folder.rmdir()
        try:
            sessions.describe(file)
            counts["whole"] += 1
        except StateError:
            counts["broken"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a fetched model's name or a .gguf file")
    parser.add_argument("--n-tokens", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--flips", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    path, chosen = resolve_model(args.model), random.Random(args.seed)
    n_ctx = args.n_tokens + 768
    options = {"n_ctx": n_ctx, "n_threads": args.threads, "n_threads_batch": args.threads, "flash_attn": True}
    method = KVCompose(compression_ratio=0.75)
    result: dict[str, Any] = {"model": path.name, "threads": args.threads, "cpu": cpu_name()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "session.kvc"
        with Llama(str(path), verbose=False, kv_compressor=method, **options) as llama:
            result |= measure(llama, file, args.n_tokens, args.repeats)
            if args.flips:
                result["flips"] = flip(llama, file, args.flips, chosen)
        if args.kills:
            result["kills"] = kill(path, file, args.kills, n_ctx, args.threads, chosen)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
