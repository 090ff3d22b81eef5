"""Compares every method's scores with its formula, written as plain loops, and checks the guarantees of all plans."""

from __future__ import annotations

import doctest
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.rows import ArrayRows

from kvcompose_gguf import ConfigError
from kvcompose_gguf.measurements.calibration import Calibration
from kvcompose_gguf.methods import METHODS, Method, make_method, register
from kvcompose_gguf.methods.allocation import GlobalRanking, Pyramid, Uniform
from kvcompose_gguf.methods.custom import Custom
from kvcompose_gguf.methods.expected_attention import ExpectedAttention, mean_rotation
from kvcompose_gguf.methods.keydiff import KeyDiff
from kvcompose_gguf.methods.knorm import KNorm
from kvcompose_gguf.methods.kvcompose import KVCompose
from kvcompose_gguf.methods.kvzip import KVzip
from kvcompose_gguf.methods.observed_attention import ObservedAttention
from kvcompose_gguf.methods.pyramidkv import PyramidKV
from kvcompose_gguf.methods.random_tokens import RandomTokens
from kvcompose_gguf.methods.snapkv import SnapKV
from kvcompose_gguf.methods.streaming_llm import StreamingLLM
from kvcompose_gguf.methods.tova import TOVA
from kvcompose_gguf.plan.geometry import LayerGeometry
from kvcompose_gguf.scoring.evidence import Evidence
from kvcompose_gguf.scoring.requests import AttentionRequest, Prefill, Prompts, Repeat, StateRequest, Window

Scores = list[list[list[float]]]  # layer, KV head, token
N_EMBD_K, N_EMBD_V = 6, 4
#: query heads and KV heads of every layer
MODELS = {
    "one head": [(1, 1)],
    "MHA": [(4, 4), (4, 4)],
    "GQA": [(8, 2), (8, 2)],
    "MQA": [(4, 1), (4, 1)],
    "layers that differ": [(8, 4), (6, 2), (3, 1)],
}
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


