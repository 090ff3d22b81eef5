"""The thread that computes for all slots: it takes the tokens of all answers that wait in one decode."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.llamas import greedy, step
from support.serving import TIMEOUT, until

from kvcompose_gguf import Llama, NativeError
from kvcompose_gguf.native.joint import decode_joint
from kvcompose_gguf.server.slots.turns import Turns

N = 12


class Compute:
    """``Turns``, and a thread for each slot. ``held`` keeps the computing thread busy, so that others have to wait."""

    def __init__(self) -> None:
        self.turns, self.held = Turns(), threading.Event()
        self.threads = ThreadPoolExecutor(8)

    def hold(self) -> None:
        begun = threading.Event()

        def wait() -> None:
            begun.set()
            self.held.wait(TIMEOUT)

        self.threads.submit(self.turns.run, wait)
        assert begun.wait(TIMEOUT)

    def start(self, *decodes: Callable[[], None], check: Callable[[], None] = lambda: None) -> list[Future[None]]:
        """Returns the futures of decodes that wait."""
        n = len(self.turns._waiting)
        futures = [self.threads.submit(self.turns.run, decode, check) for decode in decodes]
        until(lambda: len(self.turns._waiting) == n + len(decodes))
        return futures

    def close(self) -> None:
        self.held.set()
        self.threads.shutdown()
        self.turns.close()


@pytest.fixture
def compute() -> Iterator[Compute]:
    compute = Compute()
    yield compute
    compute.close()


@pytest.fixture
def make_group(make_llama) -> Callable[..., list[Llama]]:
    def make(config: tiny.TinyConfig = tiny.GQA_SOFT, n: int = 3) -> list[Llama]:
        group: list[Llama] = []
        for number in range(n):
            group.append(make_llama(config, weights_of=group[0] if group else None, n_threads=1, n_threads_batch=1))
            group[-1].eval(tiny.tokens(config, 30 + 20 * number, seed=number))
        return group

    return make


def test_steps_that_wait_are_one_decode(compute, make_group):
    group = make_group()
    compute.hold()
    futures = compute.start(*(step(llama) for llama in group))
    compute.held.set()
    for future in futures:
        future.result(TIMEOUT)
    assert (compute.turns.n_decodes, compute.turns.n_served) == (2, 4)  # with the one that held
    assert [llama.session.state().n_cells_used for llama in group] == [31, 51, 71]


def test_a_prompt_between_steps_runs_alone_and_in_its_turn(compute, make_group):
    group, order = make_group(), list[str]()
    compute.hold()
    prompt = compute.start(lambda: order.append("prompt"))
    steps = compute.start(*(step(llama) for llama in group), check=lambda: order.append("step"))
    compute.held.set()
    for future in (*prompt, *steps):
        future.result(TIMEOUT)
    assert order == ["prompt", "step", "step", "step"]
    assert (compute.turns.n_decodes, compute.turns.n_served) == (3, 5)


def test_a_step_whose_job_was_cancelled_does_not_run_and_the_others_do(compute, make_group):
    group = make_group()

    def cancelled() -> None:
        raise KeyError("cancelled")

    compute.hold()
    gone = compute.start(step(group[0]), check=cancelled)
    others = compute.start(*(step(llama) for llama in group[1:]))
    compute.held.set()
    with pytest.raises(KeyError, match="cancelled"):
        gone[0].result(TIMEOUT)
    for future in others:
        future.result(TIMEOUT)
    assert [llama.session.state().n_cells_used for llama in group] == [30, 51, 71]


def test_an_error_of_one_step_is_its_own(compute, make_llama, make_group):
    """The second cache is full: it alone fails."""
    group = make_group()
    full = make_llama(tiny.GQA_SOFT, weights_of=group[0], n_ctx=256)
    full.eval(tiny.tokens(tiny.GQA_SOFT, 256))
    compute.hold()
    futures = compute.start(step(group[0]), step(full), step(group[1]))
    compute.held.set()
    for number, future in enumerate(futures):
        if number == 1:
            with pytest.raises(NativeError, match="position 256"):
                future.result(TIMEOUT)
        else:
            future.result(TIMEOUT)
    assert [llama.session.state().n_cells_used for llama in group[:2]] == [31, 51]


def test_a_step_waits_for_answers_that_go_on_but_not_for_those_that_ended(compute, make_group, monkeypatch):
    """How long it waits is set here, so that the test does not depend on the machine's speed."""
    group = make_group()
    sizes: list[int] = []

    def counted(steps: Any) -> None:
        sizes.append(len(steps))
        decode_joint(steps)

    monkeypatch.setattr("kvcompose_gguf.server.slots.turns.decode_joint", counted)
    compute.hold()
    futures = compute.start(*(step(llama) for llama in group))
    compute.held.set()
    for future in futures:
        future.result(TIMEOUT)
    compute.turns._seconds = 2 * TIMEOUT  # patience: until all are there
    for llama in group:
        llama.context.note_new([1])
    first = compute.threads.submit(compute.turns.run, step(group[0]))
    until(lambda: len(compute.turns._due) == 2)
    assert not first.done()
    rest = [compute.threads.submit(compute.turns.run, step(llama)) for llama in group[1:]]
    for future in (first, *rest):
        future.result(TIMEOUT)
    assert sizes == [3, 3]
    compute.turns._seconds = 0.0  # no patience: the others have ended
    group[0].context.note_new([1])
    compute.turns.run(step(group[0]))
    assert sizes == [3, 3]
    assert compute.turns._due == {group[0].context.decoder}


@pytest.mark.parametrize("config", [tiny.GQA_SOFT, tiny.ARCHITECTURES["gemma3"]], ids=["joint", "one-at-a-time"])
def test_answers_at_once_are_those_of_each_alone(compute, make_group, config):
    alone = [greedy(llama, [*llama.context.tokens, 7], N) for llama in make_group(config)]
    group = make_group(config)
    for llama in group:
        llama.context.through = lambda decode, n_tokens: compute.turns.run(decode)
    futures = [compute.threads.submit(greedy, llama, [*llama.context.tokens, 7], N) for llama in group]
    assert [future.result(TIMEOUT) for future in futures] == alone
    assert len({tuple(answer) for answer in alone}) > 1, np.array(alone)
    assert compute.turns._joins is (config is tiny.GQA_SOFT)
