"""Tests attempts to improve on the paper: chunks that score their own tokens, forced tokens, and edited caches."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny
from support.rows import ArrayRows
from test_compose import decode_one_by_one
from test_kv_types import stored_rows
from test_methods import make_evidence
from test_scoring import Cache, context, payment, words

from kvcompose_gguf import CompositionPlan, ConfigError, StateError, UnsupportedError
from kvcompose_gguf.evaluation.trials import compressed
from kvcompose_gguf.methods import make_method
from kvcompose_gguf.methods.kvcompose import KVCompose
from kvcompose_gguf.methods.kvzip import CONTINUATION, INSTRUCTION, KVzip
from kvcompose_gguf.methods.snapkv import SnapKV
from kvcompose_gguf.methods.variant import Variant, output_grams
from kvcompose_gguf.native.rows import cached_rows, read_rows, write_values
from kvcompose_gguf.plan.geometry import LayerGeometry
from kvcompose_gguf.plan.trial import Trial
from kvcompose_gguf.scoring.collect import Attention
from kvcompose_gguf.scoring.evidence import Evidence
from kvcompose_gguf.scoring.requests import AttentionRequest, Repeat

thorough = settings(deadline=None, derandomize=True, max_examples=100)
F32, F16, BF16, Q8_0 = 0, 1, 30, 8
N = 80
CONTEXT = tiny.tokens(tiny.GQA, N)
QUERY = tiny.tokens(tiny.GQA, 24, seed=1)


def assert_close(got: Any, want: Any, tolerance: float, what: str = "") -> None:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    difference = np.abs(got.astype(np.float64) - want).max(initial=0.0)
    assert difference <= tolerance, f"{what}: the largest difference is {difference:.3g}"


#
# the beginning of each repeated chunk, and the tokens that it scores
#


def collect(cache: Cache, tokens: list[int], queries: Repeat, agg_task: str = "max") -> Attention:
    request = AttentionRequest(queries, agg_task)  # type: ignore[arg-type]
    return request.collect(cache, tokens, (), words)  # type: ignore[arg-type]


def repeated(tokens: list[int], chunk: int, first_words: list[int], later_words: list[int]) -> list[list[int]]:
    """Returns the tokens of every chunk's decode: a continuation and the 8 tokens before the chunk, or the instruction."""
    chunks = []
    for first in range(0, len(tokens), chunk):
        begin = [*later_words, *tokens[max(0, first - 8) : first]] if first and later_words else first_words
        chunks.append([*begin, *tokens[first : first + chunk]])
    return chunks


def paid_by(queries: list[int], il: int, n_tokens: int, agg_task: str) -> np.ndarray:
    """Returns the attention of these tokens, all after the context, to the context: ``(n_head, n_tokens)``."""
    paid = np.stack([payment(il, Cache.layers[il], token, n_tokens) for token in queries])
    return paid.max(axis=0) if agg_task == "max" else paid.sum(axis=0) / np.float32(len(queries))


@thorough
@given(
    st.integers(1, 60),
    st.one_of(st.none(), st.integers(1, 70)),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(1, 70),
    st.sampled_from(["max", "mean"]),
)
def test_a_token_is_judged_by_its_own_chunk_alone(
    n_tokens: int, chunk: int | None, n_words: int, n_later: int, n_batch: int, agg_task: str
) -> None:
    cache, tokens = Cache(), context(n_tokens)
    cache.n_batch = n_batch
    first_words, later_words = list(range(n_words)), list(range(50, 50 + n_later))
    instruction, continuation = (" ".join(map(str, w)) for w in (first_words, later_words))
    attention = collect(cache, tokens, Repeat(chunk, 1.0, instruction, continuation, own=True), agg_task)
    n_chunk = min(chunk or n_tokens, n_tokens)
    assert attention.chunk == n_chunk
    for il in range(len(Cache.layers)):
        expected = np.full((Cache.layers[il].n_head, n_tokens), np.nan, np.float32)
        for i, queries in enumerate(repeated(tokens, n_chunk, first_words, later_words)):
            mine = slice(i * n_chunk, (i + 1) * n_chunk)
            expected[:, mine] = paid_by(queries, il, n_tokens, agg_task)[:, mine]
        assert attention.layers[il].dtype == np.float32
        np.testing.assert_array_equal(attention.layers[il], expected)
    assert cache.held == tokens
    assert not cache.is_scoring


