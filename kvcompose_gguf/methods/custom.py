"""A method that takes its scores from a user's function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError
from ..kernels.types import FloatArray
from ..scoring.evidence import Evidence
from ..scoring.requests import AttentionRequest, StateRequest
from .base import Method


@dataclass(frozen=True, kw_only=True)
class Custom(Method):
    """Calls a user's function for the scores; budget, sinks, allocation, ranking and plan work as in every method.

    >>> import numpy as np
    >>> from kvcompose_gguf.methods.custom import Custom
    >>> from kvcompose_gguf.scoring.requests import AttentionRequest, Window
    >>> def loud_and_attended(evidence):
    ...     scores = []
    ...     for l, layer in enumerate(evidence.layers):
    ...         groups = evidence.attention[l].reshape(layer.n_head_kv, -1, evidence.n_tokens)
    ...         norms = np.linalg.norm(evidence.values(l), axis=2)
    ...         scores.append(groups.max(axis=1) * norms)
    ...     return scores
    >>> request = AttentionRequest(Window(32), "mean")
    >>> method = Custom(compression_ratio=0.75, n_sink=4, scorer=loud_and_attended, request=request)

    Attributes:
        scorer: returns each layer's scores ``(n_head_kv, N)`` for the evidence; the highest are kept first.
        request: the attention that the scorer reads, if any.
        states: the query vectors that the scorer reads, if any.
    """

    scorer: Callable[[Evidence], Sequence[FloatArray]]
    request: AttentionRequest | None = None
    states: StateRequest | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.scorer):
            raise ConfigError(f"scorer={self.scorer!r} is not a function")
        for name, kind in (("request", AttentionRequest), ("states", StateRequest)):
            if not isinstance(getattr(self, name), (kind, type(None))):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not of class {kind.__name__}")

    @property
    def attention_request(self) -> AttentionRequest | None:
        return self.request

    @property
    def state_request(self) -> StateRequest | None:
        return self.states

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """Returns the scores of each layer as float32; ``plan`` checks the shapes."""
        return [np.asarray(scores, dtype=np.float32) for scores in self.scorer(evidence)]