def rotate(rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Applies RoPE to the first four elements in pairs (0, 2) and (1, 3), with an attention factor as in YaRN."""
    assert rows.dtype == np.float32
    assert rows.shape == (len(positions), N_EMBD_K)
    angles = positions[:, None] * np.array([1.0, 0.01])
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = rows[:, :2], rows[:, 2:4]
    return 1.1 * np.concatenate([a * cos - b * sin, a * sin + b * cos, rows[:, 4:]], axis=1).astype(np.float32)


def make_evidence(
    model: str = "GQA", n_tokens: int = 23, kind: str = "continuous", n_window: int = 0, n_queries: int = 512
) -> Evidence:
    """Returns random evidence; ``"ties"`` has repeated values everywhere, ``"all equal"`` only one value."""
    rng = np.random.default_rng((len(model), n_tokens))
    layers = [
        LayerGeometry(il, n_head, n_head_kv, N_EMBD_K, N_EMBD_V, 1, 1, False, 64)
        for il, (n_head, n_head_kv) in enumerate(MODELS[model])
    ]

    def array(*shape: int, negative: bool = True) -> np.ndarray:
        if kind == "continuous":
            return (rng.standard_normal(shape) if negative else rng.random(shape)).astype(np.float32)
        if kind == "ties":
            return (rng.integers(-2 if negative else 0, 3, shape) / 4).astype(np.float32)
        return np.full(shape, 0.5, np.float32)

    attention = [array(g.n_head, n_tokens, negative=False) for g in layers]
    keys = [array(g.n_head_kv, n_tokens, N_EMBD_K) for g in layers]
    values = [array(g.n_head_kv, n_tokens, N_EMBD_V) for g in layers]
    queries = [array(g.n_head, min(n_queries, n_tokens), N_EMBD_K) * np.float32(0.4) for g in layers]
    return Evidence(
        n_tokens, layers, attention, n_window, ArrayRows(keys, values, rotate), queries
    )  # fmt: skip


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def norm(vector: np.ndarray) -> float:
    return math.sqrt(sum(float(x) ** 2 for x in vector))


def dot(a: np.ndarray, b: np.ndarray) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def grouped(evidence: Evidence, l: int, aggregate: Callable[[list[float]], float], attention: Any) -> list[list[float]]:
    """Returns ``attention[query head][token]`` aggregated over the query heads of every KV head."""
    layer = evidence.layers[l]
    n_group = layer.n_head // layer.n_head_kv
    return [
        [aggregate([float(attention[h * n_group + g][i]) for g in range(n_group)]) for i in range(len(attention[0]))]
        for h in range(layer.n_head_kv)
    ]


#
# the formulas
#


def streaming_llm(evidence: Evidence) -> Scores:
    return [[[float(i) for i in range(evidence.n_tokens)]] * layer.n_head_kv for layer in evidence.layers]


def observed_attention(evidence: Evidence) -> Scores:
    return [grouped(evidence, l, mean, evidence.attention[l]) for l in range(len(evidence.layers))]


def kvzip(evidence: Evidence) -> Scores:
    return [grouped(evidence, l, max, evidence.attention[l]) for l in range(len(evidence.layers))]


def tova(evidence: Evidence) -> Scores:
    scores: Scores = []
    for layer, attention in zip(evidence.layers, evidence.attention, strict=True):
        row = [mean([float(head[i]) for head in attention]) for i in range(evidence.n_tokens)]
        for i in range(evidence.n_tokens - evidence.n_window, evidence.n_tokens):
            row[i] = math.inf
        scores.append([row] * layer.n_head_kv)
    return scores


def snapkv(evidence: Evidence, kernel: int = 5, pooling: str = "mean") -> Scores:
    n_before = evidence.n_tokens - evidence.n_window
    scores: Scores = []
    for l, attention in enumerate(evidence.attention):
        pooled = []
        for head in attention:
            row = []
            for i in range(n_before):
                near = [float(head[j]) for j in range(i - kernel // 2, i + kernel // 2 + 1) if 0 <= j < n_before]
                row.append(max(near) if pooling == "max" else sum(near) / kernel)
            pooled.append(row)
        scores.append([row + [math.inf] * evidence.n_window for row in grouped(evidence, l, mean, pooled)])
    return scores


def knorm(evidence: Evidence) -> Scores:
    return [[[-norm(key) for key in head] for head in evidence.keys(l)] for l in range(len(evidence.layers))]


def keydiff(evidence: Evidence) -> Scores:
    scores: Scores = []
    for l in range(len(evidence.layers)):
        scores.append([])
        for head in evidence.keys(l).astype(np.float64):
            directions = [key / max(norm(key), 1e-12) for key in head]
            anchor = np.mean(directions, axis=0)
            scores[l].append([-dot(key, anchor) / max(norm(anchor), 1e-8) for key in directions])
    return scores


def expected_attention(
    evidence: Evidence,
    n_sink: int = 4,
    n_future: int = 512,
    use_covariance: bool = True,
    use_vnorm: bool = True,
    epsilon: float = 0.0,
) -> Scores:
    """Rotates every query to every future position; the moments are those of its mean over these positions."""
    n_tokens = evidence.n_tokens
    scores: Scores = []
    for l, layer in enumerate(evidence.layers):
        states, keys, values = (evidence.read(what, l) for what in ("states", "keys", "values"))
        first = n_tokens - states.queries.shape[1]
        attention = []
        for head, queries in enumerate(states.queries):
            sample = []
            for i, query in enumerate(queries):
                if first + i >= n_sink:
                    positions = np.arange(n_tokens, n_tokens + n_future, dtype=np.int32)
                    sample.append(rotate(np.tile(query, (n_future, 1)), positions).astype(np.float64).mean(axis=0))
            logits = []
            for key in keys[head * layer.n_head_kv // layer.n_head][n_sink:].astype(np.float64):
                products = [dot(query, key) for query in sample]
                variance = mean([(x - mean(products)) ** 2 for x in products])
                logits.append(mean(products) + (variance / 2 if use_covariance else 0))
            weights = [math.exp(x - max(logits)) for x in logits]
            attention.append([x / sum(weights) for x in weights])
        scores.append([])
        for h, row in enumerate(grouped(evidence, l, mean, attention)):
            if use_vnorm:
                row = [(x + epsilon) * norm(value) for x, value in zip(row, values[h][n_sink:], strict=True)]
            scores[l].append([math.inf] * min(n_sink, n_tokens) + row)
    return scores


def assert_scores(method: Method, evidence: Evidence, expected: Scores) -> list[np.ndarray]:
    scores = method.scores(evidence)
    for got, rows in zip(scores, expected, strict=True):
        assert got.dtype == np.float32
        assert got.shape == (len(rows), evidence.n_tokens)
        np.testing.assert_array_equal(np.isinf(got), np.isinf(rows))
        difference = np.abs(np.nan_to_num(got, posinf=0) - np.nan_to_num(rows, posinf=0))
        np.testing.assert_allclose(got, rows, 2e-5, 1e-6, err_msg=f"largest difference {difference.max()}")
    return scores


def assert_plan(method: Method, evidence: Evidence, scores: list[np.ndarray], n_kept: list[int]) -> None:
    """Returns each head's sinks, then its highest scores, lowest index first."""
    plan = method.plan(evidence)
    for cells, rows, n in zip(plan.cells, scores, n_kept, strict=True):
        for kept, row in zip(cells, rows, strict=True):
            order = sorted(range(evidence.n_tokens), key=lambda i: (i >= method.n_sink, -float(row[i]), i))
            assert kept.tolist() == sorted(order[:n])


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
    rows = full.rows
    assert isinstance(rows, ArrayRows)
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
        assert [len(cells) for cells in plan.cells] == [layer.n_head_kv for layer in evidence.layers]
        again = built_in(name, evidence, compression_ratio=ratio).plan(evidence)
        assert [cells.tolist() for cells in plan.cells] == [cells.tolist() for cells in again.cells]
        for cells in plan.cells:
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
    for cells in plan.cells:
        assert (cells[:, :7] == np.arange(7)).all()
    plan = built_in(name, evidence, compression_ratio=0.9, n_sink=7).plan(evidence)  # 17 tokens, at least 5 a layer
    for cells in plan.cells:
        assert (cells[:, :5] == np.arange(5)).all()


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("n_tokens", [1, 2, 5, 14, 40])
def test_no_length_of_a_context_makes_a_valid_budget_raise(name: str, n_tokens: int) -> None:
    evidence = make_evidence("layers that differ", n_tokens, n_window=min(2, n_tokens))
    row = max(layer.n_bytes_row for layer in evidence.layers)
    budgets = [{"compression_ratio": ratio} for ratio in (0.5, 0.9, 0.99, 0.999)]
    for bought in [*budgets, {"n_kept": 0.5}, {"n_kept": 4}, {"max_kv_bytes": 3 * row}]:
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
    for cells in itertools.chain.from_iterable(plan.cells):
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
    for cells in TOVA(compression_ratio=0.8).plan(evidence).cells:
        assert (cells == cells[0]).all()
        assert cells[0, -1] == 49


def test_streaming_llm_keeps_the_first_and_the_last_tokens() -> None:
    for cells in StreamingLLM(n_kept=10).plan(make_evidence("GQA", 50)).cells:
        assert cells.tolist() == [[0, 1, 2, 3, *range(44, 50)]] * 2


def test_random_tokens_are_other_ones_in_every_head_and_for_every_seed() -> None:
    evidence = make_evidence("MHA", 60)
    plans = [RandomTokens(n_kept=20, seed=seed).plan(evidence) for seed in (0, 1, 0)]
    heads = [tuple(cells) for plan in plans for layer in plan.cells for cells in layer.tolist()]
    assert len(set(heads[:16])) == 16
    assert heads[:8] == heads[16:]
    kept = np.concatenate([cells.ravel() for plan in plans[:2] for cells in plan.cells])
    assert abs(kept.mean() - 29.5) < 3


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


#
# names and options
#


def test_every_method_has_its_name() -> None:
    assert set(NAMES) | {"kvcompose"} <= set(METHODS)
    for name, cls in NAMES.items():
        assert type(make_method(name, compression_ratio=0.5)) is cls


def test_a_spec_sets_options() -> None:
    assert make_method("snapkv,window=32,pooling=max", n_kept=9) == SnapKV(n_kept=9, window=32, pooling="max")
    assert make_method("pyramidkv, beta = 7.5,n_kept=9") == PyramidKV(n_kept=9, beta=7.5)
    assert make_method("kvzip,scoring_chunk=None,n_sink=0", n_kept=9) == KVzip(n_kept=9, scoring_chunk=None, n_sink=0)
    assert make_method("random,seed=5", n_kept=9) == RandomTokens(n_kept=9, seed=5)
    assert make_method("expected-attention,use_vnorm=False", n_kept=9) == ExpectedAttention(n_kept=9, use_vnorm=False)
    assert make_method("kvcompose_gguf.methods.tova:TOVA", n_kept=9) == TOVA(n_kept=9)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"a, b=c"', "a, b=c"), (' "a" ', "a"), ("'a\\n,'", "a\n,"), ("the last, of=it", None), ("a b", "a b"),
        ("/a/b'c", "/a/b'c"), ("[x", "[x"), ("", ""), ("f(1)", "f(1)"),
    ],
)  # fmt: skip
def test_texts_of_a_spec_have_commas_if_they_are_quoted(text: str, value: str | None) -> None:
    if value is None:
        with pytest.raises(ConfigError, match="unexpected keyword argument 'of'"):
            make_method(f"kvcompose,instruction={text},n_kept=9")
        return
    got = make_method(f"kvcompose,n_sink=1,instruction={text},window=3", n_kept=9)
    assert got == KVCompose(n_kept=9, n_sink=1, instruction=value, window=3)