@pytest.mark.parametrize("agg_task", ["max", "mean"])
def test_one_chunk_of_everything_is_its_own(agg_task: str) -> None:
    own, all_of_it = (collect(Cache(), context(30), Repeat(None, own=o), agg_task) for o in (True, False))
    for got, want in zip(own.layers, all_of_it.layers, strict=True):
        np.testing.assert_array_equal(got, want)
    several = collect(Cache(), context(30), Repeat(7, own=True), agg_task)
    assert any((a != b).any() for a, b in zip(several.layers, all_of_it.layers, strict=True))


@pytest.mark.parametrize("chunk", [16, 20, 33])
@pytest.mark.parametrize("agg_task", ["max", "mean"])
def test_a_models_own_chunks_give_the_attention_of_numpy(make_llama, agg_task, chunk):
    method = Variant(compression_ratio=0.5, own=True, scoring_chunk=chunk, agg_task=agg_task)
    got = make_llama(n_threads=1, n_threads_batch=1).observe(CONTEXT, method).attention
    model = tiny.NumpyLlama(tiny.GQA)
    model.forward(CONTEXT)
    want = [np.empty((4, N)) for _ in range(3)]
    for first in range(0, N, chunk):
        _, attention = model.forward(CONTEXT[first : first + chunk])
        for l, paid in enumerate(attention):
            paid = paid[:, :, first : min(first + chunk, N)]
            want[l][:, first : first + chunk] = paid.max(axis=1) if agg_task == "max" else paid.mean(axis=1)
        model.truncate(N)
    assert_close(np.stack(got), np.stack(want), 1e-4)


@thorough
@given(
    st.integers(1, 60),
    st.integers(1, 70),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 30),
    st.sampled_from(["max", "mean"]),
)
def test_an_instruction_comes_before_every_chunk_and_its_tokens_judge_as_well(
    n_tokens: int, chunk: int, n_words: int, has_continuation: bool, n_more: int, agg_task: str
) -> None:
    """Runs with exactly the cells needed, or a few more."""
    first_words, later_words = list(range(n_words)), [50, 51, 52, 53, 54] if has_continuation else []
    n_cells = n_tokens + max(n_words, len(later_words) + min(8, n_tokens) if later_words else 0) + 1 + n_more
    cache, tokens = Cache(n_cells), context(n_tokens)
    instruction, continuation = (" ".join(map(str, w)) for w in (first_words, later_words))
    attention = collect(cache, tokens, Repeat(chunk, 1.0, instruction, continuation), agg_task)
    assert attention.chunk == min(chunk, n_tokens, 1 + n_more)
    expected = repeated(tokens, attention.chunk, first_words, later_words)
    assert cache.of_kind("decode", "remove") == list(
        itertools.chain(*([("decode", queries, n_tokens), ("remove", n_tokens)] for queries in expected))
    )
    for il in range(len(Cache.layers)):
        want = paid_by(list(itertools.chain(*expected)), il, n_tokens, agg_task)
        np.testing.assert_array_equal(attention.layers[il], want)


def test_kvcompose_asks_with_its_instruction_before_every_chunk():
    method = KVCompose(compression_ratio=0.5, instruction="7 8", scoring_chunk=4, agg_task="mean")
    cache, tokens = Cache(), context(10)
    attention = method.attention_request.collect(cache, tokens, (), words)
    decoded = [[7, 8, *tokens[:4]], [7, 8, *tokens[4:8]], [7, 8, *tokens[8:]]]
    assert cache.of_kind("decode") == [("decode", queries, 10) for queries in decoded]
    for il in range(2):
        np.testing.assert_array_equal(attention.layers[il], paid_by([*itertools.chain(*decoded)], il, 10, "mean"))
    with pytest.raises(ConfigError, match="needs scoring='repeat'"):
        KVCompose(compression_ratio=0.5, instruction="7 8", scoring="window")


def test_a_continuation_quotes_the_eight_tokens_before_its_chunk():
    cache, tokens = Cache(), context(40)
    queries = KVzip(compression_ratio=0.5, scoring_chunk=15).attention_request.queries
    assert isinstance(queries, Repeat)
    known = {INSTRUCTION: [1, 2], CONTINUATION: [3, 4, 5]}
    AttentionRequest(queries).collect(cache, tokens, (), known.__getitem__)
    assert [event[1] for event in cache.of_kind("decode")] == [
        [1, 2, *tokens[:15]],
        [3, 4, 5, *tokens[7:15], *tokens[15:30]],
        [3, 4, 5, *tokens[22:30], *tokens[30:]],
    ]


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
    for cells in itertools.chain.from_iterable(plan.cells):
        assert set(range(n_sink)) | set(range(60 - n_recent, 60)) <= set(cells.tolist())


