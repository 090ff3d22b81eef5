"""The cache of a Llama: what may be done to it when it is compressed, and what is left of it after an error."""

from __future__ import annotations

import signal
import threading

import numpy as np
import pytest
from support import tiny
from support.llamas import greedy, last_logits

from kvcompose_gguf import (
    CompositionPlan,
    ContextLengthError,
    KVCompose,
    StateError,
)
from kvcompose_gguf.llama_base import llama_cpp

N = 300
METHOD = KVCompose(compression_ratio=0.5, min_tokens=100, keep_last=8)
CONTEXT = tiny.tokens(tiny.GQA, N)
AFTER = tiny.tokens(tiny.GQA, 20, seed=9)


def test_reset_gives_a_full_cache_back(make_llama):
    llama = make_llama(method=METHOD, elastic=False)
    full = llama.kv_bytes
    llama.compress(CONTEXT)
    assert llama.kv_bytes < full
    llama.reset()
    llama.eval(CONTEXT)
    want = tiny.NumpyLlama(tiny.GQA).forward(CONTEXT)[0][-1]
    assert np.abs(last_logits(llama) - want).max() <= 1e-3
    assert llama.kv_bytes == full


class Boom(Exception):
    pass


def test_an_exception_while_scoring_leaves_a_usable_object(make_llama, monkeypatch):
    llama = make_llama(
        method=KVCompose(compression_ratio=0.5, min_tokens=100, keep_last=8, scoring="repeat", scoring_chunk=64)
    )
    decode = llama._ctx.decode
    calls = []

    def failing(batch):
        calls.append(1)
        if len(calls) == 4:  # one prefill decode, then the third scoring chunk
            raise Boom
        decode(batch)

    monkeypatch.setattr(llama._ctx, "decode", failing)
    with pytest.raises(Boom):
        greedy(llama, CONTEXT, 12)
    state = llama.session.state()
    assert not state.scoring
    assert state.n_cells_used == N - 8
    assert state.n_composed == 0
    assert greedy(llama, CONTEXT, 12) == greedy(
        make_llama(
            method=KVCompose(compression_ratio=0.5, min_tokens=100, keep_last=8, scoring="repeat", scoring_chunk=64)
        ),
        CONTEXT,
        12,
    )
    assert llama.kv_report.n_prefilled == 0  # the context was still there


def test_ctrl_c_while_compressing_leaves_a_usable_object(make_llama):
    llama = make_llama(method=KVCompose(compression_ratio=0.5, min_tokens=100, scoring_chunk=16), n_ctx=4096)
    context = tiny.tokens(tiny.GQA, 2000)

    # a process started in the background ignores SIGINT from its beginning
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.4, lambda: signal.raise_signal(signal.SIGINT))

    def compress_again_and_again() -> None:
        timer.start()
        for _ in range(100):
            llama.reset()
            llama.compress(context)

    try:
        with pytest.raises(KeyboardInterrupt):
            compress_again_and_again()
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
    assert not llama.session.state().scoring
    llama.reset()
    assert greedy(llama, CONTEXT[:90], 5) == greedy(make_llama(), CONTEXT[:90], 5)


def test_eval_never_compresses_and_refuses_positions_inside(make_llama):
    llama = make_llama(method=METHOD)
    llama.eval(CONTEXT)
    assert llama.session.state().n_composed == 0
    llama.compress(CONTEXT)
    llama.n_tokens = 100
    with pytest.raises(StateError, match="100"):
        llama.eval([5])


@pytest.mark.parametrize("flash_attn", [False, True], ids=["transposed-v", "flash"])
def test_the_state_of_a_compressed_cache_round_trips(make_llama, flash_attn):
    llama = make_llama(method=METHOD, flash_attn=flash_attn)
    greedy(llama, CONTEXT, 8)
    cells = [llama.kv_cells(il) for il in range(3)]
    prompt = CONTEXT + tiny.tokens(tiny.GQA, 20, seed=6)
    state = llama.save_state()
    want = greedy(llama, prompt, 20)

    other = make_llama(method=METHOD, flash_attn=flash_attn)
    other.load_state(state)
    assert [other.kv_cells(il) for il in range(3)] == cells
    assert greedy(other, prompt, 20) == want
    assert other.kv_report is state.kv_report  # the state's, nothing was compressed anew
    # decoding goes on, beyond the room that was saved
    for start in range(0, 400, 50):
        other.eval(tiny.tokens(tiny.GQA, 50, seed=start))
    other.reset()
    assert greedy(other, CONTEXT[:60], 4) == greedy(make_llama(flash_attn=flash_attn), CONTEXT[:60], 4)


