"""Compares every method's scores with its formula, and checks what all methods ask for and promise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.evidence import MODELS, make_evidence, rotate
from support.formulas import (
    Scores,
    assert_plan,
    assert_scores,
    expected_attention,
    keydiff,
    knorm,
    kvzip,
    observed_attention,
    snapkv,
    streaming_llm,
    tova,
)
from support.rows import ArrayRows, rows_of

from kvcompose_gguf import ConfigError
from kvcompose_gguf.measurements.calibration import Calibration
from kvcompose_gguf.methods import METHODS, Method, make_method
from kvcompose_gguf.methods.allocation import GlobalRanking, Pyramid, Uniform
from kvcompose_gguf.methods.expected_attention import ExpectedAttention, mean_rotation
from kvcompose_gguf.methods.keydiff import KeyDiff
from kvcompose_gguf.methods.knorm import KNorm
from kvcompose_gguf.methods.kvzip import KVzip
from kvcompose_gguf.methods.observed_attention import ObservedAttention
from kvcompose_gguf.methods.pyramidkv import PyramidKV
from kvcompose_gguf.methods.random_tokens import RandomTokens
from kvcompose_gguf.methods.snapkv import SnapKV
from kvcompose_gguf.methods.streaming_llm import StreamingLLM
from kvcompose_gguf.methods.tova import TOVA
from kvcompose_gguf.scoring.evidence import Evidence
from kvcompose_gguf.scoring.requests import AttentionRequest, Prefill, Repeat, StateRequest, Window

NAMES = {
    "streaming-llm": StreamingLLM,
    "observed-attention": ObservedAttention,
    "tova": TOVA,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "knorm": KNorm,
    "keydiff": KeyDiff,
    "expected-attention": ExpectedAttention,
    "kvzip": KVzip,
    "random": RandomTokens,
}
#: taken before any test registers more methods; the unstructured upper bound has no plan
BUILT_IN = tuple(name for name in METHODS if name != "unstructured")


FORMULAS: list[tuple[type[Method], dict[str, Any], Callable[..., Scores]]] = [
    (StreamingLLM, {}, streaming_llm),
    (ObservedAttention, {}, observed_attention),
    (TOVA, {}, tova),
    (SnapKV, {}, snapkv),
    (SnapKV, {"kernel": 1}, snapkv),
    (SnapKV, {"kernel": 7, "pooling": "max"}, snapkv),
    (PyramidKV, {"kernel": 3}, snapkv),
    (KNorm, {}, knorm),
    (KeyDiff, {}, keydiff),
    (KVzip, {}, kvzip),
    (ExpectedAttention, {"n_future": 40}, expected_attention),
    (ExpectedAttention, {"n_future": 3, "n_sink": 0, "use_covariance": False}, expected_attention),
    (ExpectedAttention, {"n_future": 1, "n_sink": 2, "use_vnorm": False, "epsilon": 0.1}, expected_attention),
    (ExpectedAttention, {"n_future": 33, "epsilon": 0.01}, expected_attention),
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["continuous", "ties", "all equal"])
@pytest.mark.parametrize(("cls", "options", "formula"), FORMULAS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_scores_are_those_of_the_formula(
    cls: type[Method], options: dict[str, Any], formula: Callable[..., Scores], kind: str, model: str
) -> None:
    for n_tokens, n_window in ((1, 0), (1, 1), (2, 1), (5, 5), (5, 0), (23, 8)):
        evidence = make_evidence(model, n_tokens, kind, n_window, n_queries=12)
        method = cls(compression_ratio=0.0, **options)
        scores = assert_scores(method, evidence, formula(evidence, **options))
        n_layer = len(evidence.layers)
        for n_kept in {min(method.n_sink, n_tokens), n_tokens // 2, n_tokens} - {0}:
            if n_kept >= min(method.n_sink, n_tokens):
                uniform = cls(n_kept=n_kept, allocation=Uniform(), **options)
                assert_plan(uniform, evidence, scores, [n_kept] * n_layer)


def built_in(name: str, evidence: Evidence, **options: Any) -> Method:
    """Returns the method, calibrated for the layers of ``evidence`` if it needs a calibration."""
    if name == "compresskv":
        rng = np.random.default_rng(7)
        heads = tuple(tuple(rng.random(layer.n_head).tolist()) for layer in evidence.layers)
        errors = rng.random(len(heads))
        options["calibration"] = Calibration("tiny", "0" * 64, heads, tuple((errors / errors.sum()).tolist()), {})
    return make_method(name, **options)


#
# what they ask for
#


def test_methods_ask_for_what_they_read() -> None:
    asked = {name: make_method(name, compression_ratio=0.5) for name in NAMES}
    requests = {name: method.attention_request for name, method in asked.items() if method.attention_request}
    assert requests == {
        "observed-attention": AttentionRequest(Prefill(), "mean"),
        "tova": AttentionRequest(Window(1), "mean"),
        "snapkv": AttentionRequest(Window(64), "mean"),
        "pyramidkv": AttentionRequest(Window(64), "mean"),
        "kvzip": AttentionRequest(
            Repeat(
                2048, 1.0, "\n\nRepeat the previous context exactly.",
                "\n\nRepeat the part of the previous context exactly, starting with", own=True,
            ),
            "max",
        ),
    }  # fmt: skip
    states = {name: method.state_request for name, method in asked.items() if method.state_request}
    assert states == {"expected-attention": StateRequest(512)}
    assert SnapKV(n_kept=1, window=8).attention_request == AttentionRequest(Window(8), "mean")
    assert KVzip(n_kept=1, scoring_chunk=None).attention_request.queries == Repeat(
        None, 1.0, "\n\nRepeat the previous context exactly.",
        "\n\nRepeat the part of the previous context exactly, starting with", own=True,
    )  # fmt: skip
    assert ExpectedAttention(n_kept=1, n_queries=9).state_request == StateRequest(9)


@pytest.mark.parametrize("name", NAMES)
def test_methods_read_only_what_they_declare(name: str) -> None:
    full = make_evidence("layers that differ", 23, n_window=4)
    needed = {
        "knorm": ("keys",), "keydiff": ("keys",), "expected-attention": ("keys", "values", "states"),
        "streaming-llm": (), "random": (),
    }.get(name, ("attention",))  # fmt: skip
    method = make_method(name, compression_ratio=0.5)
    rows = rows_of(full)
    bare = Evidence(
        full.n_tokens, full.layers, full.attention if "attention" in needed else (), 4,
        ArrayRows(
            rows.all_keys if "keys" in needed else (), rows.all_values if "values" in needed else (),
            rows.turn if "states" in needed else None,
        ),
        full.queries if "states" in needed else (),
    )  # fmt: skip
    for a, b in zip(method.scores(full), method.scores(bare), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["knorm", "keydiff", "expected-attention"])
def test_evidence_without_keys_is_refused(name: str) -> None:
    full = make_evidence()
    with pytest.raises(ConfigError, match=r"the evidence has no (keys|states)"):
        make_method(name, n_kept=9).plan(Evidence(full.n_tokens, full.layers, full.attention))


#
# what every plan promises
#


@pytest.mark.parametrize("n_tokens", [50, 63, 100])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_every_method_spends_exactly_its_budget_and_is_deterministic(name: str, model: str, n_tokens: int) -> None:
    """Uses fewer tokens than some methods' windows of 64."""
    evidence = make_evidence(model, n_tokens, n_window=min(64, n_tokens))
    for ratio in (0.0, 0.5, 0.9):
        method = built_in(name, evidence, compression_ratio=ratio)
        plan = method.plan(evidence)
        assert plan.n_tokens == n_tokens
        assert plan.n_kept.sum() == method.n_composites(evidence.layers, n_tokens)
        assert [len(cells) for cells in plan.rows] == [layer.n_head_kv for layer in evidence.layers]
        again = built_in(name, evidence, compression_ratio=ratio).plan(evidence)
        assert [cells.tolist() for cells in plan.rows] == [cells.tolist() for cells in again.rows]
        for cells in plan.rows:
            assert (cells[:, : method.n_sink] == np.arange(method.n_sink)).all()