@pytest.mark.parametrize("spec", FORCED)
def test_more_forced_tokens_than_the_budget_has_are_sinks_first_and_as_many_as_it_buys(spec):
    evidence = make_evidence("layers that differ", 60, n_window=4)
    exact = make_method(spec, n_kept=10, n_sink=3, n_recent=7)
    for cells in itertools.chain.from_iterable(exact.plan(evidence).cells):
        assert cells.tolist() == [*range(3), *range(53, 60)]
    method = make_method(spec, n_kept=9.9, n_sink=3, n_recent=7)
    assert method.forced(evidence.layers, 60) == (3, 6)
    plan = method.plan(evidence)
    assert plan.n_kept.sum() == 29
    for cells in itertools.chain.from_iterable(plan.cells):
        assert {*range(3), *range(54, 60)} <= set(cells.tolist())
    method = make_method(spec, n_kept=2, n_sink=3, n_recent=7)
    assert method.forced(evidence.layers, 60) == (2, 0)
    for cells in itertools.chain.from_iterable(method.plan(evidence).cells):
        assert cells.tolist() == [0, 1]


def test_last_tokens_are_kept_before_the_rest_of_a_window_that_the_budget_has_no_room_for():
    evidence = make_evidence("GQA", 60, n_window=16)
    for cells in itertools.chain.from_iterable(SnapKV(n_kept=8, window=16, n_recent=4).plan(evidence).cells):
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
    for visible in make_method("unstructured,n_sink=3,n_recent=5", compression_ratio=0.8).mask(evidence):
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
            assert_close(np.sqrt(np.einsum("id,de,ie->i", v, gram[h], v)), want, 1e-5 * max(want))


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
    for a, b in zip(trial.plan.cells, plain.plan(evidence).cells, strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_own_asks_for_another_attention():
    asked = Variant(n_kept=1, own=True, scoring_chunk=100, instruction="x", agg_task="mean").attention_request
    assert asked == AttentionRequest(Repeat(100, 1.0, "x", own=True), "mean")
    for options in ({"pool": 3}, {"output_norm": True}, {"fold": 1.0}, {"correct": 1.0}):
        assert Variant(n_kept=1, **options).attention_request == KVCompose(n_kept=1).attention_request


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


#
# edits
#


def folded(
    keys: np.ndarray, values: np.ndarray, scores: np.ndarray, cells: np.ndarray, share: float
) -> list[list[np.ndarray]]:
    """Merges every evicted value into the first kept one with the most similar key, by its share of weight."""
    out = []
    for h, kept in enumerate(cells.tolist()):
        directions = [key / max(np.linalg.norm(key), 1e-12) for key in keys[h].astype(np.float64)]
        weights = {j: float(scores[h, j]) for j in kept}
        sums = {j: weights[j] * values[h, j].astype(np.float64) for j in kept}
        for i in range(keys.shape[1]):
            if i in weights or not kept:
                continue
            best = kept[0]
            for j in kept:
                if directions[i] @ directions[j] > directions[i] @ directions[best]:
                    best = j
            sums[best] = sums[best] + share * float(scores[h, i]) * values[h, i].astype(np.float64)
        for i in range(keys.shape[1]):
            if i not in kept and kept:
                similar = [directions[i] @ directions[j] for j in kept]
                weights[kept[similar.index(max(similar))]] += share * float(scores[h, i])
        out.append([sums[j] / weights[j] for j in kept])
    return out


def signs(evidence: Evidence) -> Evidence:
    """Uses keys of plus and minus one in four places: their similarities are exact, and often equal."""
    rng = np.random.default_rng(5)
    keys = [
        np.where(rng.random((g.n_head_kv, evidence.n_tokens, 4)) < 0.5, np.float32(-1), np.float32(1))
        for g in evidence.layers
    ]
    return replace(evidence, rows=replace(evidence.rows, all_keys=keys))


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("kind", ["any keys", "ties", "a key of no length"])
@pytest.mark.parametrize("n_kept", [40, 39, 11, 1, 0.4])
def test_evicted_values_join_the_kept_ones_with_the_most_similar_keys(n_kept, kind, share):
    evidence = make_evidence("layers that differ", 40)
    if kind == "ties":
        evidence = signs(evidence)
    if kind == "a key of no length":
        evidence.keys(0)[:, ::3] = 0
    method = Variant(n_kept=n_kept, fold=share, add_v_norm=True, n_sink=0)
    edited, scores = method.trial(evidence), method.scores(evidence)
    assert len(edited.biases) == 0
    np.testing.assert_array_equal(edited.n_kept, edited.plan.n_kept)
    for a, b in zip(edited.plan.cells, KVCompose(n_kept=n_kept, add_v_norm=True, n_sink=0).plan(evidence).cells, strict=True):
        np.testing.assert_array_equal(a, b)
    assert n_kept > 1 or 0 in edited.n_kept, "every layer keeps something"
    for l, cells in enumerate(edited.plan.cells):
        want = folded(evidence.keys(l), evidence.values(l), scores[l], cells, share)
        n_embd_head_v = evidence.values(l).shape[2]
        assert edited.values[l].dtype == np.float32
        assert edited.values[l].shape == (*cells.shape, n_embd_head_v)
        assert_close(edited.values[l], np.array(want).reshape(edited.values[l].shape), 1e-5)


def test_where_nothing_is_evicted_nothing_is_edited():
    evidence = make_evidence("layers that differ", 40)
    edited = Variant(compression_ratio=0.0, fold=1.0, correct=1.0).trial(evidence)
    for l in range(3):
        assert_close(edited.values[l], evidence.values(l), 1e-6)
        assert_close(edited.biases[l], np.zeros(edited.plan.cells[l].shape), 1e-6)


def test_folding_all_into_one_is_the_mean_by_weight():
    evidence = make_evidence("GQA", 40)
    method = Variant(n_kept=1, fold=1.0, allocation="uniform", n_sink=0)
    for l, (values, scores) in enumerate(zip(method.trial(evidence).values, method.scores(evidence), strict=True)):
        for h in range(2):
            want = np.average(evidence.values(l)[h].astype(np.float64), axis=0, weights=scores[h])
            assert_close(values[h, 0], want, 1e-5)


def test_a_kept_value_of_no_weight_stays_what_it_is_unless_others_join_it():
    evidence = make_evidence("GQA", 40)
    for attention in evidence.attention:
        attention[:, :4] = 0
    method = Variant(compression_ratio=0.0, fold=1.0, n_sink=4)
    for l, values in enumerate(method.trial(evidence).values):
        assert_close(values, evidence.values(l), 1e-6)


@pytest.mark.parametrize("correct", [1.0, 0.5])
@pytest.mark.parametrize("n_kept", [40, 11, 1, 0.4])
def test_kept_logits_are_raised_by_the_logarithm_of_what_was_lost(n_kept, correct):
    evidence = make_evidence("layers that differ", 40)
    method = Variant(n_kept=n_kept, correct=correct, n_sink=0)
    edited, scores = method.trial(evidence), method.scores(evidence)
    assert len(edited.values) == 0
    assert n_kept > 1 or 0 in edited.n_kept, "every layer keeps something"
    for l, cells in enumerate(edited.plan.cells):
        want = np.empty(cells.shape)
        for h, j in np.ndindex(cells.shape):
            kept = sum(float(scores[l][h, i]) for i in cells[h])
            want[h, j] = correct * math.log(sum(map(float, scores[l][h])) / kept)
        assert edited.biases[l].dtype == np.float32
        assert_close(edited.biases[l], want, 1e-5)


def test_a_head_that_nobody_looks_at_is_not_corrected():
    evidence = make_evidence("GQA", 40)
    for attention in evidence.attention:
        attention[:4] = 0  # the first KV head's
    method = Variant(n_kept=9, correct=1.0, add_mean_across_heads=False, allocation="uniform")
    for biases in method.trial(evidence).biases:
        assert (biases[0] == 0).all()
        assert (biases[1] > 0).all()


def test_the_edits_follow_the_given_scores():
    evidence = make_evidence("GQA", 40)
    method = Variant(n_kept=9, fold=1.0, correct=1.0)
    given = [s[:, ::-1].copy() for s in method.scores(evidence)]
    edited = method.trial(evidence, given)
    for l, cells in enumerate(edited.plan.cells):
        want = folded(evidence.keys(l), evidence.values(l), given[l], cells, 1.0)
        assert_close(edited.values[l], np.array(want), 1e-5)


#
# edits of a cache
#


def random_plan(n_kept: list[int], seed: int = 0) -> CompositionPlan:
    rng = np.random.default_rng(seed)
    heads = [[np.sort(rng.permutation(N)[:n]) for _ in range(2)] for n in n_kept]
    return CompositionPlan(N, tuple(np.array(h, dtype=np.int32).reshape(2, -1) for h in heads))


class Edited(tiny.NumpyLlama):
    """The numpy model with a factor on the context's attention weights, ``(n_head_kv, N)`` per layer."""

    factors: list[np.ndarray] | None = None

    def _attend(self, q: np.ndarray, il: int, positions: np.ndarray) -> np.ndarray:
        p = super()._attend(q, il, positions)
        if self.factors is not None:
            p[:, :, :N] *= np.repeat(self.factors[il], 2, axis=0)[:, None]
        return p / p.sum(axis=2, keepdims=True)

    def compose(self, plan: CompositionPlan, values: Any = (), biases: Any = ()) -> None:
        """Hides what the plan evicts, and edits the composites' values and logits."""
        self.visible, self.factors = [], [np.ones((2, N)) for _ in plan.cells]
        for l, cells in enumerate(plan.cells):
            mask = np.zeros((2, N), dtype=bool)
            for h, kept in enumerate(cells):
                mask[h, kept] = True
                if len(values):
                    self.v[l][kept, h] = values[l][h]
                if len(biases):
                    self.factors[l][h, kept] = np.exp(biases[l][h].astype(np.float64))
            self.visible.append(mask)


def both(make_llama: Any, stored: type = np.float64, **kwargs: Any) -> tuple[Any, Edited]:
    """Returns the native and the numpy model after the same context."""
    llama = make_llama(tiny.GQA_SOFT, **({"n_threads": 1, "n_threads_batch": 1} | kwargs))
    llama.prefill(CONTEXT)
    model = Edited(tiny.GQA_SOFT, stored=stored)
    model.forward(CONTEXT)
    return llama, model


TYPES = {"f32": F32, "f16": F16, "bf16": BF16}


@pytest.mark.parametrize("n_kept", [[30, 80, 7], [0, 80, 1]], ids=str)
@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_written_values_are_read_again_and_no_other_byte_is_changed(make_llama, name, flash_attn, n_kept):
    llama, _ = both(make_llama, type_k=TYPES[name], type_v=TYPES[name], flash_attn=flash_attn)
    session = llama.session
    assert session.layers[0].v_trans is not flash_attn
    llama.compose(random_plan(n_kept))
    llama.eval(QUERY)
    before = [[stored_rows(llama, l, which).copy() for which in "kv"] for l in range(3)]
    rng = np.random.default_rng(1)
    values = [rng.standard_normal((2, n, 32)).astype(np.float32) for n in n_kept]
    llama.write_values(values)
    relative = {"f32": 0, "f16": 2.0**-11, "bf16": 2.0**-8}[name]
    for l, n in enumerate(n_kept):
        if n:
            error = np.abs(read_rows(session, l, "v", n) - values[l])
            assert (error <= relative * np.abs(values[l]) + 2.0**-25).all(), f"the largest difference is {error.max()}"
        keys, rows = (stored_rows(llama, l, which) for which in "kv")
        np.testing.assert_array_equal(keys, before[l][0])
        np.testing.assert_array_equal(rows[:, n:], before[l][1][:, n:])


@pytest.mark.parametrize("flash_attn", [False, True])
def test_values_of_a_full_cache_are_replaced_in_the_first_rows_alone(make_llama, flash_attn):
    llama, _ = both(make_llama, flash_attn=flash_attn)
    before = stored_rows(llama, 1, "v").copy()
    values = np.random.default_rng(1).standard_normal((2, 5, 32)).astype(np.float32)
    write_values(llama.session, 1, values)
    np.testing.assert_array_equal(cached_rows(llama.session, 1, "v", 5), values)
    np.testing.assert_array_equal(stored_rows(llama, 1, "v")[:, 5:], before[:, 5:])


def test_values_that_were_read_can_be_written_back(make_llama):
    for name, flash_attn in itertools.product(TYPES, (False, True)):
        llama, _ = both(make_llama, type_k=TYPES[name], type_v=TYPES[name], flash_attn=flash_attn)
        llama.compose(random_plan([30, 80, 7]))
        before = [stored_rows(llama, l, "v").copy() for l in range(3)]
        llama.write_values([read_rows(llama.session, l, "v", n) for l, n in enumerate((30, 80, 7))])
        for l in range(3):
            np.testing.assert_array_equal(stored_rows(llama, l, "v"), before[l], err_msg=f"{name} {flash_attn}")
        llama.close()


@pytest.mark.parametrize("shape", [(1, 5, 32), (2, 5, 31), (2, 31, 32), (5, 32)], ids=str)
def test_values_of_another_shape_are_not_written(make_llama, shape):
    llama, _ = both(make_llama)
    llama.compose(random_plan([30, 80, 7]))
    before = stored_rows(llama, 0, "v").copy()
    with pytest.raises(ConfigError, match=r"values of layer 0 are .*; \(2, at most 30, 32\) is needed"):
        write_values(llama.session, 0, np.zeros(shape, np.float32))
    np.testing.assert_array_equal(stored_rows(llama, 0, "v"), before)


def test_evidence_of_a_context_that_is_not_in_the_cache_any_more_cannot_be_read(make_llama):
    llama, _ = both(make_llama)
    evidence = llama.observe(CONTEXT, KVCompose(n_kept=30))
    want = evidence.keys(0)
    llama.eval(QUERY)
    np.testing.assert_array_equal(evidence.keys(0), want)
    llama.truncate(N)
    llama.compose(random_plan([30, 80, 7]))
    with pytest.raises(StateError, match="80 compressed tokens now: the 80 tokens of the full cache"):
        evidence.keys(0)
    llama.reset()
    llama.prefill(CONTEXT[:40])
    with pytest.raises(StateError, match="40 tokens now"):
        evidence.values(0)


def test_values_of_a_quantized_cache_are_not_replaced(make_llama):
    llama = make_llama(tiny.WIDE, flash_attn=True, type_k=Q8_0, type_v=Q8_0)
    llama.prefill(CONTEXT)
    before = stored_rows(llama, 0, "v").copy()
    with pytest.raises(UnsupportedError, match="quantized"):
        llama.write_values([np.zeros((2, 5, 64), np.float32)])
    np.testing.assert_array_equal(stored_rows(llama, 0, "v"), before)


def test_values_may_be_replaced_where_only_keys_are_quantized(make_llama):
    llama = make_llama(tiny.WIDE, flash_attn=True, type_k=Q8_0, type_v=F32)
    llama.prefill(CONTEXT)
    values = np.random.default_rng(1).standard_normal((2, 5, 64)).astype(np.float32)
    llama.write_values([values])
    np.testing.assert_array_equal(cached_rows(llama.session, 0, "v", 5), values)


@pytest.mark.parametrize("n_kept", [[30, 80, 7], [0, 80, 1]], ids=str)
@pytest.mark.parametrize(("name", "flash_attn"), [("f32", False), ("f16", False), ("f16", True), ("f32", True)])
def test_answers_follow_from_the_written_values(make_llama, name, flash_attn, n_kept):
    stored = np.float64 if (name, flash_attn) == ("f32", False) else np.float16
    llama, model = both(make_llama, stored, type_k=TYPES[name], type_v=TYPES[name], flash_attn=flash_attn)
    plan = random_plan(n_kept)
    values = [np.random.default_rng(l).standard_normal((2, n, 32)).astype(np.float32) for l, n in enumerate(n_kept)]
    unchanged = Edited(tiny.GQA_SOFT)
    unchanged.forward(CONTEXT)
    unchanged.compose(plan)
    model.compose(plan, [v.astype(stored) for v in values])
    want = model.forward(QUERY)[0]
    llama.compose(plan)
    llama.write_values(values)
    tolerance = 1e-3 if stored is np.float64 else 1e-2
    assert np.abs(unchanged.forward(QUERY)[0] - want).max() > 20 * tolerance, "the values change nothing"
    assert_close(llama.eval_logits(QUERY), want, tolerance)
    llama.truncate(N)
    assert_close(decode_one_by_one(llama, QUERY), want, tolerance)


@pytest.mark.parametrize("n_room", [256, 1], ids=["with room", "a cache that grows"])
@pytest.mark.parametrize("flash_attn", [False, True])
def test_a_bias_of_log_two_is_the_composite_twice(make_llama, flash_attn, n_room):
    stored = np.float16 if flash_attn else np.float64
    llama, model = both(make_llama, stored, flash_attn=flash_attn)
    plan, rng = random_plan([30, 80, 7]), np.random.default_rng(1)
    biases = [np.where(rng.random(cells.shape) < 0.5, np.log(2), 0).astype(np.float32) for cells in plan.cells]
    llama.compose(plan, n_room)
    model.compose(plan, biases=biases)
    plain = Edited(tiny.GQA_SOFT, stored=stored)
    plain.forward(CONTEXT)
    plain.compose(plan)
    want, unbiased = model.forward(QUERY)[0], plain.forward(QUERY)[0]
    tolerance = 5e-3 if flash_attn else 1e-3
    assert np.abs(want - unbiased).max() > 10 * tolerance, "the bias changes nothing"
    with llama.session.biased(biases):
        assert_close(decode_one_by_one(llama, QUERY), want, tolerance, "one by one")
        llama.truncate(N)
        assert_close(llama.eval_logits(QUERY), want, tolerance, "at once")
    llama.truncate(N)
    assert_close(llama.eval_logits(QUERY), unbiased, tolerance, "without it again")


def test_tokens_behind_the_composites_get_no_bias(make_llama):
    """Adds the same number to all composites and nothing to later rows: only the share of the two changes."""
    llama, model = both(make_llama)
    plan = random_plan([30, 80, 7])
    llama.compose(plan)
    model.compose(plan)
    llama.eval(QUERY[:-1])
    model.forward(QUERY[:-1])
    with llama.session.biased([np.full(cells.shape, np.log(5), np.float32) for cells in plan.cells]), llama.session.taps("outputs", 1):  # fmt: skip
        llama.eval(QUERY[-1:])
        got = llama.session.tapped("outputs", 0, 1)[0]
    _, attention = model.forward(QUERY[-1:])
    p = attention[0][:, 0].copy()
    p[:, :N] *= 5
    p /= p.sum(axis=1, keepdims=True)
    assert_close(got, np.einsum("hk,khd->hd", p, np.repeat(model.v[0], 2, axis=1)), 1e-5)


def test_a_layer_that_keeps_nothing_takes_an_empty_bias(make_llama):
    llama, model = both(make_llama)
    plan = random_plan([0, 80, 7])
    biases = [np.full(cells.shape, 0.7, np.float32) for cells in plan.cells]
    llama.compose(plan)
    model.compose(plan, biases=biases)
    with llama.session.biased(biases):
        assert_close(llama.eval_logits(QUERY), model.forward(QUERY)[0], 1e-3)


@pytest.mark.parametrize("options", [{"fold": 1.0}, {"correct": 0.5}, {"fold": 0.5, "correct": 1.0}], ids=str)
@pytest.mark.parametrize("flash_attn", [False, True])
def test_an_edited_plan_is_evaluated_as_it_says(make_llama, flash_attn, options):
    llama, model = both(make_llama, np.float16 if flash_attn else np.float64, flash_attn=flash_attn)
    method = Variant(compression_ratio=0.8, keep_token_lower_bound=1, **options)
    evidence = llama.observe(CONTEXT, method)
    edited = method.trial(evidence, method.scores(evidence))
    state = llama.save_state()
    model.compose(edited.plan, edited.values, edited.biases)
    want = model.forward(QUERY)[0]
    tolerance = 1e-2 if flash_attn else 1e-3
    with compressed(llama, state, Trial(edited.plan)):
        effect = np.abs(llama.eval_logits(QUERY) - want).max()
    assert effect > 5 * tolerance, f"the edits change the logits by {effect:.2g} only"
    with compressed(llama, state, edited) as restore:
        assert_close(llama.eval_logits(QUERY), want, tolerance)
        restore()
        assert_close(llama.eval_logits(QUERY), want, tolerance, "once more")
    with compressed(llama, state, Trial(CompositionPlan.keep_all(N, [2] * 3))):
        plain = Edited(tiny.GQA_SOFT)
        plain.forward(CONTEXT)
        assert_close(llama.eval_logits(QUERY), plain.forward(QUERY)[0], tolerance, "nothing is left of them")
