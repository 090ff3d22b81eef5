"""Tests Llama objects that are closed or have an open stream, and what another method or an empty prompt does to one."""

from __future__ import annotations

import gc
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import tiny
from support.llamas import greedy

from kvcompose_gguf import KVCompose, StateError
from kvcompose_gguf.methods import SnapKV

CONFIG = tiny.GQA
CONTEXT = tiny.tokens(CONFIG, 292, seed=5)
QUESTION = tiny.tokens(CONFIG, 9, seed=6)
HALF = KVCompose(compression_ratio=0.5, scoring="repeat", min_tokens=100, keep_last=0)


def public_names(cls: type) -> list[str]:
    return [name for name in dir(cls) if not name.startswith("_") and name != "close"]


#
# closed
#


def test_every_public_attribute_of_a_closed_llama_raises(make_llama):
    llama = make_llama(method=HALF)
    llama.compress(CONTEXT)
    instance = [name for name in vars(llama) if not name.startswith("_")]
    llama.close()
    names = sorted({*public_names(type(llama)), *instance})
    assert {"kv_bytes", "kv_cells", "compress", "save_state", "n_tokens", "ctx", "tokenize", "metadata"} <= set(names)
    for name in names:
        with pytest.raises(StateError, match="closed"):
            getattr(llama, name)
    for call in (lambda: llama("x"), lambda: pickle.dumps(llama), llama.__enter__):
        with pytest.raises(StateError, match="closed"):
            call()
    assert repr(llama) == "<closed Llama>"
    llama.close()


def test_methods_that_were_taken_before_the_end_raise_after_it(make_llama):
    llama = make_llama(method=HALF)
    taken = {name: getattr(llama, name) for name in public_names(type(llama)) if callable(getattr(llama, name))}
    llama.close()
    arguments: dict[str, tuple[Any, ...]] = {
        "kv_cells": (0,), "compress": (CONTEXT,), "tokenize": (b"x",), "detokenize": ([1],), "piece": (1,), "eval": ([1],),
        "create_completion": ([1],), "create_chat_completion": ([],), "embed": ("x",), "create_embedding": ("x",),
        "prefill": ([1],), "load_state": (None,), "load_session": ("x",), "save_session": ("x",), "truncate": (0,),
        "eval_logits": ([1],), "is_end": (1,), "observe": ([1], HALF), "compose": (None,), "write_values": ([],),
        "create_chat_completion_openai_v1": ([],), "generate": ([1],), "prompt_tokens": ("x",),
    }  # fmt: skip
    harmless = {"set_cache", "set_seed", "from_pretrained", "logits_to_logprobs", "longest_token_prefix"}
    for name in taken.keys() - harmless:
        with pytest.raises(StateError, match="closed"):
            taken[name](*arguments.get(name, ()))


