"""KVCompose (arXiv 2509.05165): per-head token choice, composite tokens, one global budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import NoneType
from typing import TypeVar

import numpy as np

from .. import budget
from ..errors import ConfigError
from ..geometry import LayerGeometry
from ..kernels import aggregate
from ..kernels.types import FloatArray
from ..plan import CompositionPlan

T = TypeVar("T")

SCORING = ("repeat", "prompts", "window", "prefill")


@dataclass(frozen=True)
class KVCompose:
    """Options of the method; the defaults are the paper's (section 4) unless said otherwise.

    The budget is exactly one of ``compression_ratio``, ``max_kv_bytes`` and ``n_kept``.

    Attributes:
        compression_ratio: fraction of the context's KV entries that is REMOVED, in [0, 1).
        max_kv_bytes: bytes that the kept rows may take, all layers; the room for new tokens comes on top.
        n_kept: tokens kept per layer, on average over layers.
        scoring: whose attention judges the context: ``"repeat"``, the context itself a second time; ``"prompts"``, the
            ``prompts`` given (task-aware); ``"window"``, the last tokens of the prompt, or ``"prefill"``, all of the
            context's own tokens while they are prefilled. The last two need no second pass. With ``agg_task="mean"``
            they count for each token only the queries that could see it.
        scoring_fraction: share of the context that is run a second time, in pieces spread over all of it, for
            ``scoring="repeat"``: less time for less quality.
        window: last prompt tokens that judge, for ``scoring="window"``; they may lie behind the context, in the
            question.
        prompts: texts that are each run on top of the context, for ``scoring="prompts"``.
        scoring_chunk: query tokens that are on top of the context at a time and removed again before the next; ``None``
            keeps the whole repeat until the end, as the reference does, in a cache of 2N.
        agg_task: over query tokens, ``"max"`` or ``"mean"``.
        agg_group: over the query heads of a KV head, ``"mean"`` or ``"max"``.
        agg_head: over the heads of a composite token, ``"mean"`` or ``"max"``.
        add_v_norm: multiply by the L2 norm of the token's value.
        add_mean_across_heads: add the mean over the layer's KV heads.
        keep_token_lower_bound: first composite ranks of every layer that win before anything else.
        first_layer_rule: layer 0 takes the highest composite score of all layers at every rank. An artefact of the
            reference (Hugging Face reads the cache length from layer 0) that costs budget; for parity checks.
        n_sink: first tokens of the context that every head keeps; together with ``keep_token_lower_bound`` the larger
            of the two is a layer's least budget. Without either a layer may keep nothing, where the newest reference
            keeps one token more than its budget.
        keep_last: last prompt tokens that are not compressed but evaluated on top of the compressed context. The paper
            has no prompt after the context; a chat's last tokens are the question, so they stay whole by default.
        min_tokens: contexts shorter than this are left as they are.
        max_score_bytes: bound of the memory that scoring works in, at any context length; the scores themselves
            (float32, layers x query heads x tokens) come on top.
        n_room: free cells to allocate behind the composites; the cache grows by itself beyond them.
    Raises:
        ConfigError: an option out of its range, or not exactly one budget.
    """

    compression_ratio: float | None = None
    max_kv_bytes: int | None = None
    n_kept: float | None = None
    scoring: str = "repeat"
    scoring_fraction: float = 1.0
    window: int = 64
    prompts: Sequence[str] = ()
    scoring_chunk: int | None = 512
    agg_task: str = "max"
    agg_group: str = "mean"
    agg_head: str = "mean"
    add_v_norm: bool = False
    add_mean_across_heads: bool = True
    keep_token_lower_bound: int = 0
    first_layer_rule: bool = False
    n_sink: int = 0
    keep_last: int = 32
    min_tokens: int = 256
    max_score_bytes: int = 64 << 20
    n_room: int = 256

    def __post_init__(self) -> None:
        self._check_types()
        budgets = {name: getattr(self, name) for name in ("compression_ratio", "max_kv_bytes", "n_kept")}
        given = {name: value for name, value in budgets.items() if value is not None}
        if len(given) != 1:
            raise ConfigError(f"exactly one of {', '.join(budgets)} is needed, {len(given)} given: {given}")
        if self.compression_ratio is not None and not 0 <= self.compression_ratio < 1:
            raise ConfigError(f"compression_ratio={self.compression_ratio}, the fraction removed, is not in [0, 1)")
        for name in ("max_kv_bytes", "n_kept", "min_tokens", "max_score_bytes", "n_room", "scoring_chunk", "window"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise ConfigError(f"{name}={value} is not positive and finite")
        if self.n_room >= 1 << 31:
            raise ConfigError(f"n_room={self.n_room} is not below 2^31")
        for name in ("keep_token_lower_bound", "n_sink", "keep_last"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} is negative")
        for name in ("agg_task", "agg_group", "agg_head"):
            if getattr(self, name) not in ("max", "mean"):
                raise ConfigError(f"{name}={getattr(self, name)!r} is neither 'max' nor 'mean'")
        if self.scoring not in SCORING:
            raise ConfigError(f"scoring={self.scoring!r} is none of {', '.join(map(repr, SCORING))}")
        if not 0 < self.scoring_fraction <= 1:
            raise ConfigError(f"scoring_fraction={self.scoring_fraction} is not in (0, 1]")
        if self.scoring_fraction != 1 and self.scoring != "repeat":
            raise ConfigError(f"scoring_fraction={self.scoring_fraction} needs scoring='repeat'")
        is_list = isinstance(self.prompts, (list, tuple))
        if not is_list or not all(isinstance(text, str) and text for text in self.prompts):
            raise ConfigError(f"prompts={self.prompts!r} is needed, as a list of texts")
        if (self.scoring == "prompts") != bool(self.prompts):
            raise ConfigError(f"prompts={self.prompts!r} is needed, as a list of texts, with scoring='prompts' only")

    def _check_types(self) -> None:
        optional_number, optional_int = (int, float, NoneType), (int, NoneType)
        kinds: dict[str, tuple[type, ...]] = {
            "compression_ratio": optional_number, "n_kept": optional_number, "max_kv_bytes": optional_int,
            "scoring_fraction": (int, float), "window": (int,),
            "scoring_chunk": optional_int, "keep_token_lower_bound": (int,), "n_sink": (int,), "keep_last": (int,),
            "min_tokens": (int,), "max_score_bytes": (int,), "n_room": (int,),
        }  # fmt: skip
        for name, kind in kinds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind):
                what = "a number" if float in kind else "an integer"
                raise ConfigError(f"{name}={value!r} is not {what}")

    def n_composites(self, layers: Sequence[LayerGeometry], n_tokens: int) -> int:
        """Composites that the budget buys for a context of ``n_tokens``, over all layers."""
        if self.compression_ratio is not None:
            return budget.composites_for_ratio(self.compression_ratio, len(layers), n_tokens)
        if self.n_kept is not None:
            return budget.composites_for_n_kept(self.n_kept, len(layers), n_tokens)
        assert self.max_kv_bytes is not None
        return budget.composites_for_bytes(self.max_kv_bytes, layers, n_tokens)

    def plan(
        self,
        attention: Sequence[FloatArray],
        layers: Sequence[LayerGeometry],
        v_norms: Sequence[FloatArray] | None = None,
    ) -> CompositionPlan:
        """Steps 4 to 9 of the method.

        Args:
            attention: for each layer float32 ``(n_head, N)``, agg_task over the query tokens of their attention
                probability on each context token, not renormalised.
            v_norms: for each layer float32 ``(n_head_kv, N)``, needed with ``add_v_norm``.
        Raises:
            ConfigError: scores that are not finite, layers of different N, or a budget below the floors.
        """
        n_tokens = _check_shapes("attention", attention, [layer.n_head for layer in layers])
        if self.add_v_norm:
            if v_norms is None:
                raise ConfigError("add_v_norm needs v_norms")
            if _check_shapes("v_norms", v_norms, [layer.n_head_kv for layer in layers]) != n_tokens:
                raise ConfigError("v_norms and attention are of different contexts")

        def rank(l: int) -> tuple[FloatArray, np.ndarray]:
            scores = self.token_scores(attention[l], layers[l].n_head_kv, v_norms[l] if v_norms is not None else None)
            ranking = aggregate.rank_tokens(scores)
            return aggregate.composite_scores(scores, ranking, self.agg_head), ranking

        ranked = _map_layers(rank, len(layers))
        composites = np.stack([composite for composite, _ in ranked])
        if self.first_layer_rule:
            composites[0] = composites.max(axis=0)
        # forced sinks rank first in every head, so keeping them is a floor as well
        floor = min(max(self.keep_token_lower_bound, self.n_sink), n_tokens)
        n_kept = aggregate.allocate_budget(composites, self.n_composites(layers, n_tokens), floor)
        cells = _map_layers(lambda l: aggregate.select_cells(ranked[l][1], int(n_kept[l])), len(layers))
        return CompositionPlan(n_tokens, tuple(cells))

    def token_scores(self, attention: FloatArray, n_head_kv: int, v_norm: FloatArray | None = None) -> FloatArray:
        """Importance of every token for every KV head of one layer, float32 ``(n_head_kv, N)`` (steps 4 and 5)."""
        scores = aggregate.aggregate_group(attention, n_head_kv, self.agg_group)
        if self.add_v_norm and v_norm is not None:
            scores = scores * v_norm
        if self.add_mean_across_heads:
            scores = aggregate.add_mean_across_heads(scores)
        if self.n_sink:
            scores[:, : self.n_sink] = np.inf
        return scores


def _check_shapes(name: str, arrays: Sequence[FloatArray], n_heads: Sequence[int]) -> int:
    """N, if there is one finite float32 ``(n_heads[l], N)`` a layer; else ConfigError."""
    if len(arrays) != len(n_heads):
        raise ConfigError(f"{name} has {len(arrays)} layers, the cache has {len(n_heads)}")
    n_tokens = arrays[0].shape[-1]
    for l, (array, n_head) in enumerate(zip(arrays, n_heads, strict=True)):
        if array.shape != (n_head, n_tokens) or array.dtype != np.float32:
            raise ConfigError(f"{name}[{l}] is {array.dtype} {array.shape}, float32 {(n_head, n_tokens)} is needed")
        if not np.isfinite(array).all():
            raise ConfigError(f"{name}[{l}] is not finite")
    return n_tokens


def _map_layers(function: Callable[[int], T], n_layer: int) -> list[T]:
    """The kernels release the GIL, so layers run on as many threads as there are cores."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, range(n_layer)))
