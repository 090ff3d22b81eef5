"""CompressKV (arXiv 2508.02401): retrieval heads score the tokens, and layers with larger eviction errors keep more."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType

import numpy as np

from ..errors import ConfigError
from ..kernels import aggregate
from ..kernels.threads import map_layers
from ..kernels.types import FloatArray
from ..measurements.calibration import Calibration, load_calibration
from ..scoring.evidence import Evidence
from ..scoring.requests import AttentionRequest, Window
from ..support.checks import check_flag, check_integer, check_odd, check_positive
from .allocation import Allocation, ByEvictionError
from .base import Method


@dataclass(frozen=True, kw_only=True)
class CompressKV(Method):
    """Averages the attention of an observation window over a few heads per layer, and pools it along the tokens.

    All KV heads of a layer keep the same tokens. Defaults are the authors' (compresskv/snapkv_utils.py). Difference:
    the window is the prompt's, and with ``keep_last`` part of it lies after the context. The heads, and the
    errors that divide the budget, are measured once per model: ``kvcompose learn MODEL --for compresskv``.

    Attributes:
        window: number of last prompt tokens that act as queries; those in the context are kept.
        n_heads: number of heads per layer with the highest semantic retrieval scores, ties by index; all if it has
            fewer.
        kernel: pooling width in tokens, odd; zeros count beyond both ends, as in torch's avg_pool1d.
        per_head: not in the paper: every KV head keeps its own tokens, scored by the mean of its query heads. The mean
            is weighted with their retrieval scores, or equal if all are 0.
        calibration: the model's calibration; None: ``for_model`` loads it.
    """

    window: int = 8
    n_heads: int = 4
    kernel: int = 5
    per_head: bool = False
    calibration: Calibration | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window", "n_heads"):
            check_integer(name, getattr(self, name))
            check_positive(name, getattr(self, name))
        check_odd("kernel", self.kernel)
        check_flag("per_head", self.per_head)
        if not isinstance(self.calibration, (Calibration, NoneType)):
            raise ConfigError(f"calibration={self.calibration!r} is not a Calibration")

    @property
    def attention_request(self) -> AttentionRequest:
        return AttentionRequest(Window(self.window), "mean")

    def for_model(self, model_path: Path) -> CompressKV:
        """Returns the method with the model's calibration, unless it already has one."""
        return self if self.calibration else dataclasses.replace(self, calibration=load_calibration(model_path))

    def fingerprint(self) -> bytes:
        """Returns the calibration as in its file."""
        return self.calibration.to_json().encode() if self.calibration else b""

    def default_allocation(self) -> Allocation:
        return ByEvictionError(self._calibration().errors)

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """Returns the scores of each layer, float32 ``(n_head_kv, N)``, infinity for the window's tokens."""
        heads = [np.array(scores) for scores in self._calibration().heads]
        if [*map(len, heads)] != (needed := [layer.n_head for layer in evidence.layers]):
            raise ConfigError(f"the calibration's heads per layer {[*map(len, heads)]} are not the model's {needed}")
        n_before = evidence.n_tokens - evidence.n_window

        def score(l: int) -> FloatArray:
            attention, n_head_kv = evidence.attention[l][:, :n_before], evidence.layers[l].n_head_kv
            if self.per_head:
                weights = heads[l].reshape(n_head_kv, -1)
                weights = np.where(weights.sum(axis=1, keepdims=True) > 0, weights, 1)
                weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
                judged = np.einsum("hg,hgi->hi", weights, attention.reshape(*weights.shape, n_before))
            else:
                top = np.argsort(-heads[l], kind="stable")[: self.n_heads]
                judged = np.tile(attention[top].mean(axis=0), (n_head_kv, 1))
            pooled = aggregate.pool_tokens(judged, self.kernel, "mean")
            return np.pad(pooled, ((0, 0), (0, evidence.n_window)), constant_values=np.inf)

        return map_layers(score, len(evidence.layers))

    def _calibration(self) -> Calibration:
        if self.calibration is None:
            command = "kvcompose learn MODEL --for compresskv"
            raise ConfigError(f"CompressKV has no calibration: run {command}, then for_model(MODEL)")
        return self.calibration
