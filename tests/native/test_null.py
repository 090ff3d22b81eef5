"""Checks that without a compressor our library computes the same bits as an unpatched one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import tiny

ROOT = Path(__file__).resolve().parents[2]

GENERATE = """
import hashlib, json, sys
import numpy as np
import llama_cpp
path, n, flash, type_kv, threads = sys.argv[1], *map(int, sys.argv[2:])
flash = flash == 1
llama = llama_cpp.Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, flash_attn=flash, type_k=type_kv, type_v=type_kv,
                        verbose=False)
prompt = [int(t) for t in np.random.default_rng(0).integers(3, 259, 100)]
digest, tokens = hashlib.sha256(), []
for token in llama.generate(prompt, temp=0.0):
    logits = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),))
    digest.update(logits.tobytes())
    tokens.append(token)
    if len(tokens) == n:
        break
print(json.dumps({"patched": hasattr(llama_cpp.llama_cpp._lib, "llama_kvc_abi"), "tokens": tokens, "logits": digest.hexdigest()}))
"""


@pytest.fixture(scope="session")
def libraries() -> dict[str, Path]:
    """Returns the folders of the patched and the unpatched library; compiles the latter once into the user's cache."""
    from kvcompose_gguf.native import library

    script = [sys.executable, str(ROOT / "scripts" / "build_native.py"), "--stock"]
    out = subprocess.run(script, capture_output=True, text=True)
    if out.returncode:
        pytest.fail(f"the stock library could not be built: {out.stdout[-500:]}{out.stderr[-500:]}")
    return {"patched": library.library_dir(), "stock": Path(out.stdout.strip().splitlines()[-1].split(": ", 1)[1])}


def run_both(
    libraries: dict[str, Path], model: str, n: int, flash: bool, type_kv: int, threads: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for name, folder in libraries.items():
        env = os.environ | {"LLAMA_CPP_LIB_PATH": str(folder)}
        command = [sys.executable, "-c", GENERATE, model, *map(str, (n, int(flash), type_kv, threads))]
        results[name] = json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    assert results["patched"].pop("patched")
    assert not results["stock"].pop("patched")
    return results["patched"], results["stock"]


@pytest.mark.parametrize(("flash", "type_kv"), [(False, 0), (False, 1), (True, 1), (True, 8)])
def test_256_greedy_tokens_and_logits_are_bit_identical_on_a_tiny_model(libraries, tiny_model, flash, type_kv):
    ours, stock = run_both(libraries, str(tiny_model(tiny.WIDE)), 256, flash, type_kv, threads=1)
    assert ours == stock


@pytest.mark.model
@pytest.mark.parametrize("flash", [False, True])
def test_256_greedy_tokens_and_logits_are_bit_identical_on_smollm2(libraries, smollm2, flash):
    ours, stock = run_both(libraries, smollm2, 256, flash, 1, threads=2)
    assert ours == stock