@pytest.mark.parametrize("n_tokens", [1, 2, 3])
@pytest.mark.parametrize("name", BUILT_IN)
def test_every_method_keeps_all_of_a_few_tokens_at_ratio_zero(name: str, n_tokens: int) -> None:
    evidence = make_evidence("layers that differ", n_tokens, n_window=n_tokens)
    assert built_in(name, evidence, compression_ratio=0.0).plan(evidence).n_kept.tolist() == [n_tokens] * 3


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_method_keeps_the_sinks_that_it_is_asked_for(name: str) -> None:
    evidence = make_evidence("layers that differ", 60, n_window=2)
    plan = built_in(name, evidence, compression_ratio=0.7, n_sink=7).plan(evidence)
    for cells in plan.rows:
        assert (cells[:, :7] == np.arange(7)).all()
    plan = built_in(name, evidence, compression_ratio=0.9, n_sink=7).plan(evidence)  # 17 tokens, at least 5 a layer
    for cells in plan.rows:
        assert (cells[:, :5] == np.arange(5)).all()


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("n_tokens", [1, 2, 5, 14, 40])
def test_no_length_of_a_context_makes_a_valid_budget_raise(name: str, n_tokens: int) -> None:
    evidence = make_evidence("layers that differ", n_tokens, n_window=min(2, n_tokens))
    row = max(layer.n_bytes_row for layer in evidence.layers)
    budgets: list[dict[str, Any]] = [{"compression_ratio": ratio} for ratio in (0.5, 0.9, 0.99, 0.999)]
    budgets += [{"n_kept": 0.5}, {"n_kept": 4}, {"max_kv_bytes": 3 * row}]
    for bought in budgets:
        method = built_in(name, evidence, n_sink=9, n_recent=9, **bought)
        n_kept = method.plan(evidence).n_kept
        assert n_kept.sum() == method.n_composites(evidence.layers, n_tokens) >= 1


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_method_accepts_every_allocation(name: str) -> None:
    evidence = make_evidence("layers that differ", 60, n_window=2)
    uniform = built_in(name, evidence, n_kept=20, allocation=Uniform()).plan(evidence)
    assert uniform.n_kept.tolist() == [20, 20, 20]
    pyramid = built_in(name, evidence, n_kept=20, allocation=Pyramid(0)).plan(evidence)
    assert pyramid.n_kept[0] > pyramid.n_kept[1] > pyramid.n_kept[2]
    assert built_in(name, evidence, n_kept=20, allocation=GlobalRanking()).plan(evidence).n_kept.sum() == 60


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv"])
@pytest.mark.parametrize("n_window", [0, 3, 8])
def test_what_the_context_has_of_the_window_is_kept(name: str, n_window: int) -> None:
    evidence = make_evidence("layers that differ", 90, n_window=n_window)
    for head in itertools.chain.from_iterable(evidence.attention):
        head[82:] = 0  # by score the window would go
    plan = make_method(name, compression_ratio=0.9, window=8).plan(evidence)
    for cells in itertools.chain.from_iterable(plan.rows):
        assert set(range(90 - n_window, 90)) <= set(cells.tolist())
        assert (cells >= 84).sum() == min(n_window, 6)


