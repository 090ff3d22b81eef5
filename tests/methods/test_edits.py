"""Edits of a compressed cache: values that join the kept ones, and biases."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from support.arrays import assert_close
from support.edits import edits_of
from support.evidence import make_evidence
from support.rows import rows_of

from kvcompose_gguf.methods.kvcompose import KVCompose
from kvcompose_gguf.methods.variant import Variant
from kvcompose_gguf.scoring.evidence import Evidence


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
    return replace(evidence, rows=replace(rows_of(evidence), all_keys=keys))


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
    plan, edited = edits_of(method, evidence)
    scores = method.scores(evidence)
    assert len(edited.biases) == 0
    np.testing.assert_array_equal(edited.n_kept, plan.n_kept)
    for a, b in zip(plan.rows, KVCompose(n_kept=n_kept, add_v_norm=True, n_sink=0).plan(evidence).rows, strict=True):
        np.testing.assert_array_equal(a, b)
    assert n_kept > 1 or 0 in edited.n_kept, "every layer keeps something"
    for l, cells in enumerate(plan.rows):
        want = folded(evidence.keys(l), evidence.values(l), scores[l], cells, share)
        n_embd_head_v = evidence.values(l).shape[2]
        assert edited.values[l].dtype == np.float32
        assert edited.values[l].shape == (*cells.shape, n_embd_head_v)
        assert_close(edited.values[l], np.array(want).reshape(edited.values[l].shape), 1e-5)


def test_where_nothing_is_evicted_nothing_is_edited():
    evidence = make_evidence("layers that differ", 40)
    plan, edited = edits_of(Variant(compression_ratio=0.0, fold=1.0, correct=1.0), evidence)
    for l in range(3):
        assert_close(edited.values[l], evidence.values(l), 1e-6)
        assert_close(edited.biases[l], np.zeros(plan.rows[l].shape), 1e-6)


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
    plan, edited = edits_of(method, evidence)
    scores = method.scores(evidence)
    assert len(edited.values) == 0
    assert n_kept > 1 or 0 in edited.n_kept, "every layer keeps something"
    for l, cells in enumerate(plan.rows):
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
    plan, edited = edits_of(method, evidence, given)
    for l, cells in enumerate(plan.rows):
        want = folded(evidence.keys(l), evidence.values(l), given[l], cells, 1.0)
        assert_close(edited.values[l], np.array(want), 1e-5)