def test_lists_in_a_spec_have_commas() -> None:
    method = make_method('kvcompose,prompts=["a, b", "c"],scoring=prompts,scoring_chunk=None', n_kept=9)
    assert method == KVCompose(n_kept=9, scoring="prompts", prompts=["a, b", "c"], scoring_chunk=None)
    assert hash(method.attention_request) == hash(AttentionRequest(Prompts(("a, b", "c"), None)))


def test_an_error_inside_of_a_method_is_not_taken_for_a_wrong_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**options: Any) -> Method:
        raise TypeError("a bug")

    monkeypatch.setattr("kvcompose_gguf.methods.METHODS", {"broken": broken})
    with pytest.raises(TypeError, match="a bug"):
        make_method("broken,n_kept=3")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("snap-kv", "method='snap-kv' is none of kvcompose, .*snapkv"),
        ("snapkv,window", "'window' is not option=value"),
        ("snapkv,windows=3", "unexpected keyword argument 'windows'; its options are .*n_sink.*, window, kernel"),
        ("snapkv,window=0", "window=0 is not positive"),
        ("snapkv,window=1.5", "window=1.5 is not an integer"),
        ("snapkv,kernel=4", "kernel=4 is not odd"),
        ("snapkv,kernel=-1", "kernel=-1 is not positive"),
        ("snapkv,pooling=median", "pooling='median' is none of 'mean', 'max'"),
        ("pyramidkv,beta=0.5", "beta=0.5 is below 1"),
        ("pyramidkv,beta=steep", "beta='steep' is not a number"),
        ("pyramidkv,window=0", "window=0 is not positive"),
        ("expected-attention,n_queries=0", "n_queries=0 is not positive"),
        ("expected-attention,n_future=0", "n_future=0 is not positive"),
        ("expected-attention,epsilon=-1", "epsilon=-1 is negative"),
        ("expected-attention,epsilon=1e999", "epsilon=inf is negative or not finite"),
        ("expected-attention,use_vnorm=no", "use_vnorm='no' is neither True nor False"),
        ("expected-attention,use_covariance=1", "use_covariance=1 is neither"),
        ("kvzip,scoring_chunk=0", "scoring_chunk=0 is not positive"),
        ("kvzip,scoring_chunk=1.5", "scoring_chunk=1.5 is not an integer"),
        ("random,seed=-1", "seed=-1 is negative"),
        ("random,seed=x", "seed='x' is not an integer"),
        ("streaming-llm,n_sink=-1", "n_sink=-1 is negative"),
        ("tova,n_kept=3", "exactly one of .* 2 given"),
        ("kvcompose_gguf.methods.tova:Tova", "cannot be imported"),
        ("argparse:Namespace", "is not a Method"),
        ("builtins:dict", "does not name a Python class or function"),
        ("math:pi", "does not name a Python class or function"),
        (":X", "is none of .*, nor module:attribute"),
        ("math:", "is none of .*, nor module:attribute"),
        (".math:pi", "is none of .*, nor module:attribute"),
        ("snapkv,window=3,window=3", "window is given twice"),
        ("snapkv,compression_ratio=0.5", "compression_ratio is given twice"),
        ("snapkv,window=3,", "'' is not option=value"),
    ],
)
def test_a_spec_out_of_range_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method(spec, compression_ratio=0.5)