def test_the_attention_within_the_window_is_not_pooled_into_its_neighbours() -> None:
    evidence = make_evidence("MHA", 20, n_window=4)
    before = SnapKV(n_kept=1).scores(evidence)
    for attention in evidence.attention:
        attention[:, 16:] = 0.9
    for a, b in zip(before, SnapKV(n_kept=1).scores(evidence), strict=True):
        np.testing.assert_array_equal(a, b)


def test_pyramidkv_is_snapkv_with_budgets_that_fall() -> None:
    evidence = make_evidence("GQA", 100, n_window=8)
    snap, pyramid = (cls(compression_ratio=0.5, window=8, n_sink=2) for cls in (SnapKV, PyramidKV))
    for a, b in zip(snap.scores(evidence), pyramid.scores(evidence), strict=True):
        np.testing.assert_array_equal(a, b)
    assert snap.plan(evidence).n_kept.tolist() == [50, 50]
    assert pyramid.plan(evidence).n_kept.tolist() == [88, 12]  # 10 + 40 +- 38
    assert PyramidKV(n_kept=1).default_allocation() == Pyramid(64, 20)
    assert PyramidKV(n_kept=1, window=8, beta=3.5).default_allocation() == Pyramid(8, 3.5)


def test_tova_keeps_the_same_tokens_in_all_heads() -> None:
    evidence = make_evidence("layers that differ", 50, n_window=1)
    for cells in TOVA(compression_ratio=0.8).plan(evidence).rows:
        assert (cells == cells[0]).all()
        assert cells[0, -1] == 49


def test_streaming_llm_keeps_the_first_and_the_last_tokens() -> None:
    for cells in StreamingLLM(n_kept=10).plan(make_evidence("GQA", 50)).rows:
        assert cells.tolist() == [[0, 1, 2, 3, *range(44, 50)]] * 2


