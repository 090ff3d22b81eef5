"""Checks that an elastic cache gives the same answers as a fixed one in fewer bytes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support import tiny
from support.llamas import F16, Q8_0, greedy, last_logits

from kvcompose_gguf import ConfigError, ContextLengthError, KVCompose, NativeError
from kvcompose_gguf.llama_base import llama_cpp

CONTEXT = tiny.tokens(tiny.GQA, 900)
CACHES = [
    pytest.param({"flash_attn": False}, id="transposed-v"),
    pytest.param({"flash_attn": True, "type_k": F16, "type_v": F16}, id="flash"),
    pytest.param({"flash_attn": True, "type_k": Q8_0, "type_v": Q8_0}, id="q8_0"),
]


def rows(llama) -> list[int]:
    return [llama.kv_cells(il).n_rows for il in range(3)]


def test_a_large_context_starts_small(make_llama):
    llama = make_llama(n_ctx=32768)
    row = llama.session.layers[0].n_bytes_row
    assert rows(llama) == [256] * 3
    assert llama.kv_bytes == 3 * 256 * row
    assert make_llama(n_ctx=32768, elastic=False).kv_bytes == 3 * 32768 * row


@pytest.mark.parametrize("cache", CACHES)
def test_logits_equal_those_of_a_fixed_cache_to_the_bit(make_llama, cache):
    small, fixed = (make_llama(n_ctx=2048, n_batch=128, elastic=elastic, **cache) for elastic in (True, False))
    seen = set()
    for start in range(0, 800, 100):
        for llama in (small, fixed):
            llama.eval(CONTEXT[start : start + 100])
        seen.add(rows(small)[0])
        assert np.array_equal(last_logits(small), last_logits(fixed))
    for token in CONTEXT[800:830]:
        for llama in (small, fixed):
            llama.eval([token])
        assert np.array_equal(last_logits(small), last_logits(fixed))
    assert len(seen) >= 3  # it has grown in steps
    assert rows(small)[0] < 2048 == rows(fixed)[0]


def test_a_prompt_is_made_room_for_at_once_and_given_back_at_reset(make_llama):
    llama = make_llama(n_ctx=4096)
    llama.eval(CONTEXT)
    assert rows(llama) == [1280] * 3  # 900 tokens and room for 256, rounded up
    llama.reset()
    assert rows(llama) == [256] * 3
    llama.eval(CONTEXT[:20])
    want = tiny.NumpyLlama(tiny.GQA).forward(CONTEXT[:20])[0][-1]
    assert np.abs(last_logits(llama) - want).max() <= 1e-3


def test_it_shrinks_when_composed_and_grows_again_while_decoding(make_llama):
    method = KVCompose(n_kept=100, scoring="repeat", min_tokens=10, n_room=32, keep_last=0)
    llama = make_llama(n_ctx=2048, method=method, elastic=True)
    llama.compress(CONTEXT)
    composed = llama.kv_bytes
    assert composed < 0.3 * 3 * 900 * llama.session.layers[0].n_bytes_row
    kept = llama.kv_report.n_kept
    n_decoded = 0
    for token in tiny.tokens(tiny.GQA, 400, seed=9):
        llama.eval([token])
        n_decoded += 1
    assert llama.kv_bytes > composed
    assert all(n >= kept[il] + n_decoded for il, n in enumerate(rows(llama)))
    llama.reset()
    assert rows(llama) == [256] * 3


def test_the_whole_context_can_be_filled(make_llama):
    llama = make_llama(n_ctx=512, n_batch=64)
    llama.eval(CONTEXT[:512])
    assert rows(llama) == [512] * 3
    with pytest.raises(ContextLengthError):
        llama.eval([7])
    with pytest.raises(NativeError):
        llama.context.decoder.decode([7], 512, "last")
    want = tiny.NumpyLlama(tiny.GQA).forward(CONTEXT[:512])[0][-1]
    llama._ctx.kv_cache_seq_rm(-1, 511, -1)
    llama.n_tokens = 511
    llama.eval(CONTEXT[511:512])
    assert np.abs(last_logits(llama) - want).max() <= 1e-3


def test_more_room_than_the_context_has_is_refused(make_llama):
    llama = make_llama(n_ctx=512)
    with pytest.raises(ConfigError, match="n_cells = 513"):
        llama.session.reserve(513)
    assert rows(llama) == [256] * 3


@pytest.mark.parametrize("flash_attn", [False, True])
def test_a_position_shift_moves_the_existing_cells(make_llama, flash_attn):
    logits = []
    for elastic in (True, False):
        llama = make_llama(n_ctx=2048, flash_attn=flash_attn, elastic=elastic)
        llama.eval(CONTEXT[:300])
        llama._ctx.kv_cache_seq_rm(0, 10, 60)
        llama._ctx.kv_cache_seq_shift(0, 60, 300, -50)
        llama.n_tokens = 250
        llama.eval(CONTEXT[300:310])
        logits.append(last_logits(llama))
    assert np.array_equal(logits[0], logits[1])


@pytest.mark.parametrize("flash_attn", [False, True])
def test_states_of_any_length_can_be_loaded(make_llama, flash_attn):
    long = make_llama(n_ctx=2048, flash_attn=flash_attn)
    long.eval(CONTEXT)
    state = long.save_state()
    long.eval([7])
    want = last_logits(long)
    fresh = make_llama(n_ctx=2048, flash_attn=flash_attn)
    fresh.eval(CONTEXT[:5])
    fresh.load_state(state)
    assert rows(fresh) == [1024] * 3
    fresh.eval([7])
    assert np.array_equal(last_logits(fresh), want)


def test_the_state_of_one_sequence_can_be_loaded_too(make_llama):
    long, fresh = make_llama(n_ctx=2048), make_llama(n_ctx=2048)
    long.eval(CONTEXT)
    size = llama_cpp.llama_state_seq_get_size(long.ctx, 0)
    buffer = (llama_cpp.ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(long.ctx, buffer, size, 0) == size
    assert llama_cpp.llama_state_seq_set_data(fresh.ctx, buffer, size, 0) == size
    fresh.n_tokens = 900
    for llama in (long, fresh):
        llama.eval([7])
    assert np.array_equal(last_logits(long), last_logits(fresh))


def test_models_that_cannot_be_compressed_grow_as_well(make_llama):
    config = tiny.REFUSED["bloom"]
    prompt = tiny.tokens(config, 600)
    logits = []
    for elastic in (True, False):
        llama = make_llama(config, n_ctx=2048, elastic=elastic)
        llama.eval(prompt)
        logits.append(last_logits(llama))
    assert np.array_equal(logits[0], logits[1])


def test_embedding_contexts_do_not_shrink_and_grow_with_every_text(make_llama):
    text = "x y" * 200
    vectors = [make_llama(n_ctx=2048, embedding=True, elastic=elastic).embed(text) for elastic in (True, False)]
    assert np.array_equal(*vectors)


@pytest.mark.parametrize("flash_attn", [False, True])
def test_a_damaged_state_of_a_sequence_is_refused_and_the_cache_goes_on(make_llama, flash_attn):
    llama = make_llama(n_ctx=4096, flash_attn=flash_attn)
    llama.eval(CONTEXT)
    size = llama_cpp.llama_state_seq_get_size(llama.ctx, 0)
    buffer = (llama_cpp.ctypes.c_uint8 * size)()
    llama_cpp.llama_state_seq_get_data(llama.ctx, buffer, size, 0)
    fresh = make_llama(n_ctx=4096, flash_attn=flash_attn)
    for cut in (size - 100, size // 2, 40):
        assert llama_cpp.llama_state_seq_set_data(fresh.ctx, buffer, cut, 0) == 0
    fresh.reset()
    fresh.eval(CONTEXT[:20])
    want = tiny.NumpyLlama(tiny.GQA).forward(CONTEXT[:20])[0][-1]
    assert np.abs(last_logits(fresh) - want).max() <= (1e-3 if not flash_attn else 2e-2)


def test_generation_does_not_notice(make_llama):
    config = dataclasses.replace(tiny.GQA, seed=11)
    prompt = tiny.tokens(config, 240)
    texts = [greedy(make_llama(config, n_ctx=1024, elastic=elastic), prompt, 60) for elastic in (True, False)]
    assert texts[0] == texts[1]
