"""Tests variants that force tokens or change the scores."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support import tiny
from support.arrays import assert_close
from support.evidence import make_evidence
from support.llamas import Q8_0
from support.rows import ArrayRows

from kvcompose_gguf import ConfigError, UnsupportedError
from kvcompose_gguf.methods import make_method
from kvcompose_gguf.methods.kvcompose import KVCompose
from kvcompose_gguf.methods.snapkv import SnapKV
from kvcompose_gguf.methods.variant import Variant, output_grams
from kvcompose_gguf.plan.geometry import LayerGeometry
from kvcompose_gguf.scoring.evidence import Evidence
from kvcompose_gguf.scoring.requests import AttentionRequest, Repeat

N = 80
CONTEXT = tiny.tokens(tiny.GQA, N)


#
# tokens that every head keeps
#

FORCED = (
    "kvcompose", "kvcompose,allocation=uniform", "kvcompose,first_layer_rule=True", "snapkv,window=4", "pyramidkv,window=4",
    "tova", "keydiff", "knorm", "streaming-llm", "kvzip", "random", "variant,pool=3",
)  # fmt: skip


@pytest.mark.parametrize("spec", FORCED)
@pytest.mark.parametrize(("n_sink", "n_recent", "ratio"), [(0, 6, 0.8), (5, 0, 0.8), (3, 7, 0.83), (3, 7, 0.5), (0, 9, 0.85)])  # fmt: skip
def test_first_and_last_tokens_are_kept_by_every_head_of_every_method(spec, n_sink, n_recent, ratio):
    evidence = make_evidence("layers that differ", 60, n_window=min(4, n_recent))
    method = make_method(spec, compression_ratio=ratio, n_sink=n_sink, n_recent=n_recent)
    plan = method.plan(evidence)
    assert plan.n_kept.sum() == int(3 * 60 * (1 - ratio))
    for cells in itertools.chain.from_iterable(plan.rows):
        assert set(range(n_sink)) | set(range(60 - n_recent, 60)) <= set(cells.tolist())


@pytest.mark.parametrize("spec", FORCED)
def test_more_forced_tokens_than_the_budget_has_are_sinks_first_and_as_many_as_it_buys(spec):
    evidence = make_evidence("layers that differ", 60, n_window=4)
    exact = make_method(spec, n_kept=10, n_sink=3, n_recent=7)
    for cells in itertools.chain.from_iterable(exact.plan(evidence).rows):
        assert cells.tolist() == [*range(3), *range(53, 60)]
    method = make_method(spec, n_kept=9.9, n_sink=3, n_recent=7)
    assert method.forced(evidence.layers, 60) == (3, 6)
    plan = method.plan(evidence)
    assert plan.n_kept.sum() == 29
    for cells in itertools.chain.from_iterable(plan.rows):
        assert {*range(3), *range(54, 60)} <= set(cells.tolist())
    method = make_method(spec, n_kept=2, n_sink=3, n_recent=7)
    assert method.forced(evidence.layers, 60) == (2, 0)
    for cells in itertools.chain.from_iterable(method.plan(evidence).rows):
        assert cells.tolist() == [0, 1]


def test_last_tokens_are_kept_before_the_rest_of_a_window_that_the_budget_has_no_room_for():
    evidence = make_evidence("GQA", 60, n_window=16)
    for cells in itertools.chain.from_iterable(SnapKV(n_kept=8, window=16, n_recent=4).plan(evidence).rows):
        assert set(range(56, 60)) <= set(cells.tolist())


@pytest.mark.parametrize(("n_sink", "n_recent"), [(40, 40), (60, 0), (0, 60), (0, 1000), (1000, 1000)])
def test_forced_tokens_that_are_all_there_is_are_everything(n_sink, n_recent):
    evidence = make_evidence("layers that differ", 60)
    assert KVCompose(compression_ratio=0, n_sink=n_sink, n_recent=n_recent).plan(evidence).n_kept.tolist() == [60] * 3
    plan = KVCompose(compression_ratio=0.01, n_sink=n_sink, n_recent=n_recent).plan(evidence)
    assert plan.n_kept.sum() == 178
    assert plan.n_kept.min() == 59


def test_the_unstructured_upper_bound_also_keeps_the_first_and_last_tokens():
    evidence = make_evidence("GQA", 60)
    method = make_method("unstructured,n_sink=3,n_recent=5", compression_ratio=0.8)
    for biases in method.trial(evidence).biases:
        visible = biases == 0
        assert visible[:, :3].all()
        assert visible[:, 55:].all()


def test_forcing_tokens_leaves_the_scores_as_they_were():
    evidence = make_evidence("GQA", 60)
    method = KVCompose(compression_ratio=0.5, n_sink=3, n_recent=3)
    scores = method.scores(evidence)
    before = [s.copy() for s in scores]
    method.plan(evidence, scores)
    for a, b in zip(before, scores, strict=True):
        np.testing.assert_array_equal(a, b)


#
# scores
#


def grouped_and_mixed(weighed: np.ndarray, n_head_kv: int) -> np.ndarray:
    """Returns the mean over the query heads of a KV head, plus the mean over the KV heads."""
    heads = weighed.reshape(n_head_kv, -1, weighed.shape[1]).mean(axis=1)
    return heads + heads.mean(axis=0)


def write_projections(path: Path, projections: list[np.ndarray | None], n_head: int, kind: Any = None) -> Path:
    """Writes a file with only output projections, ``(n_embd, n_head*d)``, float32 or stored as ``kind``."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(len(projections))
    writer.add_head_count(n_head)
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    for il, weight in enumerate(projections):
        if weight is not None:
            data = weight if kind is None else gguf.quants.quantize(weight, kind)
            writer.add_tensor(f"blk.{il}.attn_output.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "phi3", "gpt-oss"])
def test_the_gram_matrices_have_the_norm_of_what_a_value_adds_to_the_residual_stream(tiny_model, name):
    config = tiny.ARCHITECTURES[name]
    grams = output_grams(tiny_model(config))
    assert len(grams) == config.n_layer
    v = np.random.default_rng(0).standard_normal((20, config.n_embd_head))
    for il, gram in enumerate(grams):
        weight = tiny.weights(config)[f"blk.{il}.attn_output.weight"].astype(np.float64)
        assert gram.shape == (config.n_head, config.n_embd_head, config.n_embd_head)
        for h in range(config.n_head):
            part = weight[:, h * config.n_embd_head : (h + 1) * config.n_embd_head]
            want = [np.linalg.norm(part @ one) for one in v]
            assert_close(np.sqrt(np.einsum("id,de,ie->i", v, gram[h], v)), want, 1e-5 * float(max(want)))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_stored_projections_of_any_type_are_read(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    weight = np.random.default_rng(0).standard_normal((48, 2 * 32)).astype(np.float32)
    stored = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    [got] = output_grams(write_projections(tmp_path / "f.gguf", [weight], 2, kind))
    for h in range(2):
        part = stored[:, 32 * h : 32 * h + 32].astype(np.float64)
        assert_close(got[h], part.T @ part, 1e-4)


def test_a_layer_without_an_output_projection_is_refused(tiny_model, tmp_path):
    with pytest.raises(UnsupportedError, match="no output projection in layer 0"):
        output_grams(tiny_model(tiny.REFUSED["mamba"]))
    some = np.ones((4, 8), np.float32)
    with pytest.raises(UnsupportedError, match=r"f\.gguf has no output projection in layer 1"):
        output_grams(write_projections(tmp_path / "f.gguf", [some, None, some], 2))
    with pytest.raises(UnsupportedError, match="no output projection"):
        Variant(n_kept=1, output_norm=True).for_model(tmp_path / "f.gguf")
    assert Variant(n_kept=1, scoring="repeat").for_model(tmp_path / "no such file").grams == ()


@pytest.mark.parametrize("ils", [(0, 1, 2), (2,)], ids=["all layers", "sliding windows before it"])
def test_the_output_norm_multiplies_attention_by_the_norm_of_the_projected_value(tiny_model, ils):
    config, d = tiny.GQA, tiny.GQA.n_embd_head
    rng = np.random.default_rng(0)
    layers = [LayerGeometry(il, 4, 2, d, d, 1, 1, False, 64) for il in ils]
    attention = [rng.random((4, 30)).astype(np.float32) for _ in ils]
    values = [rng.standard_normal((2, 30, d)).astype(np.float32) for _ in ils]
    evidence = Evidence(30, layers, attention, rows=ArrayRows(all_values=values))
    method = Variant(n_kept=5, output_norm=True).for_model(tiny_model(config))
    got = method.scores(evidence)
    for l, il in enumerate(ils):
        weight = tiny.weights(config)[f"blk.{il}.attn_output.weight"].astype(np.float64)
        weighed = np.empty((4, 30))
        for h, i in itertools.product(range(4), range(30)):
            added = weight[:, h * d : (h + 1) * d] @ values[l][h // 2, i]
            weighed[h, i] = attention[l][h, i] * math.sqrt((added**2).sum())
        assert got[l].dtype == np.float32
        assert_close(got[l], grouped_and_mixed(weighed, 2), 1e-5)
    plain = KVCompose(n_kept=5).scores(evidence)
    assert np.abs(got[0] / got[0].sum() - plain[0] / plain[0].sum()).max() > 1e-3


def test_the_output_norm_uses_the_models_own_projections_and_values(make_llama, tiny_model):
    config = tiny.GQA
    method = Variant(compression_ratio=0.5, output_norm=True).for_model(tiny_model(config))
    evidence = make_llama(config).observe(CONTEXT, method)
    model = tiny.NumpyLlama(config)
    model.forward(CONTEXT)
    for l, scores in enumerate(method.scores(evidence)):
        parts = model.w[f"blk.{l}.attn_output.weight"].reshape(config.n_embd, 4, 32)
        added = np.einsum("nhd,ihd->hin", parts, np.repeat(model.v[l], 2, axis=1))
        want = grouped_and_mixed(evidence.attention[l] * np.linalg.norm(added, axis=2), 2)
        assert_close(scores, want, 1e-4)


def test_the_output_norm_of_quantized_values_is_refused_since_they_are_rotated(make_llama, tiny_model):
    method = Variant(compression_ratio=0.5, output_norm=True).for_model(tiny_model(tiny.WIDE))
    llama = make_llama(tiny.WIDE, flash_attn=True, type_k=Q8_0, type_v=Q8_0)
    with pytest.raises(UnsupportedError, match="quantized"):
        method.scores(llama.observe(CONTEXT, method))


def test_the_output_norm_of_latent_values_is_refused_since_another_matrix_follows(make_llama, tiny_model):
    method = Variant(compression_ratio=0.5, output_norm=True).for_model(tiny_model(tiny.WIDE))
    evidence = make_llama(tiny.WIDE).observe(CONTEXT, method)
    latent = [replace(layer, v_in_k=True) for layer in evidence.layers]
    with pytest.raises(UnsupportedError, match="latent"):
        method.scores(replace(evidence, layers=latent))


@pytest.mark.parametrize(("pool", "pooling"), [(1, "max"), (3, "mean"), (5, "max"), (7, "mean"), (61, "mean"), (99, "max")])  # fmt: skip
def test_scores_are_pooled_over_a_tokens_neighbours(pool, pooling):
    evidence = make_evidence("layers that differ", 30)
    plain = KVCompose(n_kept=5).scores(evidence)
    got = Variant(n_kept=5, pool=pool, pooling=pooling).scores(evidence)
    for scores, pooled in zip(plain, got, strict=True):
        want = np.empty(scores.shape)
        for h, i in np.ndindex(scores.shape):
            near = [float(scores[h, j]) for j in range(i - pool // 2, i + pool // 2 + 1) if 0 <= j < 30]
            want[h, i] = max(near) if pooling == "max" else sum(near) / pool
        assert_close(pooled, want, 1e-6)


def test_a_variant_without_an_idea_is_kvcompose():
    evidence = make_evidence("layers that differ", 60)
    plain, variant = KVCompose(compression_ratio=0.7), Variant(compression_ratio=0.7)
    assert variant.attention_request == plain.attention_request
    for a, b in zip(variant.scores(evidence), plain.scores(evidence), strict=True):
        np.testing.assert_array_equal(a, b)
    trial = variant.trial(evidence)
    assert not len(trial.values)
    assert not len(trial.biases)
    assert trial.plan is not None
    for cells, same in zip(trial.plan.rows, plain.plan(evidence).rows, strict=True):
        np.testing.assert_array_equal(cells, same)


def test_only_own_asks_for_another_attention():
    asked = Variant(n_kept=1, own=True, scoring_chunk=100, instruction="x", agg_task="mean").attention_request
    assert asked == AttentionRequest(Repeat(100, 1.0, "x", own=True), "mean")
    for options in ({"pool": 3}, {"output_norm": True}, {"fold": 1.0}, {"correct": 1.0}):
        assert Variant(n_kept=1, **options).attention_request == KVCompose(n_kept=1).attention_request
    assert KVCompose(n_kept=1).attention_request == AttentionRequest(Repeat(512), "max")
    assert KVCompose(n_kept=1, in_place=True).attention_request == AttentionRequest(Repeat(512, in_place=True), "max")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("variant,own=1", "own=1 is neither True nor False"),
        ("variant,own=True,scoring=window", "own=True needs scoring='repeat'"),
        ("variant,own=True,scoring=prefill", "own=True needs scoring='repeat'"),
        ("variant,own=True,scoring_fraction=0.5", "own=True needs .* the whole context"),
        ("variant,pool=0", "pool=0 is not positive"),
        ("variant,pool=2.5", "pool=2.5 is not an integer"),
        ("variant,pool=4", "pool=4 is not odd"),
        ("variant,pooling=min", "pooling='min' is none of"),
        ("variant,output_norm=yes", "output_norm='yes' is neither"),
        ("variant,fold=x", "fold='x' is not a number"),
        ("variant,correct=True", "correct=True is not a number"),
        ("variant,scoring=all", "scoring='all' is none of"),
    ],
)
def test_a_variant_out_of_range_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        make_method(spec, compression_ratio=0.5)


def test_variants_that_know_a_model_can_be_compared(tiny_model):
    first, second = (Variant(n_kept=1, output_norm=True).for_model(tiny_model(tiny.GQA)) for _ in range(2))
    assert first == second
    assert first.for_model(Path("no such file")).grams is first.grams
    assert "array" not in repr(first)
