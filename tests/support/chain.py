"""Runs the whole chain in its own process, for devices; prints scores, bytes and logits as JSON.

python -m support.chain MODEL OPTIONS [ENDPOINT …]
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import tiny
from support.processes import environment

N = 300

#: cache types for the device tests
CACHES = [
    pytest.param({"flash_attn": False, "type_k": 0, "type_v": 0}, id="transposed-v"),
    pytest.param({"flash_attn": True, "type_k": 1, "type_v": 1}, id="flash"),
    pytest.param({"flash_attn": True, "type_k": 8, "type_v": 8}, id="q8_0"),
]


def run(path: Path, options: dict[str, Any], endpoints: Sequence[str] = ()) -> dict[str, Any]:
    """Returns what :func:`main` prints for a model with tiny.GQA_QUIET's weights, run in another process, because an added
    device stays and a server's error ends the process."""
    command = [sys.executable, "-m", "support.chain", str(path), json.dumps(options), *endpoints]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(json.loads(result.stdout.splitlines()[-1]))


def compare(device: dict[str, Any], local: dict[str, Any], score_error: float, logit_error: float) -> None:
    """Asserts that both runs of the chain agree, and prints the largest differences."""
    assert device["rows"] == local["rows"]
    assert device["bytes"] < 0.6 * device["bytes_full"]
    biased = ["plain", "biased"] if "biased" in local else []
    for name in ("max", "mean", "window", "queries", "outputs", *biased):
        error = np.abs(np.array(device[name]) - np.array(local[name])).max()
        print(f"{name}: largest difference {error:.2e}")
        assert error <= score_error, f"{name}: {error:.2e}"
    for name in ("composed", "full", "loaded"):
        error = np.abs(np.array(device[name]) - np.array(local[name])).max()
        print(f"{name}: largest difference {error:.2e}")
        assert error <= logit_error, f"{name}: {error:.2e}"
    assert np.abs(np.array(local["full"]) - np.array(local["composed"])).max() > 10 * logit_error
    if biased:
        assert np.abs(np.array(local["biased"]) - np.array(local["plain"])).max() > 10 * score_error


def main() -> None:
    from kvcompose_gguf import CompositionPlan, KVCompose, Llama, add_rpc_server

    path, options, endpoints = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
    for endpoint in endpoints:
        add_rpc_server(endpoint)
    context, after = tiny.tokens(tiny.GQA, N), tiny.tokens(tiny.GQA, 40, seed=1)
    defaults = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "n_batch": 128}
    llama = Llama(path, **(defaults | options))
    session = llama.session

    def logits() -> list[float]:
        return list(np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),)).tolist())

    infos = [session._layer(il) for il in range(3)]
    out: dict[str, Any] = {"buffers": [i.buffer.decode() for i in infos], "device": [not i.k for i in infos]}
    for agg in ("max", "mean"):
        method = KVCompose(n_kept=50, agg_task=agg, scoring_chunk=128, max_score_bytes=400_000)
        out[agg] = np.stack(llama.observe(context, method).attention).tolist()
    window = KVCompose(n_kept=50, scoring="window", window=20)
    out["window"] = np.stack(llama.observe(context, window).attention).tolist()
    for what in ("queries", "outputs"):
        llama.prefill(context[:-16])
        with session.taps(what, 16):
            llama.prefill(context)
            out[what] = np.stack([session.tapped(what, il, 16) for il in range(3)]).tolist()
    rng = np.random.default_rng(3)
    cells = [
        np.stack([np.sort(rng.choice(N, n, replace=False)) for _ in range(2)]).astype(np.int32) for n in (60, N, 33)
    ]
    out["bytes_full"] = llama.kv_bytes
    session.compose(CompositionPlan(N, tuple(cells)), n_room=8)
    out["bytes"] = llama.kv_bytes
    out["rows"] = [llama.kv_cells(il).n_rows for il in range(3)]

    def outputs() -> list[Any]:
        with session.taps("outputs", 16):
            llama.eval(after[:16])
            tapped = [session.tapped("outputs", il, 16) for il in range(3)]
        llama.truncate(N)
        return np.stack(tapped).tolist()  # type: ignore[no-any-return]

    if options.get("type_v", 1) <= 1:  # quantized values cannot be biased
        out["plain"] = outputs()
        with llama.session.biased(list((5 * rng.normal(size=(3, 2, 33))).astype(np.float32))):
            out["biased"] = outputs()
    llama.eval(after)
    out["composed"] = logits()
    state = llama.save_state()
    llama.reset()
    llama.eval(context)
    out["full"] = logits()
    llama.load_state(state)
    llama.eval([7])
    out["loaded"] = logits()
    print(json.dumps(out))


if __name__ == "__main__":
    main()
