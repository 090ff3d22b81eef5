"""Tests Llama objects that threads share."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from support import tiny
from support.llamas import greedy

from kvcompose_gguf import KVCompose, KVComposeError, StateError
from kvcompose_gguf.access import Access
from kvcompose_gguf.methods import KNorm

CONFIG = tiny.GQA
QUESTION = tiny.tokens(CONFIG, 9, seed=6)
HALF = KVCompose(compression_ratio=0.5, scoring="repeat", min_tokens=100, keep_last=0)


@contextlib.contextmanager
def held_completion(llama: Any, pool: ThreadPoolExecutor) -> Iterator[Future[Any]]:
    """A completion of another thread that is held in the middle until the end of the ``with``."""
    inside, go_on = threading.Event(), threading.Event()

    def gate(*_: Any) -> bool:
        inside.set()
        assert go_on.wait(60)
        return False

    completion = pool.submit(llama.create_completion, QUESTION, max_tokens=1, stopping_criteria=gate)
    try:
        assert inside.wait(60)
        yield completion
    finally:
        go_on.set()


def test_a_call_waits_for_the_one_before(make_llama):
    llama = make_llama()
    with ThreadPoolExecutor(2) as pool:
        with held_completion(llama, pool) as first:
            second = pool.submit(lambda: llama.kv_bytes)
            assert llama.tokenize(b"a", add_bos=False) is not None  # vocabulary calls do not wait
            assert not second.done()
        assert first.result()["object"] == "text_completion"
        assert second.result() > 0


def test_closing_waits_for_what_runs(make_llama):
    llama = make_llama()
    with ThreadPoolExecutor(2) as pool:
        with held_completion(llama, pool) as first:
            closing = pool.submit(llama.close)
            assert not closing.done()
        assert first.result()["object"] == "text_completion"
        closing.result()
    with pytest.raises(StateError, match="closed"):
        llama.n_ctx()


def share(llama: Any, n_threads: int, n_calls: int, seed: int) -> dict[str, int]:
    """Runs random calls from several threads on one Llama; returns counts of right answers and of package errors."""
    texts = [tiny.tokens(CONFIG, n, seed=s) for s, n in enumerate((9, 30, 150, 292))]
    llama.kv_compressor = None
    want = {}
    for text in texts:
        llama.reset()
        want[tuple(text)] = greedy(llama, text, 4)
    methods = [None, HALF, KNorm(compression_ratio=0.5, min_tokens=100)]
    compressed = {}
    for method in methods[1:]:
        llama.kv_compressor = method
        for text in texts:
            llama.reset()
            compressed[method, tuple(text)] = greedy(llama, text, 4)
    llama.kv_compressor = None
    counts: dict[str, int] = {"right": 0, "refused": 0}
    lock = threading.Lock()

    def count(name: str) -> None:
        with lock:
            counts[name] += 1

    def work(number: int) -> None:
        chosen = random.Random(seed * 100 + number)
        for _ in range(n_calls):
            text, call = chosen.choice(texts), chosen.randrange(8)
            allowed = [want[tuple(text)], *(compressed[method, tuple(text)] for method in methods[1:])]
            try:
                if call <= 2:
                    stream = llama.generate(text, temp=0.0)
                    got = [next(stream) for _ in range(4)]
                    stream.close()
                    assert got in allowed, (text, got, allowed)
                elif call == 3:
                    made = llama.create_completion(list(text), max_tokens=2, temperature=0)
                    assert made["usage"]["prompt_tokens"] == len(text)
                elif call == 4:
                    llama.reset()
                elif call == 5:
                    assert llama.kv_bytes > 0
                    assert llama.kv_cells(0).n_bytes > 0
                elif call == 6:
                    llama.kv_compressor = chosen.choice(methods)
                else:
                    llama.compress(text)
                count("right")
            except KVComposeError:
                count("refused")

    with ThreadPoolExecutor(n_threads) as pool:
        for done in [pool.submit(work, number) for number in range(n_threads)]:
            done.result()
    return counts


def test_threads_that_share_a_llama_get_right_answers_or_errors_of_ours(make_llama):
    counts = share(make_llama(n_threads=1, n_threads_batch=1), n_threads=8, n_calls=25, seed=1)
    assert counts["right"] + counts["refused"] == 8 * 25
    assert counts["right"] > 20


def test_threads_that_close_a_llama_beside_others_end_well(make_llama):
    llama = make_llama(n_threads=1, n_threads_batch=1)

    def work(number: int) -> None:
        for _ in range(50):
            try:
                if number == 0 and llama.n_tokens:
                    llama.close()
                greedy(llama, QUESTION, 3)
                llama.tokenize(b"abc", add_bos=False)
            except StateError:
                pass

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, number) for number in range(8)]:
            done.result()


def test_turns_are_reentrant_and_streams_nest():
    access = Access()

    def inner():
        with access.turn("inner"):
            pass
        yield 1
        yield 2

    def outer():
        yield from access.stream(inner())
        with access.turn("outer"):
            pass
        yield 3

    stream = access.stream(outer())
    assert next(stream) == 1
    with pytest.raises(StateError, match="reset"), access.turn("reset"):
        pass
    assert list(stream) == [2, 3]
    with access.turn("reset"):
        pass


def test_a_stream_is_dropped_without_waiting_for_another_threads_call():
    access = Access()
    stream = access.stream(iter_of(2))
    next(stream)
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with access.turn():
            inside.set()
            assert go_on.wait(60)

    with ThreadPoolExecutor(2) as pool:
        held = pool.submit(hold)
        assert inside.wait(60)
        try:  # the garbage collector may drop it in any thread, which must not wait for a lock
            pool.submit(stream.close).result(timeout=60)
        finally:
            go_on.set()
        held.result()
    with access.turn("reset"):
        pass


def iter_of(n: int) -> Generator[int, Any, None]:
    yield from range(n)