def test_what_outlives_a_llama_raises_too(make_llama):
    llama = make_llama(method=HALF)
    tokens, stream = llama.generate([*CONTEXT, *QUESTION]), llama.create_completion(QUESTION, stream=True, max_tokens=9)
    evidence = llama.observe(CONTEXT, HALF)
    next(tokens)
    session, tokenizer, context = llama.session, llama.tokenizer(), llama.context
    llama.close()
    calls: list[Callable[[], Any]] = [
        lambda: next(tokens), lambda: next(stream), session.state, lambda: session.cells(0), lambda: session.stored(0, "k"),
        lambda: tokenizer.encode("x"), lambda: context.prefill(CONTEXT, True), lambda: evidence.keys(0),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(StateError, match="closed"):
            call()
    tokens.close()


def test_what_outlives_a_deleted_llama_raises(tiny_model):
    program = """
import sys
from kvcompose_gguf import KVCompose, Llama, StateError
llama = Llama(sys.argv[1], n_ctx=512, verbose=False, kv_compressor=KVCompose(compression_ratio=0.5))
session = llama.session
del llama
try:
    session.state()
except StateError as error:
    print("StateError:", error)
"""
    run = subprocess.run([sys.executable, "-c", program, str(tiny_model(CONFIG))], capture_output=True, text=True)
    assert (run.returncode, run.stdout.split(":")[0]) == (0, "StateError"), run.stderr


def test_a_with_block_closes_at_its_end(make_llama):
    with make_llama() as llama:
        assert len(greedy(llama, QUESTION, 2)) == 2
    with pytest.raises(StateError, match="closed"):
        llama.n_ctx()


def test_a_generator_keeps_its_deleted_llama_alive(make_llama, tiny_model):
    from kvcompose_gguf import Llama

    llama = Llama(str(tiny_model(CONFIG)), n_ctx=512, n_threads=1, verbose=False)
    want = greedy(llama, QUESTION, 6)
    llama.reset()
    tokens = llama.generate(QUESTION, temp=0.0)
    del llama
    gc.collect()
    assert [next(tokens) for _ in range(6)] == want


#
# streams
#


def test_a_call_that_changes_the_cache_waits_for_no_stream_but_says_so(make_llama):
    llama = make_llama(method=HALF)
    want = greedy(llama, QUESTION, 6)
    llama.reset()
    stream = llama.generate(QUESTION, temp=0.0)
    first = [next(stream), next(stream)]
    changes: list[Callable[[], Any]] = [
        lambda: llama.compress(CONTEXT), llama.reset, lambda: llama.eval([1]), lambda: llama(QUESTION),
        lambda: next(llama.generate(QUESTION)), lambda: setattr(llama, "kv_compressor", None),
        lambda: llama.create_completion(QUESTION, stream=True), lambda: llama.load_state(None), lambda: llama.truncate(0),
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(StateError, match="stream"):
            change()
    assert llama.kv_bytes > 0  # reading is allowed
    assert llama.save_state().n_tokens == llama.n_tokens
    assert llama.tokenize(b"a", add_bos=False) is not None
    assert first + [next(stream) for _ in range(4)] == want
    stream.close()
    llama.reset()


def test_a_stream_that_ends_or_is_dropped_gives_the_cache_back(make_llama):
    llama = make_llama()
    for _ in llama.create_completion(QUESTION, stream=True, max_tokens=3):
        pass
    llama.reset()
    next(llama.create_completion(QUESTION, stream=True, max_tokens=3))  # the stream is dropped at once
    llama.reset()
    broken = llama.create_completion(QUESTION, stream=True, max_tokens=3, stopping_criteria=_fails)
    with pytest.raises(ZeroDivisionError):
        list(broken)
    llama.reset()


def _fails(*_: Any) -> bool:
    raise ZeroDivisionError


def test_a_stream_in_one_thread_refuses_another_threads_completion(make_llama):
    llama = make_llama()
    stream = llama.create_completion(QUESTION, stream=True, max_tokens=5, temperature=0)
    chunks = [next(stream)]
    with ThreadPoolExecutor(1) as pool, pytest.raises(StateError, match="a stream of this Llama is open"):
        pool.submit(llama.create_completion, QUESTION).result()
    assert len(chunks + list(stream)) >= 2


def test_a_processor_that_asks_its_own_llama_is_inside_of_the_stream(make_llama):
    llama = make_llama()
    seen = []

    def criterion(*_: Any) -> bool:
        seen.append((llama.kv_bytes, llama.n_ctx(), llama.save_state().n_tokens))
        return False

    llama.create_completion(QUESTION, max_tokens=2, stopping_criteria=criterion)
    assert len(seen) >= 2


#
# another method
#


@pytest.mark.parametrize(
    "other",
    [
        SnapKV(compression_ratio=0.5, min_tokens=100),
        KVCompose(compression_ratio=0.75, scoring="repeat", min_tokens=100, keep_last=0),
        None,
    ],
)
def test_another_method_reads_the_same_prompt_anew(make_llama, other):
    llama = make_llama(method=HALF)
    prompt = [*CONTEXT, *QUESTION]
    greedy(llama, prompt, 3)
    before = llama.kv_report
    llama.kv_compressor = other
    got = greedy(llama, prompt, 3)
    fresh = make_llama(method=other)
    assert got == greedy(fresh, prompt, 3)
    if other is None:
        assert (llama.kv_report, llama.n_context) == (None, 0)
    else:
        assert llama.kv_report is not before
        assert llama.kv_report.n_kept.tolist() == fresh.kv_report.n_kept.tolist()
    assert llama.kv_bytes == fresh.kv_bytes


def test_the_same_method_again_or_other_thresholds_read_nothing_anew(make_llama):
    llama = make_llama(method=HALF)
    llama.compress(CONTEXT)
    report = llama.kv_report
    llama.kv_compressor = KVCompose(compression_ratio=0.5, scoring="repeat", min_tokens=50, keep_last=8)
    greedy(llama, [*CONTEXT, *QUESTION], 2)
    assert llama.kv_report is report


def test_a_plan_applied_by_hand_is_kept_until_the_method_changes(make_llama):
    llama = make_llama()
    evidence = llama.observe(CONTEXT, HALF)
    llama.compose(HALF.plan(evidence))
    greedy(llama, [*CONTEXT, *QUESTION], 2)
    assert llama.n_context == 292
    llama.kv_compressor = SnapKV(compression_ratio=0.5, min_tokens=100)
    greedy(llama, [*CONTEXT, *QUESTION], 2)
    assert llama.kv_report is not None


#
# empty prompts
#


def test_an_empty_prompt_is_refused_and_loses_nothing(make_llama):
    from kvcompose_gguf import ConfigError

    llama = make_llama()
    greedy(llama, QUESTION, 2)
    held = llama.context.tokens
    for call in (lambda: llama([]), lambda: next(llama.generate([])), lambda: list(llama([], stream=True))):
        with pytest.raises(ConfigError, match="the prompt is empty"):
            call()
    llama.kv_compressor = HALF
    with pytest.raises(ConfigError, match="empty"):
        llama.compress([])
    assert llama.context.tokens == held


def test_every_public_method_of_llama_is_guarded():
    from kvcompose_gguf import Llama

    free = {"set_cache", "set_seed", "from_pretrained", "logits_to_logprobs", "longest_token_prefix", "close"}
    for name in public_names(Llama):
        member = inspect.getattr_static(Llama, name)
        function = member.fget if isinstance(member, property) else member
        if name in free or not inspect.isfunction(function):
            continue
        is_plain = name in {
            "ctx",
            "model",
            "eval_tokens",
            "kv_compressor",
            "n_context",
            "generate",
            "n_tokens",
            "input_ids",
            "kv_report",
        }
        assert is_plain or hasattr(function, "__wrapped__"), f"{name} is not guarded"
