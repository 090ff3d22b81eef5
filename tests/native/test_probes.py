"""Compares taps, biases and rotations of the native library with the numpy twin."""

from __future__ import annotations

import numpy as np
import pytest
from support import tiny
from support.llamas import last_logits

from kvcompose_gguf import CompositionPlan, ConfigError, StateError, UnsupportedError
from kvcompose_gguf.native.rows import cached_rows
from kvcompose_gguf.scoring.requests import StateRequest

N = 80
CONTEXT = tiny.tokens(tiny.GQA, N)
QUERY = tiny.tokens(tiny.GQA, 24, seed=1)


def prefilled(make_llama, config=tiny.GQA, **kwargs):
    llama = make_llama(config, **kwargs)
    llama.context.prefill(CONTEXT)
    model = tiny.NumpyLlama(config)
    model.forward(CONTEXT)
    return llama, model


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_taps_have_the_queries_and_the_attention_outputs(make_llama, name, flash_attn):
    config = tiny.ARCHITECTURES[name]
    llama, model = prefilled(make_llama, config, flash_attn=flash_attn)
    tolerance = 2e-2 if flash_attn else 1e-4  # float16 keys and values, and what follows from them
    for what in ("queries", "outputs"):
        with llama.session.taps(what, len(QUERY)):
            llama.eval(QUERY)
            got = [llama.session.tapped(what, l, len(QUERY)) for l in range(config.n_layer)]
        model.truncate(N)
        model.forward(QUERY)
        want = {l: q / np.sqrt(config.n_embd_head) for l, q in model.q.items()} if what == "queries" else model.o
        difference = max(np.abs(got[l] - want[l]).max() for l in range(config.n_layer))
        assert difference < tolerance, f"{what}: the largest difference is {difference}"
        llama._ctx.kv_cache_seq_rm(-1, N, -1)
        llama.n_tokens = N


def test_taps_change_no_logits(make_llama):
    llama, _ = prefilled(make_llama)
    llama.eval(QUERY)
    want = last_logits(llama)
    llama.reset()
    llama.context.prefill(CONTEXT)
    with llama.session.taps("outputs", 8):
        llama.eval(QUERY)
    assert (last_logits(llama) == want).all()


def test_attention_outputs_of_a_composed_cache_equal_those_of_a_masked_one(make_llama):
    llama, model = prefilled(make_llama)
    rng = np.random.default_rng(0)
    visible = [rng.random((2, N)) < 0.5 for _ in range(3)]
    for v in visible:
        v[1] = rng.permutation(v[0])  # as many in each head
    llama.compose(CompositionPlan(N, tuple(np.stack([np.flatnonzero(h) for h in v]).astype(np.int32) for v in visible)))
    with llama.session.taps("outputs", len(QUERY)):
        llama.eval(QUERY)
        got = [llama.session.tapped("outputs", l, len(QUERY)) for l in range(3)]
    model.visible = visible
    model.forward(QUERY)
    difference = max(np.abs(got[l] - model.o[l]).max() for l in range(3))
    assert difference < 1e-4, f"the largest difference is {difference}"


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt-oss"])
def test_a_bias_of_minus_infinity_hides_rows_from_their_heads(make_llama, name, flash_attn):
    config = tiny.ARCHITECTURES[name]
    llama, model = prefilled(make_llama, config, flash_attn=flash_attn)
    rng = np.random.default_rng(0)
    visible: list[np.ndarray | None] = [None] * config.n_layer  # with a sliding window: as they are
    for layer, share in zip(llama.kv_layers, (0.2, 0.5, 0.9), strict=False):
        visible[layer.il] = rng.random((config.n_head_kv, N)) < share
    biases = [np.where(v, 0, -np.inf).astype(np.float32) for v in visible if v is not None]
    with llama.session.biased(biases):
        llama.eval(QUERY)
        got = last_logits(llama)
    model.visible = visible
    want = model.forward(QUERY)[0][-1]
    assert np.abs(got - want).max() < (5e-2 if flash_attn else 1e-3)
    llama._ctx.kv_cache_seq_rm(-1, N, -1)
    llama.n_tokens = N
    llama.eval(QUERY)
    model.visible = None
    model.truncate(N)
    assert np.abs(last_logits(llama) - model.forward(QUERY)[0][-1]).max() < (5e-2 if flash_attn else 1e-3)