def test_a_state_that_does_not_fit_is_refused_and_the_object_stays_usable(make_llama):
    llama = make_llama(method=METHOD)
    llama.compress(CONTEXT)
    state = llama.save_state()
    small = make_llama(method=METHOD, n_ctx=256)
    with pytest.raises(StateError, match="context"):
        small.load_state(state)
    other = make_llama(tiny.MHA, method=METHOD)
    with pytest.raises(StateError):
        other.load_state(state)
    state.llama_state = state.llama_state[:5000]
    state.llama_state_size = 5000
    with pytest.raises(StateError):
        llama.load_state(state)
    assert greedy(llama, CONTEXT, 8) == greedy(make_llama(method=METHOD), CONTEXT, 8)


def test_a_prompt_cache_holds_compressed_states(make_llama):
    llama = make_llama(method=METHOD)
    llama.set_cache(llama_cpp.LlamaRAMCache())
    text = "The keeper of the tower writes the weather down every morning and every evening. " * 3
    first = llama.create_completion(text, max_tokens=6, temperature=0.0)["choices"][0]["text"]
    report = llama.kv_report
    llama.create_completion("Something else entirely.", max_tokens=6)
    assert llama.kv_report is None  # of a prompt that is too short
    assert llama.session.state().n_composed == 0
    assert llama.create_completion(text, max_tokens=6, temperature=0.0)["choices"][0]["text"] == first
    assert llama.kv_report is report  # the compressed state came back, the prompt was not prefilled again


def test_save_and_load_state_work_around_a_compression(make_llama):
    llama = make_llama(method=METHOD)
    llama.eval(CONTEXT)
    state = llama.save_state()
    llama.compress(CONTEXT)
    llama.load_state(state)
    assert llama.session.state().n_composed == 0
    llama.eval([9])
    want = tiny.NumpyLlama(tiny.GQA).forward([*CONTEXT, 9])[0][-1]
    assert np.abs(last_logits(llama) - want).max() <= 1e-3


def test_a_second_compose_is_refused_and_loses_nothing(make_llama):
    llama = make_llama(method=KVCompose(compression_ratio=0.5, min_tokens=100, keep_last=0))
    llama.compress(CONTEXT)
    llama.eval(AFTER)
    n = len(CONTEXT) + len(AFTER)
    with pytest.raises(StateError, match=f"compressed already, from {len(CONTEXT)}"):
        llama.compose(CompositionPlan.keep_all(n, [2, 2, 2]))
    llama.truncate(len(CONTEXT))
    assert llama.n_tokens == len(CONTEXT)


def test_what_does_not_fit_is_refused_before_it_is_evaluated(make_llama):
    llama = make_llama(n_ctx=512)
    with pytest.raises(ContextLengthError, match="600 tokens do not fit into n_ctx=512"):
        llama.prefill(tiny.tokens(tiny.GQA, 600))
    llama.prefill(CONTEXT[:300])
    with pytest.raises(ContextLengthError, match=r"300 \+ 213 tokens do not fit into n_ctx=512"):
        llama.eval_logits(CONTEXT[:213])
    assert llama.n_tokens == llama.session.state().n_cells_used == 300
    assert llama.eval_logits(CONTEXT[:212]).shape == (212, tiny.GQA.n_vocab)


def test_only_what_is_there_can_be_truncated(make_llama):
    llama = make_llama(method=KVCompose(compression_ratio=0.5, min_tokens=100, keep_last=0))
    llama.compress(CONTEXT)
    llama.eval(AFTER)
    for n_tokens in (len(CONTEXT) - 1, len(CONTEXT) + len(AFTER) + 1):
        with pytest.raises(StateError, match=f"n_tokens={n_tokens} is not in"):
            llama.truncate(n_tokens)
    llama.truncate(len(CONTEXT) + 1)
    windowed = make_llama(tiny.ARCHITECTURES["gemma3"])
    windowed.prefill(CONTEXT)
    with pytest.raises(StateError, match=f"n_tokens={len(CONTEXT) - 1}: this cache cannot remove only its last tokens"):
        windowed.truncate(len(CONTEXT) - 1)
    windowed.truncate(len(CONTEXT))


def test_logits_after_a_reset_are_those_of_an_empty_cache(make_llama):
    for elastic in (False, True):
        llama = make_llama(elastic=elastic)
        want = llama.eval_logits(AFTER)
        llama.prefill(CONTEXT)
        llama.reset()
        assert np.abs(llama.eval_logits(AFTER) - want).max() < 1e-4
