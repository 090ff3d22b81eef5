"""Slots and the queue before them, on a tiny model."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.llamas import greedy, last_logits
from support.serving import TIMEOUT, Gate, gate_before, until

from kvcompose_gguf import ConfigError, KVCompose
from kvcompose_gguf.server.slots.engine import Engine
from kvcompose_gguf.server.slots.idle import IdleCaches
from kvcompose_gguf.server.slots.job import Busy, Cancelled, Job
from kvcompose_gguf.server.slots.slot import Slot
from kvcompose_gguf.server.slots.stores import StoreOptions
from kvcompose_gguf.server.slots.turns import Turns

CONFIG = tiny.GQA
OPTIONS: dict[str, Any] = {
    "n_ctx": 1024, "n_batch": 64, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0, "verbose": False,
}  # fmt: skip
METHOD = KVCompose(compression_ratio=0.5, scoring="repeat", min_tokens=100, keep_last=8)


@pytest.fixture
def make_engine(tiny_model) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(n_slots: int = 1, n_queue: int = 8, config: tiny.TinyConfig = CONFIG, **options: Any) -> Engine:
        made.append(Engine(tiny_model(config), n_slots, n_queue, **(OPTIONS | options)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def read(tokens: list[int], method: Any = None, reuse: bool = True) -> Job:
    """A job that reads a prompt: (slot, cached tokens, logits)."""

    def work(slot: Slot) -> tuple[int, int, np.ndarray]:
        n_cached = slot.llama.read(slot.llama.continuation(tokens, method, reuse), method)
        return slot.id, n_cached, last_logits(slot.llama)

    return Job(work, tokens)


def result(engine: Engine, job: Job) -> Any:
    engine.submit(job)
    return job.future.result(TIMEOUT)


class Blocker:
    """A job that holds its slot until it is told to go on."""

    def __init__(self, id_slot: int = -1) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.job = Job(self._work, id_slot=id_slot)

    def _work(self, slot: Slot) -> int:
        self.begun.set()
        assert self.go.wait(TIMEOUT)
        return slot.id


def test_slots_share_the_weights_and_not_the_cache(make_engine, make_llama):
    engine = make_engine(3)
    models = {slot.llama.model for slot in engine.slots}
    contexts = {id(slot.llama.ctx) for slot in engine.slots}
    assert (len(models), len(contexts)) == (1, 3)
    alone = make_llama(CONFIG, n_threads=1, n_threads_batch=1, n_batch=64)
    for slot in engine.slots:
        prompt = tiny.tokens(CONFIG, 50 + slot.id, seed=slot.id)
        _, n_cached, logits = result(engine, Job(read(prompt).work, prompt, slot.id))
        alone.reset()
        alone.eval(prompt)
        assert n_cached == 0
        np.testing.assert_array_equal(logits, last_logits(alone))


def test_a_prompt_goes_where_most_of_it_is_and_else_to_the_slot_that_waited_longest(make_engine):
    engine = make_engine(2)
    a, b = tiny.tokens(CONFIG, 80, seed=1), tiny.tokens(CONFIG, 80, seed=2)
    assert [result(engine, read(tokens))[:2] for tokens in (a, b)] == [(0, 0), (1, 0)]
    assert result(engine, read([*b[:60], 5]))[:2] == (1, 60)
    assert result(engine, read([*a, 7]))[:2] == (0, 80)
    assert result(engine, read(a))[:2] == (0, 79)  # the last token's logits are needed
    assert result(engine, read(tiny.tokens(CONFIG, 30, seed=3)))[:2] == (1, 0)


def test_logits_are_those_of_a_prompt_that_was_read_at_once(make_engine):
    engine = make_engine(1)
    tokens = tiny.tokens(CONFIG, 200, seed=4)
    result(engine, read([*tokens[:120], 9, 9]))
    _, n_cached, continued = result(engine, read(tokens))
    _, n_none, anew = result(engine, read(tokens, reuse=False))
    assert (n_cached, n_none) == (120, 0)
    np.testing.assert_allclose(continued, anew, atol=1e-4)


def test_a_compressed_context_is_continued_and_another_budget_reads_it_again(make_engine, make_llama):
    engine = make_engine(1)
    tokens = tiny.tokens(CONFIG, 300, seed=5)
    assert result(engine, read(tokens, METHOD))[1] == 0
    llama = engine.slots[0].llama
    assert (llama.n_context, llama.kv_report.compression_ratio) == (292, pytest.approx(0.5, abs=0.01))
    first, longer = llama.kv_report, [*tokens[:298], 3, 4, 5]
    _, n_cached, logits = result(engine, read(longer, METHOD))
    assert (n_cached, llama.kv_report is first) == (298, True)
    alone = make_llama(CONFIG, METHOD, n_threads=1, n_threads_batch=1, n_batch=64)
    alone.compress(tokens[:292])
    greedy(alone, longer, 1)
    np.testing.assert_allclose(logits, last_logits(alone), atol=1e-4)

    other = KVCompose(compression_ratio=0.75, scoring="repeat", min_tokens=100, keep_last=8)
    assert result(engine, read(longer, other))[1] == 0
    assert llama.kv_report.compression_ratio == pytest.approx(0.75, abs=0.01)
    assert result(engine, read(longer, None))[1] == 0
    assert llama.n_context == 0


def test_a_bounded_number_of_jobs_waits(make_engine):
    engine, blocker = make_engine(1, n_queue=2), Blocker()
    engine.submit(blocker.job)
    assert blocker.begun.wait(TIMEOUT)
    waiting = [read(tiny.tokens(CONFIG, 10, seed=s)) for s in range(2)]
    for job in waiting:
        engine.submit(job)
    with pytest.raises(Busy, match="all 1 slots work and 2 requests wait"):
        engine.submit(read([5, 6, 7]))
    assert (engine.n_busy, engine.n_waiting) == (1, 2)
    blocker.go.set()
    assert [job.future.result(TIMEOUT)[0] for job in waiting] == [0, 0]
    assert (engine.n_busy, engine.n_waiting) == (0, 0)


def test_a_job_for_one_slot_waits_for_it_and_lets_others_pass(make_engine):
    engine, blocker = make_engine(2), Blocker(id_slot=1)
    engine.submit(blocker.job)
    assert blocker.begun.wait(TIMEOUT)
    wanting = Job(lambda slot: slot.id, id_slot=1)
    engine.submit(wanting)
    assert result(engine, Job(lambda slot: slot.id)) == 0
    assert not wanting.future.done()
    blocker.go.set()
    assert wanting.future.result(TIMEOUT) == 1
    with pytest.raises(ConfigError, match="id_slot=2: there are 2 slots"):
        engine.submit(Job(lambda slot: slot.id, id_slot=2))


def test_a_cancelled_job_ends_before_its_next_decode_and_the_slot_goes_on(make_engine):
    engine = make_engine(1)
    tokens = tiny.tokens(CONFIG, 640, seed=6)
    job = read(tokens)
    seen: list[int] = []

    def on_decode(n: int) -> None:
        seen.append(n)
        if len(seen) == 3:
            job.cancel()

    def work(slot: Slot) -> Any:
        slot.on_decode = on_decode
        return slot.llama.read(slot.llama.continuation(tokens, None), None)

    job.work = work
    engine.submit(job)
    with pytest.raises(Cancelled):
        job.future.result(TIMEOUT)
    assert seen == [64, 64, 64]
    _, n_cached, logits = result(engine, read(tokens))
    assert n_cached == 192
    _, _, anew = result(engine, read(tokens, reuse=False))
    np.testing.assert_allclose(logits, anew, atol=1e-4)


def test_a_job_that_is_cancelled_while_it_waits_never_runs(make_engine):
    engine, blocker = make_engine(1), Blocker()
    engine.submit(blocker.job)
    assert blocker.begun.wait(TIMEOUT)
    ran: list[int] = []
    job, behind = Job(lambda slot: ran.append(1)), Job(lambda slot: slot.id)
    engine.submit(job)
    engine.submit(behind)
    job.cancel()
    blocker.go.set()
    assert behind.future.result(TIMEOUT) == 0
    assert (ran, job.future.cancelled(), engine.n_waiting) == ([], True, 0)


def test_a_cancelled_job_in_the_queue_does_not_count_as_waiting(make_engine):
    engine, blocker = make_engine(1), Blocker()
    engine.submit(blocker.job)
    assert blocker.begun.wait(TIMEOUT)
    jobs = [Job(lambda slot: slot.id) for _ in range(2)]
    for job in jobs:
        engine.submit(job)
    jobs[0].cancel()
    assert engine.n_waiting == 1
    blocker.go.set()
    assert jobs[1].future.result(TIMEOUT) == 0
    assert engine.n_waiting == 0


def test_a_context_on_its_way_to_disk_is_waited_for(make_engine, tmp_path):
    """A prompt that needs it, in another slot meanwhile, does not read it all again."""
    engine = make_engine(2, stores=StoreOptions(idle_path=tmp_path, idle_bytes=1 << 30))
    a, b = (tiny.tokens(CONFIG, 308, seed=seed) for seed in (1, 2))

    def job(tokens: list[int], id_slot: int) -> Job:
        return Job(read(tokens, METHOD).work, tokens, id_slot, method=METHOD)

    assert result(engine, job(a, 0))[1] == 0
    with gate_before(IdleCaches, "keep") as keep:
        keep.let(0)
        replacing, again = job(b, 0), job(a, 1)
        engine.submit(replacing)
        keep.wait_held()
        engine.submit(again)
        # long enough for a slot that does not wait; one that does may take as long as it likes
        assert not wait([again.future], 1).done
        keep.open()
        assert again.future.result(TIMEOUT)[:2] == (1, 307)
        assert replacing.future.result(TIMEOUT)[:2] == (0, 0)


def test_a_slot_that_is_being_emptied_has_nothing_to_continue(make_engine, tmp_path):
    """Its cache is its own thread's: the choice of a slot for another prompt does not look at it."""
    engine = make_engine(2, stores=StoreOptions(idle_path=tmp_path, idle_bytes=1 << 30))
    a = tiny.tokens(CONFIG, 308, seed=1)
    result(engine, Job(read(a, METHOD).work, a, 0, method=METHOD))
    slot = engine.slots[0]
    assert slot.n_continued(a, METHOD) == 307
    with gate_before(IdleCaches, "keep") as keep:
        keep.let(0)
        engine._start_forgetting(slot)
        keep.wait_held()
        assert slot.n_continued(a, METHOD) == 0
    assert result(engine, Job(read(a, METHOD).work, a, method=METHOD))[1] == 307  # it is on disk


