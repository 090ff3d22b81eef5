"""Predicts the attention that a repeat of the context would pay to its tokens, from cached keys and values.

A linear function for every layer and KV head, whose result is log(attention + EPS): of the highest attention that
KVCompose's repeat pays to a token, mean over the group. ``measurements.learned`` learns its weights. The features
contain a token's key twice: before its rotation, and as a query at the end of the context sees it, R(i - N) k_i. A
query's logit is linear in the second, which includes the distance. The idea of a predictor comes from KVzap (hidden
states, gates trained in PyTorch). This one reads only the cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..kernels.linear import weigh_rows
from ..kernels.types import FloatArray
from ..plan.geometry import LayerGeometry
from ..scoring.evidence import Evidence, Positions

#: added to attention before the logarithm; values far below it do not differ
EPS = 1e-5

#: tokens with features in memory at a time, in each thread
CHUNK = 512

#: layers in memory as float32 at a time
N_THREADS = 4

#: block of the Hadamard rotation of quantized values (llama-kv-cache.cpp, build_input_v_rot)
N_HADAMARD_V = 64


def predict_layer(weights: FloatArray, evidence: Evidence, l: int) -> FloatArray:
    """Returns the attention to a layer's tokens that ``weights`` ``(n_head_kv, n_features)`` predict.

    Returns:
        float32 ``(n_head_kv, N)``, in [0, 1].
    """
    layer = evidence.layers[l]
    of = dict(zip(FEATURES, np.split(weights, np.cumsum(_widths(layer))[:-1], axis=1), strict=True))
    on_cached = of["at_end"] @ _to_end(evidence, l).T
    parts = [
        weigh_rows(
            part.cached, part.plain, part.values, on_cached, of["plain"], of["plain_squared"], of["values"],
            of["values_squared"], of["norms"], of["places"] @ part.places.T + of["constant"],
        )
        for part in _parts(evidence, l)
    ]  # fmt: skip
    return attention_of(np.concatenate(parts, axis=1))


#
# features
#


#: groups of features, in order
FEATURES = ("plain", "at_end", "plain_squared", "values", "values_squared", "norms", "places", "constant")


def n_features(layer: LayerGeometry) -> int:
    """Returns the number of features of a token in one head of the layer."""
    return sum(_widths(layer))


def _widths(layer: LayerGeometry) -> list[int]:
    d_k, d_v = layer.n_embd_head_k, layer.n_embd_head_v
    return [d_k, d_k, d_k, d_v, d_v, 3, _position_features(np.zeros(1, np.int32), 1).shape[1], 1]


def features(evidence: Evidence, l: int, places: Positions | None = None) -> Iterator[FloatArray]:
    """Yields features of a layer's tokens, some tokens at a time: float32 ``(n_head_kv, n_tokens, n_features)``.

    They depend only on the token's key and value and on the context length, so a token can be scored when it is read.

    Args:
        places: indices of the tokens in the evidence, int32 ``(n,)``; None: all.
    """
    to_end = _to_end(evidence, l)
    for part in _parts(evidence, l, places):
        v_norms = np.linalg.norm(part.values, axis=2, keepdims=True)
        columns = [
            part.plain,
            part.cached @ to_end,
            np.square(part.plain),
            part.values,
            np.square(part.values),
            np.linalg.norm(part.plain, axis=2, keepdims=True),
            v_norms,
            np.log(v_norms + np.float32(1e-6)),
            np.broadcast_to(part.places, (len(part.values), *part.places.shape)),
            np.ones_like(v_norms),
        ]
        yield np.concatenate(columns, axis=2)


@dataclass(frozen=True, eq=False)
class _Part:
    """Inputs of the features of some tokens: float32 ``(n_head_kv, n, d)``, and positions ``(n, 11)``."""

    cached: FloatArray
    plain: FloatArray
    values: FloatArray
    places: FloatArray


def _parts(evidence: Evidence, l: int, places: Positions | None = None) -> Iterator[_Part]:
    layer, keys, values = evidence.layers[l], evidence.keys(l), evidence.values(l)
    if places is None:
        places = np.arange(evidence.n_tokens, dtype=np.int32)
    else:
        keys, values = keys[:, places], values[:, places]
    values = plain_values(values, layer)
    for first in range(0, len(places), CHUNK):
        cached = np.ascontiguousarray(keys[:, first : first + CHUNK])
        pos = evidence.first + places[first : first + CHUNK]
        rows, at = cached.reshape(-1, layer.n_embd_head_k), np.tile(pos, layer.n_head_kv)
        plain = evidence.unrotate(l, rows, at).reshape(cached.shape)
        part = _position_features(pos, evidence.length)
        yield _Part(cached, plain, values[:, first : first + CHUNK], part)


def _to_end(evidence: Evidence, l: int) -> FloatArray:
    """Returns the matrix that rotates cached keys back by the whole context length, ``keys @ matrix``."""
    d = evidence.layers[l].n_embd_head_k
    # the rotation is linear, so its matrix is the rotated identity
    return evidence.unrotate(l, np.eye(d, dtype=np.float32), np.full(d, evidence.length, dtype=np.int32))


def _position_features(places: Positions, n_tokens: int) -> FloatArray:
    """Returns the positions of tokens from the beginning, from the end, and as a share; float32 ``(n, 11)``."""
    i = places.astype(np.float32)
    share, before_end = i / n_tokens, n_tokens - i
    columns = [
        share, share**2, share**3, np.exp(-i / 8), np.exp(-i / 2), np.log1p(i), np.log(before_end),
        np.log(before_end) ** 2, np.exp(-before_end / 16), np.exp(-before_end / 128), i == 0,
    ]  # fmt: skip
    return np.stack(columns, axis=1).astype(np.float32)


def plain_values(values: FloatArray, layer: LayerGeometry) -> FloatArray:
    """Returns ``values`` ``(n_head_kv, N, n_embd_head_v)`` without the Hadamard rotation of quantized values."""
    disabled = os.environ.get("LLAMA_ATTN_ROT_DISABLE", "0") not in ("", "0")
    if not layer.v_quantized or layer.v_in_k or layer.n_embd_head_v % N_HADAMARD_V or disabled:
        return values
    matrix: FloatArray = np.ones((1, 1), dtype=np.float32)
    while len(matrix) < N_HADAMARD_V:  # ggml_gen_hadamard: orthonormal, symmetric
        matrix = (np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2)).astype(np.float32)
    blocks = values.reshape(*values.shape[:2], -1, N_HADAMARD_V)
    plain: FloatArray = (blocks @ matrix).reshape(values.shape)
    return plain


def target_of(attention: FloatArray) -> FloatArray:
    """Returns the regression target for ``attention``."""
    target: FloatArray = np.log(attention + np.float32(EPS))
    return target


def attention_of(prediction: FloatArray) -> FloatArray:
    """Inverts ``target_of``, for any prediction; clips the result to [0, 1]."""
    bounded = np.clip(prediction, np.float32(np.log(EPS)), np.float32(0))
    attention: FloatArray = np.maximum(np.exp(bounded) - np.float32(EPS), 0)
    return attention
