"""Checks behaviour when memory is short or a process runs for long."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import psutil
import pytest
from support import tiny
from support.processes import environment

from kvcompose_gguf import KVCompose

OUT_OF_MEMORY = """
import ctypes, json, resource, sys
import numpy as np
from support import tiny
from kvcompose_gguf import CompositionPlan, Llama, kernels
from kvcompose_gguf.kernels.compose import gather_function
from kvcompose_gguf.native import session as session_module

N = 3000
llama = Llama(sys.argv[1], n_ctx=16384, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, verbose=False, elastic=False)
context, after = tiny.tokens(tiny.GQA, N), tiny.tokens(tiny.GQA, 5, seed=1)
llama.context.prefill(context)
rng = np.random.default_rng(3)
cells = [np.stack([np.sort(rng.choice(N, n, replace=False)) for _ in range(2)]) for n in (600, 2500, 90)]
plan = CompositionPlan(N, tuple(c.astype(np.int32) for c in cells))
before = llama.kv_bytes
kernels.warm_up()

arguments = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 10
real = ctypes.CFUNCTYPE(None, *arguments)(gather_function().address)
n_calls = 0

def limit(n_bytes):
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes, resource.RLIM_INFINITY))

@ctypes.CFUNCTYPE(None, *arguments)
def gather(*args):
    # memory ends after the first layer, and is there again after the last: keys and values are two calls a layer
    global n_calls
    real(*args)
    n_calls += 1
    if n_calls == 2 and sys.argv[2] == "short":
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        limit(size - before // 3 + (1 << 18))  # the old layer will be freed
    if n_calls == 6:
        limit(resource.RLIM_INFINITY)

class Gather:
    address = ctypes.cast(gather, ctypes.c_void_p).value

session_module.gather_function = lambda: Gather
llama.session.compose(plan, n_room=8000)
out = {"calls": n_calls, "composed": llama.session.state().n_composed, "bytes": llama.kv_bytes, "before": before,
       "rows": [llama.kv_cells(il).n_rows for il in range(3)]}
llama.eval(after)
out["logits"] = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),)).tolist()
print(json.dumps(out))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_a_compose_without_memory_for_new_layers_loses_nothing(tiny_model):
    path = tiny_model(tiny.GQA)
    runs = {}
    for kind in ("enough", "short"):
        command = [sys.executable, "-c", OUT_OF_MEMORY, str(path), kind]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
        assert result.returncode == 0, result.stderr[-3000:]
        runs[kind] = json.loads(result.stdout.splitlines()[-1])
    enough, short = runs["enough"], runs["short"]
    print({key: value for key, value in short.items() if key != "logits"})
    assert enough["calls"] == short["calls"] == 6
    assert enough["composed"] == short["composed"] == 3000
    assert enough["bytes"] < 0.8 * enough["before"]
    assert short["rows"][1:] == [16384] * 2, "the limit was no limit, this test could not fail"
    assert short["rows"][0] == enough["rows"][0]
    assert np.abs(np.array(short["logits"]) - np.array(enough["logits"])).max() <= 1e-5


@pytest.mark.parametrize("scoring", ["repeat", "prefill"])
def test_two_hundred_rounds_leak_nothing(make_llama, scoring):
    method = KVCompose(compression_ratio=0.75, min_tokens=10, keep_last=0, scoring=scoring, scoring_chunk=128)
    llama = make_llama(method=method, flash_attn=True, type_k=1, type_v=1, n_batch=128)
    process = psutil.Process()

    def round_() -> int:
        for seed in range(10):
            llama.compress(tiny.tokens(tiny.GQA, 300, seed=seed))
            for token in range(5, 10):
                llama.eval([token])
            llama.reset()
        return int(process.memory_info().rss)

    round_()
    warm = round_()
    resident = [round_() for _ in range(20)]
    grown = (resident[-1] - warm) / 1e6
    print(f"{grown:+.2f} MB after 200 rounds, at most {(max(resident) - warm) / 1e6:+.2f} MB")
    assert grown <= 2


def test_scores_that_are_not_numbers_change_nothing(make_llama, monkeypatch):
    from kvcompose_gguf import ConfigError
    from kvcompose_gguf.native.session import KVSession

    real = KVSession.scores
    monkeypatch.setattr(KVSession, "scores", lambda self: [score * np.float32(np.nan) for score in real(self)])
    llama = make_llama(method=KVCompose(compression_ratio=0.5, min_tokens=10))
    context = tiny.tokens(tiny.GQA, 200)
    with pytest.raises(ConfigError, match="not finite"):
        llama.compress(context)
    state = llama.session.state()
    assert (state.n_composed, state.n_cells_used, state.scoring) == (0, 200, False)