def test_random_tokens_are_other_ones_in_every_head_and_for_every_seed() -> None:
    evidence = make_evidence("MHA", 60)
    plans = [RandomTokens(n_kept=20, seed=seed).plan(evidence) for seed in (0, 1, 0)]
    heads = [tuple(cells) for plan in plans for layer in plan.rows for cells in layer.tolist()]
    assert len(set(heads[:16])) == 16
    assert heads[:8] == heads[16:]
    kept = np.concatenate([cells.ravel() for plan in plans[:2] for cells in plan.rows])
    assert abs(kept.mean() - 29.5) < 3


def test_keydiff_measures_later_parts_against_all_tokens_so_far() -> None:
    """Specification: the anchor of a part is the mean of the normalised keys of this part and of all before it."""
    whole, method, found = make_evidence("GQA", 30), KeyDiff(n_kept=1), []
    for first, n in ((0, 12), (12, 10), (22, 8)):
        rows = ArrayRows([whole.keys(l)[:, first : first + n] for l in range(2)])
        part = Evidence(n, whole.layers, rows=rows, first=first, length=30)
        method = method.read_on(part)
        found.append(method.scores(part))
    for l in range(len(whole.layers)):
        keys = whole.keys(l).astype(np.float64)
        keys /= np.linalg.norm(keys, axis=2, keepdims=True)
        for (first, end), scores in zip(((0, 12), (12, 22), (22, 30)), found, strict=True):
            anchor = keys[:, :end].mean(axis=1, keepdims=True)
            cosine = (keys[:, first:end] * anchor).sum(axis=2) / np.linalg.norm(anchor, axis=2)
            np.testing.assert_allclose(scores[l], -cosine, atol=1e-6)
    np.testing.assert_array_equal(KeyDiff(n_kept=1).read_on(whole).scores(whole)[0], KeyDiff(n_kept=1).scores(whole)[0])


def test_a_key_of_no_length_is_no_error() -> None:
    evidence = make_evidence("GQA", 20, "ties")
    for l in range(2):
        evidence.keys(l)[:, 3:9] = 0
    assert_scores(KeyDiff(n_kept=1), evidence, keydiff(evidence))
    evidence.keys(0)[:] = 0
    assert (KeyDiff(n_kept=1).scores(evidence)[0] == 0).all()


def test_the_mean_rotation_is_that_of_the_positions_behind_the_context() -> None:
    states = make_evidence().states(0)
    rotation = mean_rotation(states, 100, 70)
    query = states.queries[0, :1]
    rotated = [rotate(query, np.array([p])).astype(np.float64) for p in range(100, 170)]
    np.testing.assert_allclose(query @ rotation, np.mean(rotated, axis=0), rtol=1e-5, atol=1e-6)


def test_expected_attention_is_the_expectation_for_gaussian_queries() -> None:
    """Compares with E[exp(q k)] over a large sample, at one future position and without the values' norms."""
    evidence = make_evidence("one head", 200, n_queries=200)
    method = ExpectedAttention(n_kept=1, n_sink=0, n_future=1, use_vnorm=False)
    states = evidence.states(0)
    mu, sigma = states.queries[0].mean(axis=0), np.cov(states.queries[0].T, bias=True)
    sample = np.random.default_rng(1).multivariate_normal(mu, sigma, 100_000).astype(np.float32)
    rotated = rotate(sample, np.full(len(sample), 200))
    expected = np.exp(rotated @ evidence.keys(0)[0].T).mean(axis=0)
    expected /= expected.sum()
    np.testing.assert_allclose(method.scores(evidence)[0][0], expected, rtol=0.25)


def test_scores_do_not_change_the_evidence() -> None:
    def arrays(evidence: Evidence) -> list[np.ndarray]:
        reads = [read(l) for read in (evidence.keys, evidence.values) for l in range(3)]
        return [*evidence.attention, *reads, *(evidence.states(l).queries for l in range(3))]

    evidence = make_evidence("layers that differ", 23, n_window=4)
    before = [array.copy() for array in arrays(evidence)]
    for name in BUILT_IN:
        built_in(name, evidence, n_kept=9, n_sink=2).plan(evidence)
    for a, b in zip(before, arrays(evidence), strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_method_has_its_name() -> None:
    assert set(NAMES) | {"kvcompose"} <= set(METHODS)
    for name, cls in NAMES.items():
        assert type(make_method(name, compression_ratio=0.5)) is cls
