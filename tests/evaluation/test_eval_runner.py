"""Runs the evaluation on seeded tiny models. Their answers are nonsense, but must be the expected nonsense."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import greedy
from support import tiny

from kvcompose_gguf import CompositionPlan, ConfigError, UnsupportedError
from kvcompose_gguf.evaluation import runner, suites
from kvcompose_gguf.evaluation.options import EvalOptions
from kvcompose_gguf.evaluation.records import FULL, RunFolder
from kvcompose_gguf.evaluation.runner import evaluate
from kvcompose_gguf.evaluation.trials import Request, compressed, make_trials
from kvcompose_gguf.evaluation.worker import SampleJob, SampleWorker
from kvcompose_gguf.methods import make_method
from kvcompose_gguf.plan.trial import Trial
from kvcompose_gguf.tasks import prompts
from kvcompose_gguf.tasks.answering import BETWEEN, N_DRAFT, Drafts, answer, answer_again
from kvcompose_gguf.tasks.samples import Sample

N = 300
CONTEXT = tiny.tokens(tiny.GQA, N)
QUESTION = tiny.tokens(tiny.GQA, 20, seed=3)
N_ANSWER = 12


def random_plan(n_kept: list[int], n_tokens: int = N) -> CompositionPlan:
    rng = np.random.default_rng(0)
    heads = [[np.sort(rng.permutation(n_tokens)[:n]) for _ in range(2)] for n in n_kept]
    return CompositionPlan(n_tokens, tuple(np.array(h, dtype=np.int32) for h in heads))


def options(**changes) -> EvalOptions:
    return EvalOptions(
        **{
            "tasks": ("niah_single_1", "passkey"), "n_tokens": 900, "n_samples": 1, "texts": "generated",
            "methods": ("kvcompose", "snapkv,window=16"), "ratios": (0.5, 0.9), "max_tokens": 8, **changes,
        }
    )  # fmt: skip


#
# answers
#


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
def test_answering_beside_a_reference_gives_the_caches_own_greedy_answer_and_the_references_logits(make_llama, monkeypatch, name):
    config = tiny.ARCHITECTURES[name]
    llama = make_llama(config)
    monkeypatch.setattr(llama, "is_end", lambda token: False)
    n_layer = len(llama.kv_layers)
    llama.prefill(CONTEXT)
    state = llama.save_state()
    full = answer(llama, QUESTION, N_ANSWER)
    n_different = 0
    for n_kept in ([300] * n_layer, [299] * n_layer, [150] * n_layer, [5] * n_layer):
        with compressed(llama, state, Trial(random_plan(n_kept))) as restore:
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
    with compressed(llama, state, Trial(random_plan([5] * len(llama.kv_layers)))) as restore:
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
    plan = random_plan([100, 100, 100])
    biases = [np.full((2, N), -np.inf, dtype=np.float32) for _ in range(3)]
    for l in range(3):
        np.put_along_axis(biases[l], plan.cells[l].astype(np.int64), 0, axis=1)
    with compressed(llama, state, Trial(plan)):
        want = llama.eval_logits(QUESTION)
    assert Trial(None, biases=biases).n_kept.tolist() == Trial(plan).n_kept.tolist() == [100, 100, 100]
    with compressed(llama, state, Trial(None, biases=biases)):
        got = llama.eval_logits(QUESTION)
    assert np.abs(got - want).max() < 1e-3
    with compressed(llama, state, Trial(CompositionPlan.keep_all(N, [2] * 3))):
        assert np.abs(llama.eval_logits(QUESTION) - want).max() > 0.1


#
# prompts
#


def sample(context: str = "It is here.", question: str = "\nWhere is it?", prefix: str = " It is ") -> Sample:
    return Sample(
        task="t", index=0, context=context, question=question, answer_prefix=prefix, references=("here",), max_tokens=4,
        metric="string_match_all", n_tokens=9,
    )  # fmt: skip


def text_of(llama, tokens: list[int]) -> str:
    return llama.detokenize(tokens).decode().replace("\u2581", " ")


def test_a_prompt_without_a_template_is_context_and_question(make_llama):
    llama = make_llama()
    assert prompts.chat_frame(llama) == ("", "")
    context, question = prompts.prompt_tokens(llama, sample(), ("", ""))
    assert context == llama.tokenize(b"It is here.", add_bos=True)
    assert text_of(llama, question) == "\nWhere is it? It is"  # no space at the end


def test_a_template_goes_around_both(make_llama):
    llama = make_llama()
    llama.metadata["tokenizer.chat_template"] = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    frame = prompts.chat_frame(llama)
    assert frame == ("<s>[user]", "[end][assistant]")
    context, question = prompts.prompt_tokens(llama, sample(), frame)
    assert context.count(llama.token_bos()) == 1
    assert text_of(llama, context) == "[user]It is here."
    assert text_of(llama, question) == "\nWhere is it?[end][assistant] It is"


#
# runs
#


@pytest.fixture(scope="module")
def model_path(tiny_model) -> Path:
    return tiny_model(tiny.GQA)


def test_a_run_has_every_method_and_ratio_of_every_sample(model_path, tmp_path):
    folder = evaluate(str(model_path), options(types_kv=("f16", "f32")), tmp_path, jobs=1)
    want = {(FULL, 0.0), *((m, r) for m in ("kvcompose", "snapkv,window=16") for r in (0.5, 0.9))}
    for task in ("niah_single_1", "passkey"):
        for kv in ("f16", "f32"):
            answers = [a for a in folder.answers() if (a.task, a.type_kv) == (task, kv)]
            assert {(a.method, a.ratio) for a in answers} == want
            assert len(answers) == len(want)
            full = answers[0]
            assert (full.kl, full.same_top, full.ratio) == (0, 1, 0)
            for a in answers:
                assert a.n_tokens == full.n_tokens
                removed = 1 - sum(a.n_kept) / (3 * a.n_tokens)
                assert abs(removed - a.ratio) < 1 / a.n_tokens
                row = 2 * 2 * 32 * (2 if kv == "f16" else 4)
                assert a.kv_bytes == sum(a.n_kept) * row
                assert a.kl >= 0
    assert [cost.task for cost in folder.costs()] == ["niah_single_1", "passkey"] * 2
    assert all(len(cost.scoring_seconds) == 2 for cost in folder.costs())


def test_removing_next_to_nothing_changes_next_to_nothing(model_path, tmp_path):
    methods = ("kvcompose", "unstructured", "expected-attention", "kvzip")
    folder = evaluate(str(model_path), options(tasks=("passkey",), methods=methods, ratios=(1e-9,)), tmp_path, jobs=1)
    answers = folder.answers()
    assert len(answers) == 5
    for answer_ in answers:
        assert answer_.kl < 1e-3, answer_
        assert answer_.answer == answers[0].answer


def test_a_refitted_surrogate_needs_another_run(model_path, tmp_path, monkeypatch):
    from kvcompose_gguf.measurements.surrogate import Surrogate
    from kvcompose_gguf.methods import kvcompose

    options = EvalOptions(
        tasks=("niah_single_1",), n_tokens=250, n_samples=1, methods=("kvcompose,scoring=surrogate",), ratios=(0.5,)
    )
    monkeypatch.setattr(runner, "_work", lambda *args: iter(()))
    for weight, message in ((0.0, None), (0.0, None), (1.0, "calibrations")):
        surrogate = Surrogate("m.gguf", "0", (np.full((2, 3), weight, np.float32),))
        monkeypatch.setattr(kvcompose, "load_surrogate", lambda path, made=surrogate: made)
        if message is None:
            evaluate(str(model_path), options, tmp_path / "run", jobs=1)
        else:
            with pytest.raises(ConfigError, match=message):
                evaluate(str(model_path), options, tmp_path / "run", jobs=1)


def test_a_run_resumes_and_accepts_more_samples_but_no_other_settings(model_path, tmp_path, monkeypatch):
    small = {"tasks": ("passkey",), "methods": ("random",), "ratios": (0.5,)}
    first = evaluate(str(model_path), options(**small), tmp_path, jobs=1).answers()
    done = []
    do = SampleWorker.do
    monkeypatch.setattr(SampleWorker, "do", lambda self, job: done.append(job) or do(self, job))
    again = evaluate(str(model_path), options(**small, n_samples=3), tmp_path, jobs=1).answers()
    assert done == [SampleJob("passkey", 1, "f16"), SampleJob("passkey", 2, "f16")]
    assert again[: len(first)] == first
    with pytest.raises(ConfigError, match="seed"):
        evaluate(str(model_path), options(**small, seed=1), tmp_path, jobs=1)
    assert RunFolder(tmp_path).answers() == again


def test_two_processes_give_what_one_gives(model_path, tmp_path):
    small = options(tasks=("passkey",), n_samples=2)
    one = evaluate(str(model_path), small, tmp_path / "one", jobs=1).answers()
    two = evaluate(str(model_path), small, tmp_path / "two", jobs=2).answers()

    def results(answers):
        return sorted((a.task, a.index, a.method, a.ratio, a.answer, a.score, round(a.kl, 6)) for a in answers)

    assert results(one) == results(two)


def test_a_question_in_sight_is_judged_by(make_llama):
    methods = {"snapkv,window=16": [make_method("snapkv,window=16", compression_ratio=0.5)]}
    made = [make_trials(make_llama(), methods, [0.5], CONTEXT, suffix) for suffix in ([], QUESTION)]
    hidden, seen = (trials.by_method["snapkv,window=16", 0.5].plan.cells[0] for trials in made)
    assert set(range(N - 16, N)) <= set(hidden[0])
    assert (hidden != seen).any()


def test_passkeys_are_hidden_at_all_depths_in_turn(model_path):
    worker = SampleWorker(model_path, options(tasks=("passkey",), methods=(), ratios=(), n_depths=3), 1)
    depths = [worker.do(SampleJob("passkey", i, "f16"))[1][0].depth for i in range(4)]
    worker.close()
    assert depths[0] == depths[3] == 0
    assert depths[1] == pytest.approx(0.5, abs=0.2)
    assert depths[2] == pytest.approx(1, abs=0.1)


def test_the_unstructured_upper_bound_keeps_the_largest_scores_of_all_heads_and_has_no_plan():
    from kvcompose_gguf.plan.geometry import LayerGeometry
    from kvcompose_gguf.scoring.evidence import Evidence

    rng = np.random.default_rng(0)
    layers = [LayerGeometry(l, 4, 2, 16, 16, 1, 1, False, 64) for l in range(3)]
    evidence = Evidence(20, layers, [rng.random((4, 20)).astype(np.float32) for _ in range(3)])
    method = make_method("unstructured,n_sink=2", compression_ratio=0.7)
    scores = np.stack(method.scores(evidence))
    scores[:, :, :2] = np.inf
    visible = np.stack(method.mask(evidence))
    assert visible.sum() == 2 * int(3 * 20 * 0.3)
    assert scores[visible].min() >= scores[~visible].max()
    with pytest.raises(UnsupportedError, match="only simulated"):
        method.plan(evidence)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("niah",)}, "tasks=niah"),
        ({"tasks": ()}, "tasks="),
        ({"ratios": (0.0,)}, "compression_ratio="),
        ({"ratios": (1.0,)}, "compression_ratio="),
        ({"n_samples": 0}, "n_samples=0"),
        ({"types_kv": ("f17",)}, "types_kv='f17'"),
        ({"methods": ("kvcompos",)}, "kvcompos"),
        ({"methods": ("kvcompose,windw=3",)}, "windw"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_a_model_is_loaded(change, message):
    with pytest.raises(ConfigError, match=message):
        options(**change)


def test_suites_are_lists_of_existing_methods():
    for name, methods in suites.SUITES.items():
        assert suites.expand([f"@{name}"]) == list(methods)
        for spec in methods:
            assert make_method(spec, compression_ratio=0.5) is not None
    assert suites.expand(["snapkv", "@quick"])[:2] == ["snapkv", "kvcompose"]
    with pytest.raises(ConfigError, match="@nothing"):
        suites.expand(["@nothing"])


def test_labels_of_requests_are_all_different():
    specs = [spec for suite in suites.SUITES.values() for spec in suite]
    methods = [make_method(spec, compression_ratio=0.5) for spec in specs]
    requests = {Request.of(method) for method in methods}
    labels = {request.label for request in requests if any(request)}
    assert len(labels) == len([request for request in requests if any(request)])
    assert "" not in labels
    assert Request(None, None).label == ""


def test_a_missing_calibration_is_found_before_a_folder_is_made(model_path, tmp_path):
    with pytest.raises(ConfigError, match="kvcompose calibrate"):
        evaluate(str(model_path), options(methods=("compresskv",)), tmp_path / "run", jobs=1)
    assert not (tmp_path / "run").exists()


def test_samples_longer_than_the_model_was_made_for_are_refused(model_path, tmp_path):
    with pytest.raises(ConfigError, match=r"n_tokens=1000000, but .* was trained for at most"):
        evaluate(str(model_path), options(n_tokens=1_000_000), tmp_path / "run", jobs=1)
    assert not (tmp_path / "run").exists()


def test_simulated_methods_need_an_unquantized_cache():
    with pytest.raises(ConfigError, match="'unstructured' is simulated"):
        options(methods=("kvcompose", "unstructured"), types_kv=("f16", "q8_0"))
    options(methods=("unstructured",), types_kv=("f16", "bf16"))


def test_a_worker_that_dies_is_reported(model_path, tmp_path, monkeypatch):
    from concurrent.futures.process import BrokenProcessPool

    from kvcompose_gguf.errors import StateError

    class Pool:
        def __init__(self, *args):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return False

        def submit(self, *args):
            raise BrokenProcessPool

        def shutdown(self, **kwargs):
            pass

    monkeypatch.setattr(runner, "ProcessPoolExecutor", Pool)
    with pytest.raises(StateError, match="a worker died"):
        evaluate(str(model_path), options(n_samples=2), tmp_path, jobs=2)
