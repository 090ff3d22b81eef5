"""Runs the whole chain in its own process, for devices; prints scores, bytes and logits as JSON.

python -m support.chain MODEL OPTIONS [ENDPOINT …]
"""

from __future__ import annotations

import ctypes
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
    assert device["rows_again"] == local["rows_again"]
    for name in ("composed", "full", "loaded", "again", "joint"):
        error = np.abs(np.array(device[name]) - np.array(local[name])).max()
        print(f"{name}: largest difference {error:.2e}")
        assert error <= logit_error, f"{name}: {error:.2e}"
    assert np.abs(np.array(local["full"]) - np.array(local["composed"])).max() > 10 * logit_error
    if biased:
        assert np.abs(np.array(local["biased"]) - np.array(local["plain"])).max() > 10 * score_error


# llama_kvc_gather_t of llama-kvc.h
GATHER_T = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 10)


class CountedGather:
    """The compiled gather, and the number of its calls: it moves only rows in host memory."""

    def __init__(self) -> None:
        from kvcompose_gguf.kernels.compose import gather_function

        self.n_calls = 0
        self._gather = GATHER_T(gather_function().address)  # type: ignore[attr-defined]
        self._counted = GATHER_T(self._count)
        self.address = ctypes.cast(self._counted, ctypes.c_void_p).value

    def _count(self, *arguments: int) -> None:
        self.n_calls += 1
        self._gather(*arguments)


def main() -> None:
    from kvcompose_gguf import CompositionPlan, KVCompose, Llama, add_rpc_server
    from kvcompose_gguf.native import session as native_session
    from kvcompose_gguf.native.joint import decode_joint
    from support.llamas import step

    path, options, endpoints = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
    for endpoint in endpoints:
        add_rpc_server(endpoint)
    context, after = tiny.tokens(tiny.GQA, N), tiny.tokens(tiny.GQA, 40, seed=1)
    defaults = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "n_batch": 128}
    llama = Llama(path, **(defaults | options))
    session = llama.session
    gather = CountedGather()
    native_session.gather_function = lambda: gather  # type: ignore[assignment, attr-defined]

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

    for _ in range(3):
        n_rows = session.n_rows_used()
        kept = [np.sort(rng.permuted(np.tile(np.arange(n - 5), (2, 1)), axis=1)[:, : n // 2], axis=1) for n in n_rows]
        tails = [np.tile(np.arange(n - 5, n), (2, 1)) for n in n_rows]  # the newest tokens stay plain
        layers = tuple(np.concatenate(pair, axis=1).astype(np.int32) for pair in zip(kept, tails, strict=True))
        session.compose(CompositionPlan(llama.n_tokens, layers, tuple(n_rows), n_tail=5), n_room=8)
        llama.truncate(llama.n_tokens - 2)
        llama.eval(after[:20])
    out["again"] = logits()
    out["rows_again"] = session.n_rows_used()
    out["n_host_gathers"] = gather.n_calls
    other = Llama(path, weights_of=llama, **(defaults | options))
    other.eval(context[:50])
    decode_joint([step(each, 7) for each in (llama, other)])
    out["joint"] = [*logits(), *other.context.decoder.logits(1)[0].tolist()]
    print(json.dumps(out))


if __name__ == "__main__":
    main()
