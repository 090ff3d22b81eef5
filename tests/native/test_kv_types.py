"""Checks every type that llama.cpp stores keys and values in: rows are moved as bytes, whatever they mean."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support import tiny
from support.llamas import TYPES, last_logits, stored_rows

from kvcompose_gguf import CompositionPlan, KVCompose

N = 160
CONFIG = tiny.WIDE  # heads of 64: quantized rows are Hadamard-rotated
PLAN = CompositionPlan(N, tuple(np.stack([np.sort(np.random.default_rng(10 * il + h).choice(N, n, replace=False)) for h in range(2)]).astype(np.int32) for il, n in enumerate((90, N, 33))))  # fmt: skip

ALL = [(k, v, flash) for flash in (False, True) for k, v in itertools.product(TYPES, TYPES)]
QUANTIZED = tuple(name for name in TYPES if name.startswith(("q", "i")))


def accepted(k: str, v: str, flash_attn: bool) -> bool:
    """llama.cpp's own rule (llama-context.cpp): quantized values need flash attention."""
    return flash_attn or v not in QUANTIZED


@pytest.mark.parametrize(("k", "v", "flash_attn"), [case for case in ALL if accepted(*case)])
def test_composing_moves_bytes_and_the_model_goes_on(make_llama, k, v, flash_attn):
    llama = make_llama(CONFIG, type_k=TYPES[k], type_v=TYPES[v], flash_attn=flash_attn)
    llama.context.prefill(tiny.tokens(CONFIG, N))
    before = [[stored_rows(llama, il, which).copy() for which in "kv"] for il in range(3)]
    llama.session.compose(PLAN, n_room=16)
    for il, cells in enumerate(PLAN.rows):
        for was, which in zip(before[il], "kv", strict=True):
            now = stored_rows(llama, il, which)
            for h in range(2):
                assert np.array_equal(now[h, : cells.shape[1]], was[h, cells[h]])
    llama.eval([5])
    assert np.isfinite(last_logits(llama)).all()


@pytest.mark.parametrize("name", TYPES)
def test_the_whole_chain_runs_on_one_type(make_llama, name):
    flash_attn = name in QUANTIZED
    method = KVCompose(compression_ratio=0.5, scoring="repeat", keep_last=0, n_sink=0)
    context, after = tiny.tokens(CONFIG, 300), tiny.tokens(CONFIG, 20, seed=1)
    options = {"type_k": TYPES[name], "type_v": TYPES[name], "flash_attn": flash_attn}
    llama = make_llama(CONFIG, method, **options)
    report = llama.compress(context)
    assert report.kv_bytes_kept <= 0.501 * report.kv_bytes_full
    # a loose bound for random weights: it catches a wrong layout, not a small loss
    least = {"f32": 0.999, "f16": 0.99, "bf16": 0.99, "q8_0": 0.97}.get(name, 0.75)
    exact = make_llama(CONFIG, method)
    exact.compress(context)
    assert np.corrcoef(report.n_kept, exact.kv_report.n_kept)[0, 1] > least
    for model in (llama, exact):
        model.eval(after)
    assert np.corrcoef(last_logits(llama), last_logits(exact))[0, 1] > least


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_values_without_flash_attention_are_llama_cpps_own_refusal(make_llama, name):
    with pytest.raises(ValueError, match="Failed to create"):
        make_llama(CONFIG, type_k=TYPES[name], type_v=TYPES[name], flash_attn=False)


@pytest.mark.parametrize("name", TYPES)
def test_norms_of_stored_values_survive_the_rotation(make_llama, name):
    """Quantized keys and values are stored Hadamard-rotated, an orthogonal map: norms are kept, elements are not."""
    from kvcompose_gguf.native.rows import cached_rows

    context = tiny.tokens(CONFIG, N)
    llama = make_llama(CONFIG, type_k=TYPES[name], type_v=TYPES[name], flash_attn=True)
    llama.context.prefill(context)
    got = np.linalg.norm(cached_rows(llama.session, 0, "v", N), axis=2)
    model = tiny.NumpyLlama(CONFIG)
    model.forward(context)
    want = np.linalg.norm(model.v[0], axis=2).T
    error = np.abs(got / want - 1).max()
    assert error <= {"f32": 1e-5, "f16": 1e-3, "bf16": 1e-2, "q8_0": 1e-2}.get(name, 0.1), f"{error:.2e}"
