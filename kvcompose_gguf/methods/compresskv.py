"""CompressKV (arXiv 2508.02401): a layer's retrieval heads judge, and layers that lose most keep most."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType

import numpy as np

from ..calibration import Calibration, load_calibration
from ..checks import check_flag, check_integer, check_odd, check_positive
from ..errors import ConfigError
from ..kernels import aggregate
from ..kernels.types import FloatArray
from ..queries import AttentionRequest, Evidence, Window
from .allocation import Allocation, ByEvictionError
from .base import Method, map_layers


@dataclass(frozen=True, kw_only=True)
class CompressKV(Method):
    """Attention of an observation window from a few heads a layer, averaged and pooled along the tokens.

    All KV heads of a layer keep the same tokens. Defaults are the authors' (compresskv/snapkv_utils.py). Where we
    differ: the window is the prompt's, and with ``keep_last`` a part of it lies behind the context. The heads, and the
    errors that divide the budget, are measured once a model by ``kvcompose calibrate``.

    Attributes:
        window: last prompt tokens that judge; those of them in the context are kept.
        n_heads: heads of a layer with the highest semantic retrieval scores, ties by index; all if it has fewer.
        kernel: tokens that are pooled, an odd number; zeros count beyond both ends, as in torch's avg_pool1d.
        per_head: not the authors': every KV head has its own tokens, by the mean of its query heads, weighted with
            their scores, evenly if these are all 0.
        calibration: of the model; None: the one that ``for_model`` finds.
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
        """With the model's calibration, unless one was given."""
        return self if self.calibration else dataclasses.replace(self, calibration=load_calibration(model_path))

    def default_allocation(self) -> Allocation:
        return ByEvictionError(self._calibration().errors)

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """For each layer float32 ``(n_head_kv, N)``, infinity for the window's tokens."""
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
            raise ConfigError("CompressKV is without a calibration: kvcompose calibrate MODEL, then for_model(MODEL)")
        return self.calibration