#
# one's own
#


def test_the_documented_ten_lines_are_a_method() -> None:
    [example] = doctest.DocTestFinder(recurse=False).find(Custom, "Custom", globs={})
    assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
    method = example.globs["method"]
    assert method.attention_request == AttentionRequest(Window(32), "mean")
    assert method.state_request is None

    evidence = make_evidence("layers that differ", 40)
    expected = kvzip(evidence)
    for l, scores in enumerate(expected):
        for row, values in zip(scores, evidence.values(l), strict=True):
            row[:] = [x * norm(value) for x, value in zip(row, values, strict=True)]
    assert_plan(method, evidence, assert_scores(method, evidence, expected), [10, 10, 10])


def test_a_custom_scorer_needs_no_request_and_may_return_any_floats() -> None:
    evidence = make_evidence("GQA", 12)

    def every_third(evidence: Evidence) -> list[Any]:
        return [[[float(i % 3 == 0) for i in range(evidence.n_tokens)]] * g.n_head_kv for g in evidence.layers]

    method = Custom(n_kept=4, scorer=every_third)
    assert (method.attention_request, method.state_request) == (None, None)
    for cells in method.plan(evidence).cells:
        assert cells.tolist() == [[0, 3, 6, 9]] * 2
    assert Custom(n_kept=4, scorer=every_third, states=StateRequest(8)).state_request == StateRequest(8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorer": None}, "scorer=None is not a function"),
        ({"scorer": len, "request": Window(3)}, "request=.* is not of class AttentionRequest"),
        ({"scorer": len, "states": 3}, "states=3 is not of class StateRequest"),
        ({"scorer": len, "n_sink": -1}, "n_sink=-1 is negative"),
    ],
)
def test_a_custom_method_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Custom(n_kept=4, **options)


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda: Repeat(chunk=-1), "chunk=-1 is not positive"), (lambda: Repeat(chunk=0), "chunk=0 is not positive"),
        (lambda: Repeat(chunk=True), "chunk=True is not an integer"), (lambda: Repeat(fraction=0), "fraction=0 is not in"),
        (lambda: Repeat(fraction=math.nan), "fraction=nan is not in"), (lambda: Repeat(fraction="1"), "is not a number"),
        (lambda: Repeat(instruction=None), "instruction=None is not a text"),
        (lambda: Repeat(continuation=b"x"), "continuation=b'x' is not a text"), (lambda: Repeat(own=1), "own=1 is neither"),
        (lambda: Repeat(own=True, fraction=0.5), "own=True needs the whole context, fraction=1, not 0.5"),
        (lambda: Prompts([]), r"texts=\[\] is not a list of texts"), (lambda: Prompts("who?"), "texts='who\\?' is not"),
        (lambda: Prompts(["", "a"]), "is not a list of texts"), (lambda: Prompts(["a"], 0), "chunk=0 is not positive"),
        (lambda: Window(0), "size=0 is not positive"), (lambda: Window(1.5), "size=1.5 is not an integer"),
        (lambda: AttentionRequest(Window(1), "sum"), "aggregation='sum' is none of 'max', 'mean'"),
        (lambda: AttentionRequest(Window), "queries=.* is none of Repeat, Prompts, Window and Prefill"),
        (lambda: StateRequest(0), "n_queries=0 is not positive"), (lambda: StateRequest(None), "is not an integer"),
    ],
)  # fmt: skip
def test_a_request_out_of_range_is_refused(request_of: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        request_of()


def test_prompts_may_be_a_list() -> None:
    assert Prompts(["a", "b"]) == Prompts(("a", "b"))
    assert hash(AttentionRequest(Prompts(["a"]))) == hash(AttentionRequest(Prompts(("a",))))


@pytest.mark.parametrize("infinite", [[-np.inf], [-np.inf, np.inf], [np.inf, np.nan]], ids=str)
def test_scores_of_minus_infinity_are_refused(infinite: list[float]) -> None:
    scores = np.zeros((2, 12), np.float32)
    scores[1, : len(infinite)] = infinite
    with pytest.raises(ConfigError, match=r"scores\[0\] has NaN or -infinity"):
        Custom(n_kept=4, scorer=lambda e: [scores, scores]).plan(make_evidence("GQA", 12))


@pytest.mark.parametrize(
    "bad", [lambda e: [], lambda e: [np.zeros((2, 3))] * 2, lambda e: [np.full((2, 12), np.nan)] * 2]
)
def test_a_custom_scorer_of_another_shape_is_refused(bad: Callable[[Evidence], Any]) -> None:
    with pytest.raises(ConfigError, match="scores"):
        Custom(n_kept=4, scorer=bad).plan(make_evidence("GQA", 12))


def test_a_scorer_is_registered_like_a_built_in_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcompose_gguf.methods.METHODS", dict(METHODS))
    register("by-norm", lambda **options: Custom(scorer=lambda e: KNorm(n_kept=1).scores(e), **options))
    evidence = make_evidence()
    got = make_method("by-norm,n_kept=5").plan(evidence)
    assert [c.tolist() for c in got.cells] == [c.tolist() for c in KNorm(n_kept=5).plan(evidence).cells]
    with pytest.raises(ConfigError, match="'by-norm' is taken"):
        register("by-norm", KNorm)
