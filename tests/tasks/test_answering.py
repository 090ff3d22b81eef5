"""Answers of seeded tiny models. They are nonsense, but must be the expected nonsense."""

from __future__ import annotations

import numpy as np
import pytest
from support import tiny
from support.llamas import greedy
from support.plans import random_plan

from kvcompose_gguf import CompositionPlan
from kvcompose_gguf.evaluation.trials import compressed
from kvcompose_gguf.plan.trial import Trial
from kvcompose_gguf.tasks.answering import BETWEEN, N_DRAFT, Drafts, answer, answer_again

N = 300
CONTEXT = tiny.tokens(tiny.GQA, N)
QUESTION = tiny.tokens(tiny.GQA, 20, seed=3)
N_ANSWER = 12


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_an_answer_is_the_greedy_one(make_llama, monkeypatch, name):
    llama = make_llama(tiny.ARCHITECTURES[name])
    monkeypatch.setattr(llama, "is_end", lambda token: False)
    want = greedy(llama, CONTEXT + QUESTION, N_ANSWER)
    llama.reset()
    llama.prefill(CONTEXT)
    reply = answer(llama, QUESTION, N_ANSWER)
    assert reply.choices == want
    assert (reply.logits.argmax(axis=1) == want).all()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_answering_beside_a_reference_gives_the_caches_own_greedy_answer_and_the_references_logits(
    make_llama, monkeypatch, name
):
    config = tiny.ARCHITECTURES[name]
    llama = make_llama(config)
    monkeypatch.setattr(llama, "is_end", lambda token: False)
    n_layer = len(llama.kv_layers)
    llama.prefill(CONTEXT)
    state = llama.save_state()
    full = answer(llama, QUESTION, N_ANSWER)
    n_different = 0
    for n_kept in ([300] * n_layer, [299] * n_layer, [150] * n_layer, [5] * n_layer):
        with compressed(llama, state, Trial(random_plan(N, n_kept))) as restore:
            want = answer(llama, QUESTION, N_ANSWER)
            restore()
            reply = answer_again(llama, QUESTION, N_ANSWER, full, restore)
            restore()
            logits = llama.eval_logits(QUESTION + full.choices[:-1])[len(QUESTION) - 1 :]
        assert reply.choices == want.choices
        assert reply.text == want.text
        assert reply.logits.shape == full.logits.shape
        assert np.abs(reply.logits - logits).max() < 1e-4
        n_different += reply.choices != full.choices
    assert n_different > 0, "no cache answered differently: nothing was tested"


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_earlier_answers_change_how_often_an_answer_is_evaluated_and_not_what_it_says(make_llama, monkeypatch, name):
    llama = make_llama(tiny.ARCHITECTURES[name])
    monkeypatch.setattr(llama, "is_end", lambda token: False)
    llama.prefill(CONTEXT)
    state = llama.save_state()
    full = answer(llama, QUESTION, N_ANSWER)
    n_calls, eval_logits = [0], llama.eval_logits

    def counted(tokens):
        n_calls[0] += 1
        return eval_logits(tokens)

    monkeypatch.setattr(llama, "eval_logits", counted)
    with compressed(llama, state, Trial(random_plan(N, [5] * len(llama.kv_layers)))) as restore:
        replies, calls, ends = [], [], []
        own = answer(llama, QUESTION, N_ANSWER).choices
        wrong = [*own[:6], own[6] ^ 1, *own[7:]]
        for earlier in ([], [own], [wrong], [[token ^ 1 for token in own], own[:7]]):
            drafts = Drafts()
            for choices in earlier:
                drafts.add(choices)
            restore()
            n_calls[0] = 0
            replies.append(answer_again(llama, QUESTION, N_ANSWER, full, restore, drafts if earlier else None))
            calls.append(n_calls[0])
            ends.append(llama.n_tokens)
    assert own != full.choices
    assert all(reply.choices == own for reply in replies)
    assert all((reply.logits == replies[0].logits).all() for reply in replies)
    if llama.can_truncate:
        assert len(set(ends)) == 1, "what was only tried is forgotten"
        assert calls[1] < calls[2] < calls[0]
        assert calls[1] <= calls[0] - (N_ANSWER - 2) * N_DRAFT // (N_DRAFT + 1) + 1
    else:
        assert len(set(calls)) == 1


def test_what_followed_the_same_tokens_before_is_tried():
    drafts = Drafts()
    assert drafts.after([1, 2], 8) == []
    drafts.add([5, 6, 7, 8, 9])
    drafts.add([5, 6, 1, 2])
    assert drafts.after([5, 6, 7], 8) == [8, 9], "the answer with the same beginning"
    assert drafts.after([5, 6], 8) == [1, 2], "the latest of them"
    assert drafts.after([5, 6], 1) == [1]
    assert drafts.after([5, 6], -1) == []
    assert drafts.after([0, 7, 8], 8) == [9], "the same last tokens"
    assert drafts.after([3, 4, 0, 3, 4], 8) == [0, 3], "said before in this answer"
    assert drafts.after([5, 6, 1, 2], 8) == [], "where one ended"
    assert drafts.after([9, ord(BETWEEN) - 1], 8) == []


def test_an_answer_ends_with_its_end_token(make_llama, monkeypatch):
    llama = make_llama()
    llama.prefill(CONTEXT)
    state = llama.save_state()
    monkeypatch.setattr(llama, "is_end", lambda token: False)
    free = answer(llama, QUESTION, N_ANSWER)
    assert len(free.choices) == 12
    llama.load_state(state)
    monkeypatch.setattr(llama, "is_end", lambda token: token == free.choices[3])
    ended = answer(llama, QUESTION, N_ANSWER)
    n = free.choices.index(free.choices[3]) + 1
    assert ended.choices == free.choices[:n]
    assert ended.text == llama.detokenize(free.choices[: n - 1]).decode(errors="replace")


def test_logits_of_several_tokens_are_those_of_one_after_the_other(make_llama):
    llama = make_llama(n_batch=8)
    llama.prefill(CONTEXT)
    at_once = llama.eval_logits(QUESTION)
    llama.truncate(N)
    one_by_one = np.concatenate([llama.eval_logits([token]) for token in QUESTION])
    assert at_once.shape == (len(QUESTION), tiny.GQA.n_vocab)
    assert np.abs(at_once - one_by_one).max() < 1e-4
    assert llama.n_tokens == N + len(QUESTION)


def test_a_mask_shows_what_it_says(make_llama):
    llama = make_llama()
    llama.prefill(CONTEXT)
    state = llama.save_state()
    plan = random_plan(N, [100, 100, 100])
    biases = [np.full((2, N), -np.inf, dtype=np.float32) for _ in range(3)]
    for l in range(3):
        np.put_along_axis(biases[l], plan.rows[l].astype(np.int64), 0, axis=1)
    with compressed(llama, state, Trial(plan)):
        want = llama.eval_logits(QUESTION)
    with compressed(llama, state, Trial(None, biases=biases)):
        got = llama.eval_logits(QUESTION)
    assert np.abs(got - want).max() < 1e-3
    with compressed(llama, state, Trial(CompositionPlan.keep_all(N, [2] * 3))):
        assert np.abs(llama.eval_logits(QUESTION) - want).max() > 0.1
