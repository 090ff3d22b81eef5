#!/usr/bin/env python3
"""Sends random requests to ``kvcompose serve`` on a tiny model; schemathesis makes them from the server's description.

    pip install schemathesis
    python scripts/fuzz_server.py [--examples 300] [--seed 1]

Status 500, or the end of the server, counts as a finding. Allowed are 501 (not offered), 503 (the queue is full) and
504 (a request took longer than its limit of one second). After the run the server must answer an ordinary request as it
did before.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx2

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support import tiny_gguf
from support.chat_templates import HERMES
from support.serving import CONFIG, METHOD, running, tiny_options

SETTINGS = """
[checks]
enabled = false

[checks.not_a_server_error]
enabled = true
expected-statuses = ["2xx", "3xx", "4xx", 501, 503, 504]
"""


def answer(address: str) -> str:
    body = {"prompt": list(range(40, 80)), "n_predict": 8, "temperature": 0, "cache_prompt": False}
    return str(httpx2.post(f"{address}/completion", json=body, timeout=60).json()["content"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=300, help="number for every route and kind of request")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_gguf.write(CONFIG, folder / "tiny.gguf")
        settings, slots, theirs = folder / "schemathesis.toml", folder / "slots", folder / "theirs"
        settings.write_text(SETTINGS)
        slots.mkdir()
        theirs.mkdir()
        options = tiny_options(
            model, n_ctx=1024, method=METHOD, n_predict=8, embeddings=64, pooling="mean", slot_save_path=slots,
            idle_bytes=1 << 24, timeout=1.0, chat_template=HERMES,
        )  # fmt: skip
        with running(options) as address:
            before = answer(address)
            command = [
                str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(settings), "run",
                f"{address}/openapi.json", "--max-examples", str(args.examples), "--seed", str(args.seed),
                "--workers", "2", "--continue-on-failure", "--suppress-health-check", "all",
            ]  # fmt: skip
            ended = subprocess.run(command, cwd=theirs, capture_output=True, text=True)
            print(ended.stdout[-6000:], ended.stderr[-2000:])
            assert answer(address) == before, "the server's answer has changed"
            metrics = httpx2.get(f"{address}/metrics").text
            print(re.findall(r"^llamacpp:(?:tokens_predicted|prompt_tokens)_total .*", metrics, re.MULTILINE))
            assert set(folder.iterdir()) == {model, settings, slots, theirs}, list(folder.iterdir())
            print(f"{len(list(slots.rglob('*')))} files in the slots' folder, none outside of it")
    sys.exit(ended.returncode)


if __name__ == "__main__":
    main()
