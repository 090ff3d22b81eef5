"""SnapKV (arXiv 2404.14469): the prompt's last tokens score the context; pooling also keeps neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..kernels import aggregate
from ..kernels.types import FloatArray
from ..scoring.evidence import Evidence
from ..scoring.requests import AttentionRequest, Window
from ..support.checks import check_choice, check_integer, check_odd, check_positive
from .base import Method, map_layers


@dataclass(frozen=True, kw_only=True)
class SnapKV(Method):
    """Attention of an observation window, mean over its queries, pooled along the tokens, mean over the group.

    Defaults and order are those of kvpress (snapkv_press.py). Pooling counts zeros beyond both ends, which lowers the
    outermost scores (torch's avg_pool1d counts its padding). Difference: the window is the prompt's. With ``keep_last``
    part of it lies after the context, and only the part in the context must be kept.

    Attributes:
        window: number of last prompt tokens that act as queries; those in the context are kept.
        kernel: pooling width in tokens, odd.
        pooling: ``"mean"``, or ``"max"``, which ignores positions beyond the ends.
    """

    window: int = 64
    kernel: int = 5
    pooling: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("window", self.window)
        check_positive("window", self.window)
        check_odd("kernel", self.kernel)
        check_choice("pooling", self.pooling, ("mean", "max"))

    @property
    def attention_request(self) -> AttentionRequest:
        return AttentionRequest(Window(self.window), "mean")

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """Returns the scores of each layer, float32 ``(n_head_kv, N)``, infinity for the window's tokens."""
        n_before = evidence.n_tokens - evidence.n_window

        def score(l: int) -> FloatArray:
            pooled = aggregate.pool_tokens(evidence.attention[l][:, :n_before], self.kernel, self.pooling)
            grouped = aggregate.aggregate_group(pooled, evidence.layers[l].n_head_kv, "mean")
            return np.pad(grouped, ((0, 0), (0, evidence.n_window)), constant_values=np.inf)

        return map_layers(score, len(evidence.layers))