def test_a_bias_is_added_to_the_logits_after_their_scaling(make_llama):
    """A bias of log(3) makes a key count as if it occurred three times."""
    llama, model = prefilled(make_llama)
    bias = np.zeros((2, N), np.float32)
    bias[:, 17] = np.log(3)
    with llama.session.biased([bias] * 3), llama.session.taps("outputs", 1):
        llama.eval(QUERY[:1])
        got = llama.session.tapped("outputs", 0, 1)[0]
    _, attention = model.forward(QUERY[:1])
    p = attention[0][:, 0].copy()
    p[:, 17] *= 3
    p /= p.sum(axis=1, keepdims=True)
    want = np.einsum("hk,khd->hd", p, np.repeat(model.v[0], 2, axis=1))
    assert np.abs(got - want).max() < 1e-5


def test_a_bias_of_quantized_values_is_refused(make_llama):
    llama, _ = prefilled(make_llama, tiny.WIDE, flash_attn=True, type_k=8, type_v=8)
    with pytest.raises(UnsupportedError, match="quantized values"), llama.session.biased([np.zeros((2, N))] * 3):
        pass
    with pytest.raises(ConfigError, match="biases"), llama.session.biased([np.zeros((3, N))] * 3):
        pass


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "phi3", "gemma3"])
def test_keys_rotated_back_are_the_keys_before_their_rotation(make_llama, name):
    config = tiny.ARCHITECTURES[name]
    llama, model = prefilled(make_llama, config, flash_attn=False)
    session = llama.session
    for l, layer in enumerate(session.layers):
        keys = cached_rows(session, l, "k", N)[0]
        plain = session.rope(l, keys, np.arange(N), inverse=True)
        rotated = tiny._rope(plain[:, None].astype(np.float64), np.arange(N), config.rope_base, config.neox)[:, 0]
        assert np.abs(rotated - model.k[layer.il][:, 0]).max() < 5e-3
        assert np.abs(session.rope(l, plain, np.arange(N)) - keys).max() < 1e-5


def test_rotating_is_its_own_inverse_with_yarn_and_with_quantized_keys(make_llama):
    rng = np.random.default_rng(0)
    yarn = make_llama(tiny.GQA, rope_scaling_type=2, rope_freq_scale=0.25, yarn_ext_factor=1.0)
    rows = rng.standard_normal((50, 32)).astype(np.float32)
    pos = np.arange(50) * 7
    with pytest.raises(UnsupportedError, match="not computed anything yet"):  # the graph tells how keys are rotated
        yarn.session.rope(0, rows, pos)
    yarn.eval(CONTEXT[:1])
    assert np.abs(yarn.session.rope(0, yarn.session.rope(0, rows, pos), pos, inverse=True) - rows).max() < 1e-5

    quantized = make_llama(tiny.WIDE, flash_attn=True, type_k=8, type_v=8)
    quantized.context.prefill(CONTEXT)
    model = tiny.NumpyLlama(tiny.WIDE)
    model.forward(CONTEXT)
    keys = cached_rows(quantized.session, 0, "k", N)[1]
    plain = quantized.session.rope(0, keys, np.arange(N), inverse=True)
    rotated = tiny._rope(plain[:, None].astype(np.float64), np.arange(N), tiny.WIDE.rope_base, False)[:, 0]
    assert np.abs(rotated - model.k[0][:, 1]).max() < 0.1
    assert np.abs(keys - model.k[0][:, 1]).max() > 1  # as they are stored they are something else


def test_wrong_arguments_are_refused(make_llama):
    llama, _ = prefilled(make_llama)
    session = llama.session
    with pytest.raises(ConfigError, match="n_tokens = 0"), session.taps("queries", 0):
        pass
    with pytest.raises(ConfigError, match="n_ubatch"), session.taps("queries", 1 << 20):
        pass
    with pytest.raises(StateError, match="off"):
        session.tapped("queries", 0, 1)
    with session.taps("queries", 4), pytest.raises(StateError, match="off"):
        session.tapped("outputs", 0, 1)
    with session.taps("queries", 4):
        with pytest.raises(ConfigError, match="floats"):
            session.tapped("queries", 0, 5)
        with pytest.raises(StateError, match="already"), session.taps("queries", 4):
            pass
    with pytest.raises(ConfigError, match="rows are"):
        session.rope(0, np.zeros((3, 31), np.float32), np.arange(3))
    with pytest.raises(ConfigError, match="n_rows"), session.biased([np.zeros((2, 1 << 20), np.float32)]):
        pass


def test_queries_are_the_same_however_many_tokens_are_computed_at_once(make_llama):
    asked = StateRequest(100)
    whole, pieces = (
        asked.collect(make_llama(tiny.GQA, n_batch=128, n_ubatch=n_ubatch).context, CONTEXT) for n_ubatch in (128, 32)
    )
    for one, other in zip(whole, pieces, strict=True):
        assert one.shape[1] == min(100, N)
        np.testing.assert_allclose(other, one, atol=1e-5)
