"""Expected Attention (arXiv 2510.00636): scores tokens by the expected attention of Gaussian future queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..kernels.types import FloatArray
from ..scoring.evidence import Evidence, QueryStates
from ..scoring.requests import StateRequest
from .base import Method, check_flag, check_integer, check_number, check_positive

#: number of future positions rotated in one call
CHUNK = 32


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Method):
    """Attention expected from the context's queries at the next positions, mean over the group, times the value's norm.

    The scaled queries have mean mu and covariance Sigma, rotated by the mean RoPE matrix of the ``n_future`` positions
    from N on: ``E[exp(q k)] = exp(mu k + k Sigma k / 2)``, normalised over the tokens after the sinks, as in kvpress
    (expected_attention_press.py). Differences: we take the moments of the last ``n_queries`` tokens, kvpress of all but
    the sinks. kvpress's newest evaluation sets epsilon to 0.01 and lets the heads of a layer share one budget
    (evaluate_registry.py).

    Attributes:
        n_queries: number of last context tokens that supply sample queries.
        n_future: number of positions that the rotation is averaged over.
        use_covariance: use Sigma, otherwise only mu.
        use_vnorm: multiply by the L2 norm of the token's value.
        epsilon: added before that, so that values count where attention is negligible.
    """

    n_sink: int = 4
    n_queries: int = 512
    n_future: int = 512
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_queries", "n_future"):
            check_integer(name, getattr(self, name))
            check_positive(name, getattr(self, name))
        check_number("epsilon", self.epsilon)
        if not 0 <= self.epsilon < np.inf:
            raise ConfigError(f"epsilon={self.epsilon} is negative or not finite")
        for name in ("use_covariance", "use_vnorm"):
            check_flag(name, getattr(self, name))

    @property
    def state_request(self) -> StateRequest:
        return StateRequest(self.n_queries)

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """Returns each layer's scores, float32 ``(n_head_kv, N)``, infinity for sinks; reads one layer at a time."""
        return [self._scores(evidence, l) for l in range(len(evidence.layers))]

    def _scores(self, evidence: Evidence, l: int) -> FloatArray:
        n_tokens, n_head_kv = evidence.n_tokens, evidence.layers[l].n_head_kv
        out = np.full((n_head_kv, n_tokens), np.inf, dtype=np.float32)
        if n_tokens <= self.n_sink:
            return out
        states = evidence.states(l)
        keys = evidence.keys(l)[:, self.n_sink :]
        # the sinks' queries are outliers; only in a short context are they among the last tokens
        n_skipped = max(0, self.n_sink - (n_tokens - states.queries.shape[1]))
        rotation = mean_rotation(states, n_tokens, self.n_future)
        expected = np.zeros((n_head_kv, n_tokens - self.n_sink))
        n_group = len(states.queries) // n_head_kv
        for head, queries in enumerate(states.queries[:, n_skipped:].astype(np.float64)):
            mean = queries.mean(axis=0)
            logits = keys[head // n_group] @ (mean @ rotation).astype(np.float32)
            if self.use_covariance:
                centred = (queries - mean) @ rotation
                covariance = (centred.T @ centred / len(queries)).astype(np.float32)
                logits += ((keys[head // n_group] @ covariance) * keys[head // n_group]).sum(axis=1) / 2
            weights = np.exp(logits - logits.max(), dtype=np.float64)
            expected[head // n_group] += weights / (weights.sum() * n_group)
        if self.use_vnorm:
            values = evidence.values(l)[:, self.n_sink :]
            expected = (expected + self.epsilon) * np.linalg.norm(values, axis=2)
        out[:, self.n_sink :] = expected
        return out


def mean_rotation(states: QueryStates, first: int, n_future: int) -> npt.NDArray[np.float64]:
    """Returns R, ``(n_embd_head_k, n_embd_head_k)``, such that ``q @ R`` is q's mean rotation over the positions.

    RoPE is linear, so the rotated identity is its matrix, whatever its frequencies and layout.
    """
    n_embd = states.queries.shape[2]
    total = np.zeros((n_embd, n_embd))
    for start in range(first, first + n_future, CHUNK):
        positions = np.arange(start, min(start + CHUNK, first + n_future), dtype=np.int32)
        rows = np.tile(np.eye(n_embd, dtype=np.float32), (len(positions), 1))
        rotated = states.rotate(rows, np.repeat(positions, n_embd))
        total += rotated.reshape(len(positions), n_embd, n_embd).sum(axis=0, dtype=np.float64)
    return total / n_future
