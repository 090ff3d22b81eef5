#!/usr/bin/env python3
"""Compares two checkouts bit by bit: logits, budgets, sessions, evaluation, help texts and HTTP bodies.

    python scripts/compare_checkouts.py BEFORE AFTER [--smollm2 PATH] [--only cache,commands,server]

The same programs run in both, with one thread and the same seeds: scripts/probe_cache.py for tiny models of several
architectures and kinds of caches, and for SmolLM2 with ``--smollm2``; probe_commands.py for the command line and an
evaluation; probe_server.py for the server. Both checkouts need their built library. Prints a table and one line of
JSON; the exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"

METHODS = (
    "kvcompose,scoring=repeat",
    "kvcompose,scoring=repeat,scoring_chunk=None,n_sink=0",
    "kvcompose,scoring=repeat,scoring_fraction=0.5,agg_task=mean,agg_group=max,agg_head=max,keep_last=3",
    "kvcompose,scoring=window,window=16,add_v_norm=True",
    "kvcompose,scoring=prefill,agg_task=mean,add_mean_across_heads=False,first_layer_rule=True",
    "kvcompose,scoring=prompts,prompts=['What now?','And then?']",
    "kvcompose,scoring=auto,allocation=uniform,n_recent=16",
    "kvcompose,scoring=learned",
    "streaming-llm", "observed-attention", "tova", "snapkv,window=24", "pyramidkv", "knorm", "keydiff",
    "expected-attention", "kvzip", "unstructured,scoring=repeat", "variant,scoring=repeat,fold=1.0,correct=0.5",
    "random", "compresskv", "compresskv,per_head=True", "nothing",
)  # fmt: skip

F32, F16, Q8_0 = 0, 1, 8
#: cache types, by what a table calls them
CACHES: dict[str, dict[str, Any]] = {
    "f32": {"type_k": F32, "type_v": F32},
    "f16": {"type_k": F16, "type_v": F16},
    "f16 flash": {"type_k": F16, "type_v": F16, "flash_attn": True},
    "q8_0 flash": {"type_k": Q8_0, "type_v": Q8_0, "flash_attn": True},
    "f16 flash fixed": {"type_k": F16, "type_v": F16, "flash_attn": True, "elastic": False, "n_ubatch": 64},
}

#: architectures of tests/support/tiny.py, and the caches that each is run with; REFUSED ones show their errors
TINY = {
    "llama": tuple(CACHES), "qwen3": ("f16 flash", "q8_0 flash"), "gemma3": ("f32", "f16 flash", "q8_0 flash"),
    "gpt-oss": ("f16", "f16 flash"), "phi3": ("f16",), "mamba": ("f16",),
}  # fmt: skip


@dataclass(frozen=True)
class Checkout:
    """A checkout, and the folder in which its programs run and cache."""

    root: Path
    work: Path

    def run(self, *command: str) -> dict[str, Any]:
        """Runs a probe on this checkout; returns the values of its last line.

        Raises:
            SystemExit: the probe failed.
        """
        env = os.environ | {
            "PYTHONPATH": str(self.root), "XDG_CACHE_HOME": str(self.work / "cache"), "COLUMNS": "120",
            "XDG_DATA_HOME": str(self.work / "data"), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "NO_COLOR": "1",
            "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        self.work.mkdir(parents=True, exist_ok=True)
        line = [sys.executable, *command]
        done = subprocess.run(line, cwd=self.work, env=env, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise SystemExit(f"{self.root}: {' '.join(line)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))


def write_tiny_models(folder: Path) -> dict[str, Path]:
    """Writes one model of each architecture in TINY; both checkouts get the same files."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support import tiny, tiny_gguf

    known = tiny.ARCHITECTURES | tiny.REFUSED
    return {name: tiny_gguf.write(known[name], folder / f"{name}.gguf") for name in TINY}


@dataclass(frozen=True)
class Part:
    """What was compared under one name.

    Attributes:
        n_errors: how many of the values before are errors of Python.
        different: names of the values that differ.
    """

    name: str
    n_values: int
    n_errors: int
    different: list[str]


class Comparison:
    """Counts the values compared, and prints the first differences of each part."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def add(self, name: str, before: dict[str, Any], after: dict[str, Any]) -> None:
        keys = before.keys() | after.keys()
        different = [key for key in sorted(keys) if before.get(key, "missing") != after.get(key, "missing")]
        errors = sum(isinstance(value, str) and value.split(":")[0].endswith("Error") for value in before.values())
        self.parts.append(Part(name, len(keys), errors, different))
        print(f"| {name} | {len(keys)} | {errors} | {len(different)} |", flush=True)
        for key in different[:5]:
            print(f"  {key}\n    before: {shown(before, key)}\n    after:  {shown(after, key)}", flush=True)

    def end(self) -> int:
        """Prints the totals; returns the exit code."""
        n_values, n_different = (
            sum(part.n_values for part in self.parts),
            sum(len(part.different) for part in self.parts),
        )
        print(f"| all | {n_values} | | {n_different} |")
        print(
            json.dumps({"values": n_values, "different": n_different, "parts": [asdict(part) for part in self.parts]})
        )
        return int(n_different > 0 or n_values == 0)


def shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key])[:1500] if key in values else "missing"


def compare_caches(before: Checkout, after: Checkout, models: dict[str, tuple[Path, str]], to: Comparison) -> None:
    """Runs the methods on each model and cache in both checkouts, and loads each one's sessions in both.

    Loaded sessions are compared with each other, and not with the cache that was saved: its sliding windows come back
    in other cells, which changes the last bits.
    """
    probe = str(SCRIPTS / "probe_cache.py")
    for name, (path, cache) in models.items():
        arguments = [probe, str(path), json.dumps(CACHES[cache]), json.dumps(METHODS)]
        folders = [side.work / "sessions" / name.replace(" ", "-") for side in (before, after)]
        mine, theirs = before.run(*arguments, str(folders[0])), after.run(*arguments, str(folders[1]))
        to.add(name, mine, theirs)
        if any(folders[0].iterdir()):
            for whose, folder in zip(("before", "after"), folders, strict=True):
                loaded = [side.run(*arguments, str(folder), "--load") for side in (before, after)]
                to.add(f"{name}: sessions of {whose}", *loaded)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--smollm2", type=Path, help="path of SmolLM2-135M-Instruct.Q4_1.gguf; by default left out")
    parser.add_argument("--only", default="commands,server,cache", help="parts to compare, default: all of them")
    args = parser.parse_args()
    parts = args.only.split(",")
    to = Comparison()
    print("| part | values compared | of these errors | different |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tiny = write_tiny_models(work)
        before, after = (
            Checkout(root.resolve(), work / side) for side, root in (("before", args.before), ("after", args.after))
        )
        for part in ("commands", "server"):  # the first also calibrates the tiny llama, which the caches use
            if part in parts:
                command = [str(SCRIPTS / f"probe_{part}.py"), str(tiny["llama"])]
                to.add(part, before.run(*command), after.run(*command))
        models = {f"{name} {cache}": (tiny[name], cache) for name, caches in TINY.items() for cache in caches}
        if args.smollm2 is not None:
            path = args.smollm2.resolve()
            models = {f"SmolLM2 {cache}": (path, cache) for cache in ("f16 flash", "q8_0 flash")} | models
        if "cache" in parts:
            compare_caches(before, after, models, to)
    return to.end()


if __name__ == "__main__":
    sys.exit(main())