def test_an_exception_is_the_jobs_and_the_slot_is_free(make_engine):
    engine = make_engine(1)

    def work(slot: Slot) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        result(engine, Job(work))
    assert engine.n_busy == 0
    assert result(engine, Job(lambda slot: slot.id)) == 0


def test_decodes_of_slots_take_turns(make_engine, monkeypatch):
    """Of two slots that both want to decode, the one that asked first is next."""
    engine, held, run, order = make_engine(2), Gate(), Turns.run, list[str]()

    def held_run(self: Turns, decode: Callable[[], None], check: Callable[[], None]) -> None:
        slot = threading.current_thread().name

        def held_check() -> None:  # in the one thread that computes
            held.arrive()
            order.append(slot)
            check()

        run(self, decode, held_check)

    monkeypatch.setattr(Turns, "run", held_run)
    queue = engine.turns._thread._work_queue
    held.let(0)
    jobs = [Job(read(tiny.tokens(CONFIG, 640, seed=number)).work, id_slot=number) for number in range(2)]
    for job in jobs:
        engine.submit(job)
    for _ in range(18):
        held.wait_held()
        until(lambda: queue.qsize() == 1)  # the other slot has asked as well
        held.let(1)
    held.open()
    for job in jobs:
        job.future.result(TIMEOUT)
    assert len(order) == 20
    assert all(one != next_one for one, next_one in itertools.pairwise(order)), order


