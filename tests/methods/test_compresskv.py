"""Compares CompressKV's choice of tokens and its budgets with the paper's rules, written as plain loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompose_gguf import ConfigError
from kvcompose_gguf.kernels import aggregate
from kvcompose_gguf.measurements.calibration import Calibration, save_calibration
from kvcompose_gguf.methods import make_method
from kvcompose_gguf.methods.allocation import ByEvictionError, Ranked, Uniform
from kvcompose_gguf.methods.compresskv import CompressKV
from kvcompose_gguf.models.hashes import model_sha256
from kvcompose_gguf.plan.geometry import LayerGeometry
from kvcompose_gguf.scoring.evidence import Evidence
from kvcompose_gguf.scoring.requests import AttentionRequest, Window

#: query heads and KV heads of every layer
MODELS = {
    "one head": [(1, 1)],
    "MHA": [(6, 6), (6, 6)],
    "GQA": [(8, 2), (8, 2), (8, 2)],
    "MQA": [(4, 1), (4, 1)],
    "layers that differ": [(8, 4), (6, 2), (3, 1)],
}


def make_evidence(model: str, n_tokens: int, n_window: int, values: int = 0) -> Evidence:
    """Returns random attention; ``values`` limits the number of distinct values, which makes ties."""
    rng = np.random.default_rng((len(model), n_tokens))
    layers = [LayerGeometry(il, *heads, 4, 4, 1, 1, False, 64) for il, heads in enumerate(MODELS[model])]
    shapes = [(layer.n_head, n_tokens) for layer in layers]
    arrays: list[np.ndarray] = [rng.integers(0, values, shape) / 4 if values else rng.random(shape) for shape in shapes]
    return Evidence(n_tokens, layers, [array.astype(np.float32) for array in arrays], n_window)


def make_calibration(model: str, kind: str = "random") -> Calibration:
    rng = np.random.default_rng(len(kind))
    heads: list[np.ndarray] = [
        rng.random(n_head) if kind == "random" else np.zeros(n_head) for n_head, _ in MODELS[model]
    ]
    if kind == "ties":
        heads = [np.arange(len(scores)) // 2 % 2 * 1.0 for scores in heads]
    return Calibration("tiny", "0", tuple(map(tuple, heads)), (1 / len(heads),) * len(heads))


def specified_scores(evidence: Evidence, method: CompressKV, l: int) -> list[list[float]]:
    assert method.calibration is not None
    layer, attention, heads = evidence.layers[l], evidence.attention[l], method.calibration.heads[l]
    n_group, n_before = layer.n_head // layer.n_head_kv, evidence.n_tokens - evidence.n_window
    out = []
    for h in range(layer.n_head_kv):
        if method.per_head:
            own = range(h * n_group, (h + 1) * n_group)
            total = sum(heads[i] for i in own)
            weights = {i: heads[i] / total if total else 1 / n_group for i in own}
        else:
            best = sorted(range(layer.n_head), key=lambda i: (-heads[i], i))[: method.n_heads]
            weights = {i: 1 / len(best) for i in best}
        mean = [sum(weight * float(attention[i][j]) for i, weight in weights.items()) for j in range(n_before)]
        padded = [0.0] * (method.kernel // 2) + mean + [0.0] * (method.kernel // 2)
        pooled = [sum(padded[j : j + method.kernel]) / method.kernel for j in range(n_before)]
        out.append(pooled + [math.inf] * evidence.n_window)
    return out


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("kind", ["random", "ties", "zeros"])
@pytest.mark.parametrize(("n_tokens", "n_window"), [(40, 8), (40, 3), (9, 0), (8, 8), (1, 1), (1, 0), (3, 2)])
@pytest.mark.parametrize("model", MODELS)
def test_scores_are_the_papers(model, n_tokens, n_window, kind, per_head):
    evidence = make_evidence(model, n_tokens, n_window)
    choices: list[dict[str, Any]] = [{}, {"n_heads": 1, "kernel": 1}, {"n_heads": 99, "kernel": 7}]
    for options in choices:
        method = CompressKV(n_kept=5, per_head=per_head, calibration=make_calibration(model, kind), **options)
        for l, scores in enumerate(method.scores(evidence)):
            want = np.array(specified_scores(evidence, method, l))
            assert scores.dtype == np.float32
            assert scores.shape == want.shape
            finite = np.isfinite(want)
            assert (np.isfinite(scores) == finite).all()
            difference = np.abs(scores[finite] - want[finite]).max(initial=0)
            assert difference < 1e-6, f"the largest difference is {difference}"


@pytest.mark.parametrize("model", MODELS)
def test_a_layers_kv_heads_keep_the_same_tokens_unless_each_has_its_own(model):
    evidence = make_evidence(model, 60, 8)
    method = CompressKV(n_kept=20, calibration=make_calibration(model))
    plan = method.plan(evidence)
    assert plan.n_kept.sum() == 20 * len(evidence.layers)
    for cells in plan.rows:
        assert (cells == cells[0]).all()
        assert (cells[:, -8:] == np.arange(52, 60)).all()
    own = CompressKV(n_kept=20, per_head=True, calibration=method.calibration).plan(evidence)
    assert own.n_kept.tolist() == plan.n_kept.tolist()
    if all(layer.n_head_kv > 1 for layer in evidence.layers):
        assert all((cells != cells[0]).any() for cells in own.rows)


def test_the_only_head_of_a_group_judges_alone_when_the_others_never_retrieve():
    evidence = make_evidence("GQA", 50, 8)
    heads = ((0.0, 0.0, 3.0, 0.0, 1.0, 0.0, 0.0, 0.0),) * 3
    method = CompressKV(n_kept=9, per_head=True, kernel=1, calibration=Calibration("", "", heads, (0.5, 0.25, 0.25)))
    for scores, attention in zip(method.scores(evidence), evidence.attention, strict=True):
        assert (scores[:, :42] == attention[[2, 4], :42]).all()


#
# budgets
#


def ranked(n_layer: int, n_tokens: int) -> Ranked:
    scores = [np.ones((1, n_tokens), np.float32)] * n_layer
    return Ranked(scores, [aggregate.rank_tokens(s) for s in scores])


def specified_budgets(errors: list[float], n_tokens: int, n_total: int, floor: int) -> list[int]:
    """The authors' error_aware_layer_budget_allocation (pred_compresskv.py), plus limits for cases that it ignores."""
    n_layer = len(errors)
    low = max(floor, min(32, n_total // n_layer))
    high = min(n_tokens, math.ceil(3 * n_total / n_layer))
    n_kept = [min(high, max(low, low + round(e * (n_total - low * n_layer)))) for e in errors]
    while sum(n_kept) != n_total:
        step = 1 if sum(n_kept) < n_total else -1
        for l in sorted(range(n_layer), key=lambda l: (-step * errors[l], l)):
            if sum(n_kept) != n_total and (n_kept[l] < high if step > 0 else n_kept[l] > low):
                n_kept[l] += step
    return n_kept


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_budgets_are_the_authors(data):
    n_layer = data.draw(st.integers(1, 9))
    n_tokens = data.draw(st.integers(1, 700))
    floor = data.draw(st.integers(0, min(n_tokens, 40)))
    n_total = data.draw(st.integers(n_layer * floor, n_layer * n_tokens))
    weights = data.draw(st.lists(st.integers(0, 9), min_size=n_layer, max_size=n_layer).filter(any))
    errors = [weight / sum(weights) for weight in weights]
    n_kept = ByEvictionError(tuple(errors)).n_kept(ranked(n_layer, n_tokens), n_total, floor)
    assert n_kept.dtype == np.int64
    assert n_kept.sum() == n_total
    assert n_kept.min() >= max(floor, min(32, n_total // n_layer))
    assert n_kept.max() <= n_tokens
    assert n_kept.tolist() == specified_budgets(errors, n_tokens, n_total, floor)


def test_the_papers_formula_where_nothing_is_cut():
    errors = (0.4, 0.1, 0.3, 0.2)
    assert ByEvictionError(errors).n_kept(ranked(4, 4096), 4 * 256, 0).tolist() == [
        32 + round(e * (256 * 4 - 32 * 4)) for e in errors
    ]
    # a layer with all of the error gets 3B; the rest is dealt out one by one
    assert ByEvictionError((1.0, 0.0, 0.0, 0.0)).n_kept(ranked(4, 4096), 4 * 256, 0).tolist() == [768, 86, 85, 85]
    assert ByEvictionError((0.0, 0.0, 0.0, 1.0)).n_kept(ranked(4, 300), 4 * 256, 0).tolist() == [242, 241, 241, 300]


def test_small_budgets_are_even():
    assert ByEvictionError((0.7, 0.2, 0.1)).n_kept(ranked(3, 100), 3 * 20, 0).tolist() == [20, 20, 20]
    assert ByEvictionError((0.1, 0.2, 0.7)).n_kept(ranked(3, 100), 3 * 20 + 1, 0).tolist() == [20, 20, 21]
    assert ByEvictionError((0.1, 0.2, 0.7)).n_kept(ranked(3, 100), 2, 0).tolist() == [0, 0, 2]  # ceil(3B)
    assert ByEvictionError((0.1, 0.2, 0.7)).n_kept(ranked(3, 100), 0, 0).tolist() == [0, 0, 0]


def test_a_long_context_is_divided_at_once():
    errors = (1.0, *[0.0] * 31)
    n_kept = ByEvictionError(errors).n_kept(ranked(32, 200_000), 32 * 100_000, 0)
    assert n_kept[0] == 200_000
    assert set(n_kept[1:]) <= {96774, 96775}


def test_impossible_budgets_are_refused():
    for errors in ((0.5, 0.6), (-0.5, 1.5), (math.nan, 1.0), (), (math.inf, 0.0)):
        with pytest.raises(ConfigError, match="errors="):
            ByEvictionError(errors)
    for options in ({"least": -1}, {"most": 0}):
        with pytest.raises(ConfigError, match="least="):
            ByEvictionError((1.0,), **options)
    with pytest.raises(ConfigError, match="2 errors do not fit a cache of 3 layers"):
        ByEvictionError((0.5, 0.5)).n_kept(ranked(3, 10), 9, 0)
    with pytest.raises(ConfigError, match="cannot be kept"):
        ByEvictionError((0.5, 0.5)).n_kept(ranked(2, 10), 21, 0)


#
# options and calibrations
#


def test_defaults_are_the_papers():
    method = make_method("compresskv", compression_ratio=0.5)
    assert isinstance(method, CompressKV)
    assert (method.window, method.n_heads, method.kernel, method.per_head) == (8, 4, 5, False)
    assert method.attention_request == AttentionRequest(Window(8), "mean")
    measured = make_calibration("GQA")
    given = CompressKV(n_kept=3, calibration=measured)
    assert given.default_allocation() == ByEvictionError(measured.errors)
    assert CompressKV(n_kept=9, calibration=measured, allocation=Uniform()).plan(
        make_evidence("GQA", 40, 8)
    ).n_kept.tolist() == [9, 9, 9]
    assert "calibration" not in repr(given)
    assert hash(given) == hash(CompressKV(n_kept=3, calibration=make_calibration("GQA")))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window"), ({"n_heads": 0}, "n_heads"), ({"kernel": 4}, "odd"), ({"kernel": 1.0}, "integer"),
        ({"per_head": 1}, "per_head"), ({"calibration": "file.json"}, "not a Calibration"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        CompressKV(n_kept=3, **options)


def test_without_a_calibration_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    method = CompressKV(n_kept=9)
    with pytest.raises(ConfigError, match=f"kvcompose learn {model} --for compresskv"):
        method.for_model(model)
    for call in (method.default_allocation, lambda: method.plan(make_evidence("GQA", 40, 8))):
        with pytest.raises(ConfigError, match="kvcompose learn MODEL --for compresskv"):
            call()
    made = make_calibration("GQA")
    made = Calibration("model", model_sha256(model), made.heads, made.errors)
    save_calibration(made)
    assert method.for_model(model).calibration == made
    given = CompressKV(n_kept=9, calibration=make_calibration("MHA"))
    assert given.for_model(model) is given


def test_a_calibration_of_another_shape_is_refused():
    for model in ("MHA", "one head", "layers that differ"):
        method = CompressKV(n_kept=9, calibration=make_calibration(model))
        with pytest.raises(ConfigError, match=r"heads per layer .* are not the model's \[8, 8, 8\]"):
            method.plan(make_evidence("GQA", 40, 8))


def test_llama_compresses_with_it(make_llama):
    from support import tiny

    heads = ((1.0, 0.0, 0.5, 0.0),) * 3
    method = CompressKV(n_kept=50, min_tokens=100, calibration=Calibration("", "", heads, (0.5, 0.3, 0.2)))
    report = make_llama(method=method).compress(tiny.tokens(tiny.GQA, 300))
    assert report.n_kept.tolist() == [59, 48, 43]


def test_a_calibration_is_the_methods_fingerprint():
    first, second = (CompressKV(n_kept=3, calibration=make_calibration(name)) for name in ("GQA", "layers that differ"))
    assert first.fingerprint() == make_calibration("GQA").to_json().encode()
    assert first.fingerprint() != second.fingerprint()
    assert CompressKV(n_kept=3).fingerprint() == b""
