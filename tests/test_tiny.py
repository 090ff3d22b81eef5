"""Checks that the numpy twins compute what llama.cpp computes, and that each of their features matters."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.llamas import last_logits
from support.tiny import ARCHITECTURES, REFUSED, NumpyLlama

from kvcompose_gguf import KVCompose, UnsupportedError

N, N_AFTER = 300, 4
CASES = [
    pytest.param(arch, swa_full, id=arch + (("-window-cache", "-full-cache")[swa_full] if config.n_swa else ""))
    for arch, config in ARCHITECTURES.items()
    for swa_full in ([False, True] if config.n_swa else [True])
]


@functools.cache
def twin(config: tiny.TinyConfig) -> np.ndarray:
    """Returns the logits after N tokens, and after each of N_AFTER more."""
    model = NumpyLlama(config)
    first = model.forward(tiny.tokens(config, N))[0][-1:]
    return np.concatenate([first, *(model.forward([token])[0] for token in tiny.tokens(config, N_AFTER, seed=1))])


@pytest.mark.parametrize(("arch", "swa_full"), CASES)
def test_logits_equal_llama_cpps(make_llama, arch, swa_full):
    config = ARCHITECTURES[arch]
    # 64 tokens per decode: a cache of the window alone has 256 cells and must evict
    llama = make_llama(config, n_ctx=512, n_batch=64, n_ubatch=64, n_threads=1, n_threads_batch=1, swa_full=swa_full)
    rows = []
    for ids in (tiny.tokens(config, N), *([token] for token in tiny.tokens(config, N_AFTER, seed=1))):
        llama.eval(ids)
        rows.append(last_logits(llama))
    want = twin(config)
    error = np.abs(np.stack(rows) - want).max() / want.std()
    print(f"{arch}: largest difference {error:.2e} of the logits' standard deviation")
    assert error <= 1e-3, f"largest difference {error:.2e}"


FEATURES: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"rope_base": 1e4}),
    ("mistral3", {"attn_temp_scale": 0.0}),
    ("mixtral", {"n_expert_used": 1}),
    ("qwen2", {"bias": "none"}),
    ("qwen2", {"neox": False}),
    ("qwen3", {"qk_norm": False}),
    ("gemma2", {"attn_softcap": 0.0}),
    ("gemma2", {"final_softcap": 0.0}),
    ("gemma2", {"post_norm": False}),
    ("gemma2", {"activation": "silu"}),
    ("gemma2", {"n_swa": 65}),
    ("gemma2", {"n_swa": 0}),
    ("gemma3", {"swa_period": 2}),
    ("gemma3", {"rope_base_swa": 1e6}),
    ("gpt-oss", {"sinks": False}),
    ("gpt-oss", {"bias": "qkv"}),
]


@pytest.mark.parametrize(("arch", "other"), FEATURES, ids=str)
def test_every_feature_is_seen_in_the_logits(arch, other):
    config = ARCHITECTURES[arch]
    want = twin(config)
    effect = np.abs(twin(replace(config, **other)) - want).max() / want.std()
    assert effect > 0.02, f"{other} changes logits by {effect:.2e} of their standard deviation only"


@pytest.mark.parametrize("arch", [arch for arch, config in ARCHITECTURES.items() if config.n_swa])
def test_a_layer_that_is_not_compressed_sees_its_window(arch):
    config = ARCHITECTURES[arch]
    n = 150
    context, after = tiny.tokens(config, n), tiny.tokens(config, 8, seed=1)
    full = NumpyLlama(config)
    full.forward(context)
    want, attention = full.forward(after)
    everything = np.ones((config.n_head_kv, n), dtype=bool)
    visible = [None if config.is_swa(il) else everything for il in range(config.n_layer)]
    for hidden, same in ((0, True), (50, False)):
        masked = NumpyLlama(config, [v if v is None else v & (np.arange(n) >= hidden) for v in visible])
        masked.forward(context)
        assert np.array_equal(masked.forward(after)[0], want) == same
    first = n + 7 - (config.n_swa - 1)  # that the last query sees through a window
    for il, p in enumerate(attention):
        assert (p[:, -1, first:] > 0).all()
        assert (p[:, -1, :first] > 0).any() != config.is_swa(il)


@pytest.mark.parametrize("arch", REFUSED)
def test_models_without_a_plain_cache_run_but_are_refused(make_llama, arch):
    llama = make_llama(REFUSED[arch], n_ctx=512, n_threads=1, n_threads_batch=1)
    llama.eval(tiny.tokens(REFUSED[arch], 20))
    assert np.isfinite(last_logits(llama)).all()
    assert last_logits(llama).std() > 0.01
    with pytest.raises(UnsupportedError):
        llama.kv_compressor = KVCompose(compression_ratio=0.5)
