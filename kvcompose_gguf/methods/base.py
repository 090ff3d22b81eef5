"""The base of all methods: the user's budget, and the steps from scores to a plan.

A method is one file. It says which attention it needs, scores every token for every KV head, and names the rule that
divides the budget among the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..errors import ConfigError
from ..kernels import aggregate
from ..kernels.threads import map_layers
from ..kernels.types import FloatArray
from ..measurements.learned import Learned
from ..plan import budget
from ..plan.composition import CompositionPlan
from ..plan.geometry import LayerGeometry
from ..plan.rows import Rows
from ..plan.trial import Trial
from ..scoring.evidence import Evidence, check_layers
from ..scoring.requests import AttentionRequest, StateRequest
from ..support.checks import check_choice, check_integer, check_number, check_positive, parse_bytes
from .allocation import ALLOCATIONS, Allocation, GlobalRanking, Ranked, Uniform

M = TypeVar("M", bound="Method")


@dataclass(frozen=True, kw_only=True)
class Method:
    """The options of every method. The budget is exactly one of ``compression_ratio``, ``max_kv_bytes`` and ``n_kept``.

    Attributes:
        compression_ratio: fraction of the context's KV entries that is REMOVED, in [0, 1).
        max_kv_bytes: bytes that the kept rows may take, all layers, also as text such as ``"512MB"`` or ``"1.5GiB"``;
            the room for new tokens comes on top.
        n_kept: tokens kept per layer, on average over layers.
        n_sink, n_recent: number of first and last context tokens that every head keeps. If the budget does not cover
            them in every layer, recent tokens are dropped before sinks (``KVReport`` has the numbers kept).
        protect_first: number of first tokens that every head keeps, at most half of the budget, e.g. a system prompt.
        keep_last: number of last prompt tokens that are not compressed, but evaluated on top of the compressed context.
            The papers have no prompt after the context. In a chat the last tokens are the question, so they stay whole.
        min_tokens: shorter contexts are not compressed.
        max_score_bytes: limit of the working memory of scoring at any context length, not counting the scores (float32,
            layers x query heads x tokens).
        n_room: free cells to leave after the composites; the cache grows beyond them when needed.
        chunk: room above the budget, in tokens, while a prompt is read that does not fit both. The cache is composed
            before each part of 512 tokens, or fewer if budget or chunk are less. More room gives better keys and
            values. None: 512; for ``compression_ratio`` as many as are kept, but at least 512. Only methods that score
            tokens alone do so (``scores_alone``); others read the whole prompt first.
        n_fresh: so many of the newest tokens stay in every head until the next chunk is read.
        n_answer: the same when an answer or a conversation makes the cache a chunk larger than the budget. Both are at
            most a quarter of the budget. Methods that score tokens alone keep ``max_kv_bytes`` and ``n_kept`` at all
            times; others refuse a prompt that takes more than ``max_kv_bytes`` while it is read.
            ``compression_ratio`` is a share of the context, and limits no answers.
        allocation: the rule that divides the budget among the layers, or the name of a rule (``"uniform"``,
            ``"global"``); ``None``: the method's own.
    Raises:
        ConfigError: an option is out of range, or the number of budgets given is not one.
    """

    compression_ratio: float | None = None
    max_kv_bytes: int | str | None = None
    n_kept: float | None = None
    n_sink: int = 0
    n_recent: int = 0
    protect_first: int = 0
    keep_last: int = 32
    min_tokens: int = 256
    max_score_bytes: int = 64 << 20
    n_room: int = 256
    chunk: int | None = None
    n_fresh: int = 128
    n_answer: int = 1024
    allocation: Allocation | str | None = None

    def __post_init__(self) -> None:
        check_number("compression_ratio", self.compression_ratio, optional=True)
        check_number("n_kept", self.n_kept, optional=True)
        if isinstance(self.max_kv_bytes, str):
            object.__setattr__(self, "max_kv_bytes", parse_bytes("max_kv_bytes", self.max_kv_bytes))
        counts = ("n_sink", "n_recent", "protect_first", "keep_last", "n_fresh", "n_answer")
        for name in (*counts, "min_tokens", "max_score_bytes", "n_room"):
            check_integer(name, getattr(self, name))
        for name in ("max_kv_bytes", "chunk"):
            check_integer(name, getattr(self, name), optional=True)
        budgets = {name: getattr(self, name) for name in ("compression_ratio", "max_kv_bytes", "n_kept")}
        given = {name: value for name, value in budgets.items() if value is not None}
        if len(given) != 1:
            raise ConfigError(f"exactly one of {', '.join(budgets)} is needed, {len(given)} given: {given}")
        if self.compression_ratio is not None and not 0 <= self.compression_ratio < 1:
            raise ConfigError(f"compression_ratio={self.compression_ratio}, the fraction removed, is not in [0, 1)")
        for name in ("max_kv_bytes", "n_kept", "min_tokens", "max_score_bytes", "n_room", "chunk"):
            check_positive(name, getattr(self, name))
        if self.n_room >= 1 << 31:
            raise ConfigError(f"n_room={self.n_room} is not below 2^31")
        for name in counts:
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} is negative")
        if isinstance(self.allocation, str):
            check_choice("allocation", self.allocation, tuple(ALLOCATIONS))
        elif self.allocation is not None and not isinstance(self.allocation, Allocation):
            raise ConfigError(f"allocation={self.allocation!r} is not an Allocation: use e.g. Uniform()")

    #
    # what a method defines
    #

    @property
    def simulated(self) -> bool:
        """Returns whether the method is only simulated, by ``kvcompose eval``."""
        return False

    @property
    def scores_alone(self) -> bool:
        """Returns whether a token's scores depend on nothing but its own key and value, and its place in the context.

        Such a token can be scored as soon as it is read.
        """
        return False

    def can_score_alone(self, layers: Sequence[LayerGeometry]) -> bool:
        """Returns whether new tokens can be scored now, without attention; call ``informed`` before."""
        return self.streams

    @property
    def streams(self) -> bool:
        """Returns whether the method can compose the cache again and again while it reads a prompt."""
        return self.scores_alone and isinstance(self.rule(), (GlobalRanking, Uniform))

    @property
    def reads_in_parts(self) -> bool:
        """Returns whether the next context is read in parts, and composed in between; call ``informed`` before."""
        return self.streams

    @property
    def n_on_top(self) -> int:
        """Returns how many tokens are evaluated on top of a part that is read; call ``informed`` before."""
        return 0

    def n_again(self, n_tokens: int) -> int:
        """Returns how many of a later part's ``n_tokens`` are evaluated twice to score it; call ``informed`` before."""
        return 0

    @property
    def has_ceiling(self) -> bool:
        """Returns whether the budget holds at every moment, while answers are written and conversations go on, too."""
        return self.streams and self.compression_ratio is None

    @property
    def attention_request(self) -> AttentionRequest | None:
        """Returns the attention that ``scores`` reads; None: it reads keys, values or nothing."""
        return None

    @property
    def state_request(self) -> StateRequest | None:
        """Returns the query vectors that ``scores`` reads; None: it reads none."""
        return None

    def for_model(self: M, model_path: Path) -> M:
        """Returns the method with the data that it needs about a model, e.g. a calibration.

        Raises:
            ConfigError: the data does not exist; the message names the command that makes it.
        """
        return self

    def informed(self: M, learn: bool = True, known: Learned | None = None) -> M:
        """Returns the method with what is known of the model now; called before every prompt.

        Args:
            learn: whether ``taught_by`` may keep what it learns.
            known: what is known; None: it is read from the user's cache.
        """
        return self

    def taught_by(self: M, evidence: Evidence) -> M:
        """Returns the method with what this context teaches about the model; called before ``scores``."""
        return self

    def read_on(self: M, evidence: Evidence) -> M:
        """Returns the method with what it has to remember of these tokens to score later ones.

        Called for every part of a context before its ``scores``, in order.
        """
        return self

    @property
    def known(self) -> Learned | None:
        """Returns what the method knows of the model; None: it knows nothing, or was not ``informed``."""
        return None

    @property
    def note(self) -> str:
        """Returns how the latest context was scored, for reports; empty: as the options say."""
        return ""

    def fingerprint(self) -> bytes:
        """Returns the measurements of the model that decide which tokens the method keeps; empty: it uses none."""
        return b""

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """Returns the importance of every token for every KV head: for each layer float32 ``(n_head_kv, N)``.

        Tokens with infinity are kept before all others. Only the order within a head counts, unless the allocation
        compares heads or layers.
        """
        raise NotImplementedError

    def default_allocation(self) -> Allocation:
        """Returns the method's own rule for dividing the budget among the layers."""
        return Uniform()

    #
    # what every method shares
    #

    def rule(self) -> Allocation:
        """Returns the rule that divides the budget: the option ``allocation``, or the method's own."""
        if isinstance(self.allocation, str):
            return ALLOCATIONS[self.allocation]()
        return self.allocation or self.default_allocation()

    def forced(self, layers: Sequence[LayerGeometry], n_tokens: int) -> tuple[int, int]:
        """Returns how many first and last tokens every head keeps: as many as requested, if the budget covers them.

        They rank first, so every layer keeps at least their sum.
        """
        most = min(self.n_composites(layers, n_tokens) // len(layers), n_tokens)
        n_sink = min(max(self.n_sink, min(self.protect_first, most // 2)), most)
        return n_sink, min(self.n_recent, most - n_sink)

    def check_budget(self, layers: Sequence[LayerGeometry]) -> None:
        """Raises ConfigError if the budget is too small even for a context of one token."""
        self.n_composites(layers, 1)

    def n_composites(self, layers: Sequence[LayerGeometry], n_tokens: int) -> int:
        """Returns how many composites the budget buys for a context of ``n_tokens``, over all layers."""
        if self.compression_ratio is not None:
            return budget.composites_for_ratio(self.compression_ratio, len(layers), n_tokens)
        if self.n_kept is not None:
            return budget.composites_for_n_kept(self.n_kept, len(layers), n_tokens)
        assert isinstance(self.max_kv_bytes, int)
        return budget.composites_for_bytes(self.max_kv_bytes, layers, n_tokens)

    def chunk_for(self, layers: Sequence[LayerGeometry], n_tokens: int) -> int:
        """Returns the room above the budget, in tokens, while a context of ``n_tokens`` is read."""
        if self.chunk is not None or self.compression_ratio is None:
            return self.chunk or budget.PART
        return max(budget.PART, self.n_composites(layers, n_tokens) // len(layers))

    def plan(self, evidence: Evidence, scores: Sequence[FloatArray] | None = None) -> CompositionPlan:
        """Returns which tokens every head keeps (KVCompose steps 6 to 9, with any allocation of the budget).

        Args:
            scores: the result of ``scores`` for this evidence, which is the same for every budget; None: compute it.
        Raises:
            ConfigError: the scores have NaN or -infinity, or do not fit the evidence.
        """
        n_tokens, layers = evidence.n_tokens, evidence.layers
        if scores is None:
            scores = self.scores(evidence)
        check_layers("scores", scores, [(layer.n_head_kv, n_tokens) for layer in layers], infinite=True)
        n_total, forced = self.n_composites(layers, n_tokens), self.forced(layers, n_tokens)
        return self.choose(Rows.of_tokens(scores), n_tokens, n_total, *forced)

    def choose(
        self, rows: Rows, n_tokens: int, n_total: int, n_sink: int = 0, n_recent: int = 0, n_tail: int = 0
    ) -> CompositionPlan:
        """Returns which rows every head keeps, by their scores (KVCompose steps 6 to 9).

        Args:
            rows: all rows of a cache that stands for ``n_tokens`` tokens.
            n_total: number of composites to keep, over all layers.
            n_sink, n_recent: number of first and last tokens that every head keeps.
            n_tail: so many of the last tokens can still be removed after composing; at most ``n_recent``.
        """

        def rank(l: int) -> tuple[FloatArray, np.ndarray]:
            forced = aggregate.with_forced(rows.scores[l], rows.positions[l], n_sink, n_tokens - n_recent)
            return forced, aggregate.rank_tokens(forced)

        ranked = map_layers(rank, len(rows.scores))
        ranks = Ranked([s for s, _ in ranked], [r for _, r in ranked])
        n_kept = self.rule().n_kept(ranks, n_total, n_sink + n_recent)
        kept = map_layers(lambda l: aggregate.select_rows(ranks.ranking[l], int(n_kept[l])), len(rows.scores))
        return CompositionPlan(n_tokens, tuple(kept), tuple(rows.n_rows), n_tail)

    def trial(self, evidence: Evidence, scores: Sequence[FloatArray] | None = None) -> Trial:
        """Returns what ``kvcompose eval`` makes of a full cache: the plan, unless the method is only simulated.

        Args:
            scores: as for ``plan``.
        """
        return Trial(self.plan(evidence, scores))
