"""Runs the evaluation on seeded tiny models."""

from __future__ import annotations

import numpy as np
import pytest
from support import tiny

from kvcompose_gguf import ConfigError, KVCompose, UnsupportedError
from kvcompose_gguf.compression import compress
from kvcompose_gguf.evaluation import runner, suites
from kvcompose_gguf.evaluation.options import EvalOptions, kv_types
from kvcompose_gguf.evaluation.records import FULL, RunFolder
from kvcompose_gguf.evaluation.runner import evaluate
from kvcompose_gguf.evaluation.trials import Request, compressed, make_trials
from kvcompose_gguf.evaluation.worker import SampleJob, SampleWorker
from kvcompose_gguf.load import load_model
from kvcompose_gguf.methods import make_method
from kvcompose_gguf.methods.unstructured import Unstructured

N = 300
CONTEXT = tiny.tokens(tiny.GQA, N)
QUESTION = tiny.tokens(tiny.GQA, 20, seed=3)


def options(**changes) -> EvalOptions:
    return EvalOptions(
        **{
            "tasks": ("niah_single_1", "passkey"), "n_tokens": 900, "n_samples": 1, "texts": "generated",
            "methods": ("kvcompose", "snapkv,window=16"), "ratios": (0.5, 0.9), "max_tokens": 8, **changes,
        }
    )  # fmt: skip


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
                n_kept = sum(a.n_kept or ())
                removed = 1 - n_kept / (3 * a.n_tokens)
                assert abs(removed - a.ratio) < 1 / a.n_tokens
                row = 2 * 2 * 32 * (2 if kv == "f16" else 4)
                assert a.kv_bytes == n_kept * row
                assert a.kl is not None
                assert a.kl >= 0
    assert [cost.task for cost in folder.costs()] == ["niah_single_1", "passkey"] * 2
    assert all(len(cost.scoring_seconds) == 2 for cost in folder.costs())


def test_removing_next_to_nothing_changes_next_to_nothing(model_path, tmp_path):
    methods = ("kvcompose", "unstructured", "expected-attention", "kvzip")
    folder = evaluate(str(model_path), options(tasks=("passkey",), methods=methods, ratios=(1e-9,)), tmp_path, jobs=1)
    answers = folder.answers()
    assert len(answers) == 5
    for answer_ in answers:
        assert answer_.kl is not None
        assert answer_.kl < 1e-3, answer_
        assert answer_.answer == answers[0].answer


def test_a_run_goes_on_with_what_was_known_when_it_began(model_path, tmp_path, kept, make_llama):
    small = {"tasks": ("niah_single_1",), "methods": ("kvcompose,spot_check=0.0",), "ratios": (0.5,)}
    llama = make_llama(tiny.GQA, KVCompose(compression_ratio=0.5), n_ctx=2048, n_threads=1, n_threads_batch=1)
    for seed in range(2):
        llama.compress(tiny.tokens(tiny.GQA, 600, seed=seed))
    whole = evaluate(str(model_path), options(**small, n_samples=2), tmp_path / "whole", jobs=1).answers()
    evaluate(str(model_path), options(**small), tmp_path / "cut", jobs=1)
    known = (tmp_path / "cut" / "learned.npz").read_bytes()
    llama.compress(tiny.tokens(tiny.GQA, 600, seed=2))  # more is learnt before the run goes on
    assert evaluate(str(model_path), options(**small, n_samples=2), tmp_path / "new", jobs=1).answers() != whole
    after = evaluate(str(model_path), options(**small, n_samples=2), tmp_path / "cut", jobs=1).answers()
    assert [(a.index, a.method, a.n_kept, a.kl) for a in after] == [(a.index, a.method, a.n_kept, a.kl) for a in whole]
    assert (tmp_path / "cut" / "learned.npz").read_bytes() == known
    (tmp_path / "cut" / "learned.npz").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be read"):
        evaluate(str(model_path), options(**small), tmp_path / "cut", jobs=1)


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
    plans = [trials.by_method["snapkv,window=16", 0.5].plan for trials in made]
    hidden, shown = (plan.rows[0] for plan in plans if plan is not None)
    assert set(range(N - 16, N)) <= set(hidden[0])
    assert (hidden != shown).any()


def test_a_method_that_composes_while_it_reads_is_judged_by_that_cache(make_llama):
    spec = "knorm,chunk=64,n_fresh=8,min_tokens=64"
    methods = {spec: [make_method(spec, compression_ratio=ratio) for ratio in (0.9, 0.95)]}
    llama = make_llama()
    made = make_trials(llama, methods, [0.9, 0.95], CONTEXT)
    assert llama.context.composed is None
    assert llama.context.tokens == CONTEXT
    other, state = make_llama(), llama.save_state()
    for ratio, method in zip((0.9, 0.95), methods[spec], strict=True):
        trial = made.by_method[spec, ratio]
        report = compress(other.context, CONTEXT, method)
        assert report.n_composed > 1
        assert trial.n_kept.tolist() == report.n_kept.tolist()
        with compressed(llama, state, trial):
            assert llama.session.n_rows_used() == report.n_kept.tolist()
            held, same = (each.context.composed for each in (llama, other))
            for a, b in zip(held.rows.positions, same.rows.positions, strict=True):
                np.testing.assert_array_equal(a, b)


def test_passkeys_are_hidden_at_all_depths_in_turn(model_path):
    worker = SampleWorker(model_path, options(tasks=("passkey",), methods=(), ratios=(), n_depths=3), 1, {})
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
    assert isinstance(method, Unstructured)
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
    with pytest.raises(ConfigError, match=r"kvcompose learn .* --for compresskv"):
        evaluate(str(model_path), options(methods=("compresskv",)), tmp_path / "run", jobs=1)
    assert not (tmp_path / "run").exists()


def test_samples_longer_than_the_model_was_made_for_are_refused(model_path, tmp_path):
    with pytest.raises(ConfigError, match=r"n_tokens=1000000, but .* was trained for at most"):
        evaluate(str(model_path), options(n_tokens=1_000_000), tmp_path / "run", jobs=1)
    assert not (tmp_path / "run").exists()


def test_simulated_methods_need_an_unquantized_cache():
    with pytest.raises(ConfigError, match="'unstructured' is simulated"):
        options(methods=("kvcompose", "unstructured"), types_kv=("f16", "q8_0"))
    with pytest.raises(ConfigError, match="not for types_kv=f16/q8_0"):
        options(methods=("unstructured",), types_kv=("f16/q8_0",))
    options(methods=("unstructured",), types_kv=("f16", "bf16", "f32/f16"))


def test_keys_and_values_may_have_different_types(model_path, tmp_path, monkeypatch):
    def noted(*args, **options):
        made.append((options["type_k"], options["type_v"]))
        return load_model(*args, **options)

    made: list[tuple[int, int]] = []
    monkeypatch.setattr("kvcompose_gguf.evaluation.worker.load_model", noted)
    small = options(tasks=("passkey",), methods=("knorm",), ratios=(0.5,), types_kv=("q8_0/q4_0", "q4_0/q8_0"))
    for answer_ in evaluate(str(model_path), small, tmp_path, jobs=1).answers():
        n_heads = 2 * sum(answer_.n_kept or ())
        assert answer_.kv_bytes == n_heads * (34 + 18)  # 32 elements with a scale of two bytes
    assert made == [(8, 2), (2, 8)]
    assert kv_types("q8_0/q4_0") == (8, 2)
    assert kv_types("q8_0") == (8, 8)
    with pytest.raises(ConfigError, match="types_kv='q8_0/'"):
        kv_types("q8_0/")


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
