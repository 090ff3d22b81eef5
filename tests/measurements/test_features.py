"""Compares features and predictions with plain loops; tests KVCompose with predictions alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support import tiny, tiny_gguf
from support.features import (
    make_evidence,
    random_weights,
    rotated,
    specified_features,
    specified_prediction,
    table_of,
)
from support.llamas import ONE_THREAD, TYPES, greedy, last_logits, stored_rows
from support.plans import specified_plan

from kvcompose_gguf import KVCompose
from kvcompose_gguf.measurements import features as module
from kvcompose_gguf.measurements.features import features
from kvcompose_gguf.measurements.learned import Learned
from kvcompose_gguf.measurements.regression import RANK, Regression
from kvcompose_gguf.methods.knorm import KNorm
from kvcompose_gguf.methods.predictor import Predictor
from kvcompose_gguf.native.rows import cached_rows

N = 90
KEYS_ONLY = KNorm(n_kept=1)  # a method that asks for no attention


def known_weights(weights: Sequence[np.ndarray]) -> Predictor:
    """Returns a predictor that knows these weights of features that are not standardized, from enough prompts."""
    layers = []
    for w in weights:
        none, one = np.zeros_like(w), np.ones_like(w)
        layers.append(Regression(none, one, w, none, np.zeros((*w.shape, RANK), np.float16)))
    return Predictor("tiny", Learned(2, 2000.0, (0.9,), tuple(layers)))


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    assert got.shape == want.shape
    assert got.dtype == np.float32
    difference = np.abs(got - want) / np.maximum(1, np.abs(want))
    assert difference.max() < tolerance, f"the largest difference is {difference.max()} at {np.unravel_index(difference.argmax(), want.shape)}"  # fmt: skip


#
# features
#


@pytest.mark.parametrize("chunk", [1, 7, 16, 48, 2048])
@pytest.mark.parametrize("n_tokens", [1, 48])
def test_features_are_the_specified_ones_whatever_the_chunks(monkeypatch, chunk, n_tokens):
    monkeypatch.setattr(module, "CHUNK", chunk)
    evidence = make_evidence(n_tokens)
    for l, layer in enumerate(evidence.layers):
        parts = [*features(evidence, l)]
        assert [part.shape[1] for part in parts] == [min(chunk, n_tokens - i) for i in range(0, n_tokens, chunk)]
        assert_close(np.concatenate(parts, axis=1), table_of(evidence, l), 1e-5)
        assert parts[0].shape[2] == module.n_features(layer)


def plain_freqs(base: float, n_rot: int) -> np.ndarray:
    return base ** (-np.arange(0, n_rot, 2) / n_rot)


def yarn_freqs(base: float, n_rot: int, factor: float, n_ctx: int) -> np.ndarray:
    """YaRN (arXiv 2309.00071): slows down pairs with less than 1 turn over n_ctx tokens, but none with more than 32."""
    freqs = plain_freqs(base, n_rot)
    low, high = (n_rot * math.log(n_ctx / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1))
    share = np.clip((np.arange(n_rot // 2) - math.floor(low)) / (math.ceil(high) - math.floor(low)), 0, 1)
    return freqs * (1 - share) + freqs / factor * share


YARN = {"rope_scaling_type": 2, "rope_freq_scale": 0.25}
FACTORS = np.linspace(1, 8, 16).astype(np.float32)
ROTATIONS: dict[str, tuple[tiny.TinyConfig, dict[str, Any], Callable[[float], np.ndarray], float]] = {
    **{name: (tiny.ARCHITECTURES[name], {}, lambda base: plain_freqs(base, 32), 1.0) for name in ("llama", "qwen2", "qwen3", "gemma3", "gpt-oss")},
    "partial": (tiny.ARCHITECTURES["phi3"], {"kv_overrides": {"phi3.rope.dimension_count": 12}}, lambda base: plain_freqs(base, 12), 1.0),
    "factors": (replace(tiny.GQA, seed=31), {}, lambda base: plain_freqs(base, 32) / FACTORS, 1.0),
    "yarn": (tiny.GQA, YARN, lambda base: yarn_freqs(base, 32, 4, 4096), 1 + 0.1 * math.log(4)),
}  # fmt: skip


@pytest.mark.parametrize("name", ROTATIONS)
def test_features_of_every_rotation_are_the_twins(make_llama, monkeypatch, name):
    config, options, freqs, scale = ROTATIONS[name]
    if name == "factors":
        monkeypatch.setattr(tiny_gguf, "weights", lambda c: tiny.weights(c) | {"rope_freqs.weight": FACTORS})
    context = tiny.tokens(config, N)
    evidence = make_llama(config, **ONE_THREAD, **options).observe(context, KEYS_ONLY)

    plain: list[np.ndarray] = []  # of each layer queries, then keys, before their rotation

    def rope(x: np.ndarray, positions: np.ndarray, base: float, neox: bool) -> np.ndarray:
        plain.append(x)
        return rotated(x, positions, freqs(base), neox, scale)

    monkeypatch.setattr(tiny, "_rope", rope)
    model = tiny.NumpyLlama(config)
    model.forward(context)
    assert len(evidence.layers) == sum(not config.is_swa(il) for il in range(config.n_layer))
    for l, layer in enumerate(evidence.layers):
        keys = plain[2 * layer.il + 1]
        assert np.abs(keys - model.k[layer.il]).max() > 1
        at_end = rotated(keys, np.arange(N) - N, freqs(config.rope_base), config.neox)
        want = specified_features(*(rows.transpose(1, 0, 2) for rows in (keys, at_end, model.v[layer.il])))
        assert_close(np.concatenate([*features(evidence, l)], axis=1), want, 2e-3)


#: largest distance of a row from f16's, as a share of its length. Half a step is 2^-11 of an element for f16 and 2^-9 for
#: bf16; quantized, steps are a block's largest element / 127 or / 8, and rounding has a deviation of 0.3 steps. That
#: element is 2 to 4 deviations of its row, so a row is off by 0.3 * 4 / 127 or 0.3 * 4 / 8 of its length at most
ERRORS = {"f32": 5e-4, "f16": 5e-4, "bf16": 3e-3, "q8_0": 0.01, "q4_0": 0.16}


@pytest.mark.parametrize(
    ("n_embd_head", "k", "v", "flash_attn"),
    [
        (64, "f32", "f32", True), (64, "f16", "f16", False), (64, "bf16", "bf16", True), (64, "q8_0", "q8_0", True),
        (64, "q4_0", "q4_0", True), (64, "f16", "q8_0", True), (64, "q8_0", "f16", False), (128, "q8_0", "q8_0", True),
        (32, "q8_0", "q4_0", True), (96, "q8_0", "q8_0", True),
    ],
)  # fmt: skip
def test_features_of_stored_types_are_those_of_f16_up_to_rounding(make_llama, n_embd_head, k, v, flash_attn):
    # small attention outputs keep one layer's rounding out of the next layers
    config = replace(tiny.WIDE, n_embd_head=n_embd_head, output_scale=0.01)
    context, d = tiny.tokens(config, N), n_embd_head
    tables = []
    for types in ({"type_k": 1, "type_v": 1}, {"type_k": TYPES[k], "type_v": TYPES[v], "flash_attn": flash_attn}):
        llama = make_llama(config, **ONE_THREAD, **({"flash_attn": True} | types))
        evidence = llama.observe(context, KEYS_ONLY)
        assert evidence.layers[0].v_trans == (not types.get("flash_attn", True))
        tables.append([np.concatenate([*features(evidence, l)], axis=1) for l in range(config.n_layer)])
    blocks = {"plain keys": (0, k), "keys at the end": (d, k), "values": (3 * d, v)}
    for want, got in zip(*tables, strict=True):
        for name, (first, kind) in blocks.items():
            a, b = (table[:, :, first : first + d] for table in (want, got))
            error = (np.linalg.norm(a - b, axis=2) / np.linalg.norm(a, axis=2)).max()
            assert error < ERRORS[kind], f"{name}: the largest difference is {error} of a row's length"
        assert_close(got[:, :, 2 * d : 3 * d], np.square(got[:, :, :d]), 1e-5)
        assert_close(got[:, :, 4 * d : 5 * d], np.square(got[:, :, 3 * d : 4 * d]), 1e-5)
        assert np.array_equal(got[:, :, -12:], want[:, :, -12:])


#
# prediction
#


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_predictions_are_the_specified_ones(monkeypatch, size):
    monkeypatch.setattr(module, "CHUNK", 40)
    evidence = make_evidence(100)
    weights = random_weights(evidence, size)
    got = known_weights(weights).predict(replace(evidence, attention=()), ())
    for l, attention in enumerate(got):
        assert_close(attention, specified_prediction(table_of(evidence, l), weights[l]), 1e-4)
        assert attention.min() >= 0
        assert attention.max() <= 1
    if size > 1:  # as wrong as they may be
        assert min(a.min() for a in got) < 1e-9
        assert max(a.max() for a in got) > 0.999


#
# KVCompose
#


@pytest.mark.parametrize("options", [{"n_sink": 0}, {"add_v_norm": True, "add_mean_across_heads": False, "n_sink": 3}])
def test_scores_are_the_predictions_and_what_kvcompose_makes_of_attention(options):
    evidence = make_evidence(60)
    weights = random_weights(evidence, 1)
    predictor = known_weights(weights)
    method = KVCompose(compression_ratio=0.7, scoring="learned", spot_check=0.0, predictor=predictor, **options)
    evidence = replace(evidence, attention=())
    predicted = [specified_prediction(table_of(evidence, l), weights[l]).astype(np.float32) for l in range(2)]
    norms = [np.linalg.norm(evidence.values(l), axis=2) for l in range(2)]
    layers = [replace(layer, n_head=layer.n_head_kv) for layer in evidence.layers]
    want = specified_plan(predicted, layers, norms, compression_ratio=0.7, **options)
    assert [cells.tolist() for cells in method.plan(evidence).rows] == want


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_prompt_is_read_once_and_the_predicted_tokens_are_kept(make_llama, monkeypatch, name):
    config = tiny.ARCHITECTURES[name]
    context, after, n = tiny.tokens(config, 300), tiny.tokens(config, 20, seed=1), 300
    full = make_llama(config, **ONE_THREAD)
    evidence = full.observe(context, KEYS_ONLY)
    weights = random_weights(evidence, 0.5)
    predicted = []
    for l in range(len(evidence.layers)):
        keys, freqs = cached_rows(full.session, l, "k", n).transpose(1, 0, 2), plain_freqs(config.rope_base, 32)
        plain, at_end = (
            rotated(keys, by, freqs, config.neox).transpose(1, 0, 2) for by in (-np.arange(n), np.full(n, -n))
        )
        table = specified_features(plain, at_end, cached_rows(full.session, l, "v", n))
        predicted.append(specified_prediction(table, weights[l]).astype(np.float32))
    layers = [replace(layer, n_head=layer.n_head_kv) for layer in evidence.layers]
    want = specified_plan(predicted, layers, [], compression_ratio=0.5)

    method = KVCompose(scoring="learned", spot_check=0.0, compression_ratio=0.5, n_sink=0)
    llama = make_llama(config, method, **ONE_THREAD)
    llama.kv_compressor = replace(llama.kv_compressor, predictor=known_weights(weights))
    n_read, decode = [], llama._ctx.decode
    monkeypatch.setattr(llama._ctx, "decode", lambda batch: n_read.append(batch.n_tokens()) or decode(batch))
    report = llama.compress(context)
    assert sum(n_read) == report.n_prefilled == n
    assert report.n_kept.tolist() == [len(cells[0]) for cells in want]
    visible: list[np.ndarray | None] = [None] * config.n_layer
    for l, (layer, cells) in enumerate(zip(evidence.layers, want, strict=True)):
        for h, kept in enumerate(cells):
            assert np.array_equal(stored_rows(llama, l, "k")[h, : len(kept)], stored_rows(full, l, "k")[h, kept])
        visible[layer.il] = np.array([np.isin(np.arange(n), kept) for kept in cells])
    model = tiny.NumpyLlama(config)
    model.forward(context)
    model.visible = visible
    llama.eval(after)
    difference = np.abs(last_logits(llama) - model.forward(after)[0][-1]).max()
    assert difference < 1e-3, f"the largest difference is {difference}"
    assert len(greedy(llama, context + after, 5)) == 5
    assert sum(n_read) == n + len(after) + 4  # the last token is sampled from what is there
