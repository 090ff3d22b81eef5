"""KVzip (arXiv 2505.23416): keeps the tokens that the model needs to repeat its context."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels import aggregate
from ..kernels.types import FloatArray
from ..scoring.evidence import Evidence
from ..scoring.requests import AttentionRequest, Repeat
from .base import Method, check_integer, check_positive, map_layers

#: before the first chunk, and before the others, which quote 8 tokens (kvpress, kvzip_press.py)
INSTRUCTION = "\n\nRepeat the previous context exactly."
CONTINUATION = "\n\nRepeat the part of the previous context exactly, starting with"


@dataclass(frozen=True, kw_only=True)
class KVzip(Method):
    """Maximum attention while the context is repeated after an instruction, maximum over the group's query heads.

    Differences from the paper and kvpress (kvzip_press.py): our softmax covers everything visible, not only the sinks,
    the chunk's own keys and its repeat; there is no chat template between instruction and repeat; all heads and all
    layers keep equally many tokens (kvpress: ``layerwise=True``), whereas the paper ranks the pairs of all layers and
    heads together.

    Attributes:
        scoring_chunk: number of context tokens that are repeated at a time; ``None``: all of them, in a cache of 2N
            cells.
    """

    n_sink: int = 4
    scoring_chunk: int | None = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("scoring_chunk", self.scoring_chunk, optional=True)
        check_positive("scoring_chunk", self.scoring_chunk)

    @property
    def attention_request(self) -> AttentionRequest:
        queries = Repeat(chunk=self.scoring_chunk, instruction=INSTRUCTION, continuation=CONTINUATION, own=True)
        return AttentionRequest(queries, "max")

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """Returns the scores of each layer, float32 ``(n_head_kv, N)`` in [0, 1]; ``plan`` keeps the sinks."""

        def score(l: int) -> FloatArray:
            return aggregate.aggregate_group(evidence.attention[l], evidence.layers[l].n_head_kv, "max")

        return map_layers(score, len(evidence.layers))