def test_closing_ends_what_runs_and_what_waits(make_engine):
    engine = make_engine(1)
    begun = threading.Event()

    def work(slot: Slot) -> None:
        begun.set()
        while True:
            tokens = tiny.tokens(CONFIG, 300, seed=time.perf_counter_ns())
            slot.llama.read(slot.llama.continuation(tokens, None), None)

    running, waiting = Job(work), Job(lambda slot: slot.id)
    engine.submit(running)
    engine.submit(waiting)
    assert begun.wait(TIMEOUT)
    engine.close()
    with pytest.raises(Cancelled):
        running.future.result(TIMEOUT)
    assert waiting.future.cancelled()
    with pytest.raises(Busy, match="is stopping"):
        engine.submit(Job(lambda slot: slot.id))


def sized(tokens: list[int]) -> Job:
    job = read(tokens)
    job.n_tokens = len(tokens)
    return job


def test_idle_caches_make_room_and_what_does_not_fit_waits(make_engine):
    probe = make_engine(1)
    result(probe, sized(tiny.tokens(CONFIG, 300)))
    empty, used = probe._empty_bytes, probe.slots[0].llama.kv_bytes
    budget = empty + used + probe._bytes_of(sized([5] * 300))
    engine = make_engine(3, kv_budget=budget)
    prompts = [tiny.tokens(CONFIG, 300, seed=seed) for seed in range(3)]

    def total() -> int:
        return sum(slot.llama.kv_bytes for slot in engine.slots)

    for number, tokens in enumerate(prompts):
        assert result(engine, sized(tokens))[0] == number
        assert total() <= budget
    # the first one, used longest ago, made room for the third
    assert [slot.llama.n_tokens for slot in engine.slots] == [0, 300, 300]
    assert result(engine, sized([*prompts[2], 5]))[:2] == (2, 300)

    blocker = Blocker()
    blocker.job.n_tokens = 600
    engine.submit(blocker.job)
    assert blocker.begun.wait(TIMEOUT)
    large, small = sized(tiny.tokens(CONFIG, 600, seed=7)), sized(tiny.tokens(CONFIG, 20, seed=8))
    engine.submit(large)
    engine.submit(small)  # would fit, but the large one was first
    assert engine.n_waiting == 2
    blocker.go.set()
    assert large.future.result(TIMEOUT)[2].size
    assert small.future.result(TIMEOUT)[2].size
    assert total() <= budget
    n_most = next(n for n in range(1024, 0, -1) if probe._bytes_of(sized([5] * n)) <= budget - 2 * empty)
    with pytest.raises(ConfigError, match=rf"{n_most + 1} tokens need \d+ bytes of cache, the server's budget leaves"):
        engine.submit(sized(tiny.tokens(CONFIG, n_most + 1)))
    assert result(engine, sized(tiny.tokens(CONFIG, n_most)))[2].size
    with pytest.raises(ConfigError, match="kv_budget=10 is less than 2 empty slots have"):
        make_engine(2, kv_budget=10)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_compressed_prompt_is_continued_as_often_as_it_comes(make_engine, name):
    """Also with sliding windows, which can only go back to the context's end."""
    config = tiny.ARCHITECTURES[name]
    engine = make_engine(config=config)
    tokens = tiny.tokens(config, 300, seed=5)
    _, n_cached, first = result(engine, read(tokens, METHOD))
    llama = engine.slots[0].llama
    report = llama.kv_report
    assert (n_cached, llama.n_context) == (0, 292)
    for prompt in (tokens, [*tokens[:295], 7, 8, 9], tokens):
        _, n_cached, logits = result(engine, read(prompt, METHOD))
        assert (llama.n_context, llama.kv_report is report, n_cached >= 292) == (292, True, True)
    np.testing.assert_allclose(logits, first, atol=1e-4)


def test_a_prompt_that_is_the_context_itself_is_told_as_read_again(make_engine):
    engine = make_engine()
    tokens = tiny.tokens(CONFIG, 300, seed=5)
    engine.submit(job := Job(lambda slot: slot.llama.compress_prompt(tokens, METHOD), tokens))
    assert job.future.result(TIMEOUT).n_tokens == 300
    assert result(engine, read([*tokens, 5], METHOD))[1] == 300
    n_cached = result(engine, read(tokens, METHOD))[1]
    llama = engine.slots[0].llama
    assert n_cached <= llama.n_context - llama.kv_report.n_prefilled
