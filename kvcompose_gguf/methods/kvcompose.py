"""KVCompose (arXiv 2509.05165): per-head token choice, composite tokens, one global budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import numpy as np

from ..errors import ConfigError
from ..kernels import aggregate
from ..kernels.types import FloatArray
from ..queries import AttentionRequest, Evidence, Prefill, Prompts, Repeat, Window
from ..surrogate import Surrogate, find_surrogate, load_surrogate
from .allocation import Allocation, GlobalRanking
from .base import Method, check_choice, check_flag, check_integer, check_number, check_positive, map_layers

SCORING = ("auto", "repeat", "prompts", "window", "prefill", "surrogate")

K = TypeVar("K", bound="KVCompose")

#: agg_task and agg_group of what surrogates are fitted to
PREDICTED = ("max", "mean")


@dataclass(frozen=True, kw_only=True)
class KVCompose(Method):
    """Options of the method; the defaults are the paper's (section 4) unless said otherwise.

    Those of every method, the budget among them, are described at ``Method``.

    Attributes:
        scoring: whose attention judges the context: ``"repeat"``, the context itself a second time (the paper's);
            ``"prompts"``, the ``prompts`` given (task-aware); ``"window"``, the last tokens of the prompt, or
            ``"prefill"``, all of the context's own tokens while they are prefilled. These two need no second pass.
            With ``agg_task="mean"`` they count for each token only the queries that could see it. ``"surrogate"``:
            what the repeat would give is predicted from keys and values; for models that were calibrated.
            ``"auto"``: ``for_model`` makes it ``"surrogate"`` if the model has one and no option speaks against it,
            else ``"repeat"``.
        scoring_fraction: share of the context that is run a second time, in pieces spread over all of it, for
            ``scoring="repeat"``: less time for less quality.
        instruction: text that every chunk of the repeat begins with, for ``scoring="repeat"``.
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
        n_sink: as in ``Method``, but 4: the paper has none, and loses most where little is kept.
        keep_token_lower_bound: first composite ranks of every layer that win before anything else. Without it and
            ``n_sink`` a layer may keep nothing, where the newest reference keeps one token more than its budget.
        first_layer_rule: layer 0 takes the highest composite score of all layers at every rank. An artefact of the
            reference (Hugging Face reads the cache length from layer 0) that costs budget; for parity checks.
        surrogate: of the model, for ``scoring="surrogate"``; None: the one that ``for_model`` finds.
    Raises:
        ConfigError: an option out of its range, or not exactly one budget.
    """

    n_sink: int = 4
    scoring: str = "auto"
    scoring_fraction: float = 1.0
    instruction: str = ""
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
    surrogate: Surrogate | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("scoring_fraction", self.scoring_fraction)
        check_integer("scoring_chunk", self.scoring_chunk, optional=True)
        check_integer("window", self.window)
        check_integer("keep_token_lower_bound", self.keep_token_lower_bound)
        check_positive("scoring_chunk", self.scoring_chunk)
        check_positive("window", self.window)
        if self.keep_token_lower_bound < 0:
            raise ConfigError(f"keep_token_lower_bound={self.keep_token_lower_bound} is negative")
        for name in ("agg_task", "agg_group", "agg_head"):
            check_choice(name, getattr(self, name), ("max", "mean"))
        for name in ("add_v_norm", "add_mean_across_heads", "first_layer_rule"):
            check_flag(name, getattr(self, name))
        check_choice("scoring", self.scoring, SCORING)
        if not 0 < self.scoring_fraction <= 1:
            raise ConfigError(f"scoring_fraction={self.scoring_fraction} is not in (0, 1]")
        if self.scoring_fraction != 1 and not self._may_repeat:
            raise ConfigError(f"scoring_fraction={self.scoring_fraction} needs scoring='repeat'")
        if not isinstance(self.instruction, str) or (self.instruction and not self._may_repeat):
            raise ConfigError(f"instruction={self.instruction!r} is a text, and needs scoring='repeat'")
        is_list = isinstance(self.prompts, (list, tuple))
        if not is_list or not all(isinstance(text, str) and text for text in self.prompts):
            raise ConfigError(f"prompts={self.prompts!r} is needed, as a list of texts")
        if (self.scoring == "prompts") != bool(self.prompts):
            raise ConfigError(f"prompts={self.prompts!r} is needed, as a list of texts, with scoring='prompts' only")
        if not isinstance(self.surrogate, (Surrogate, NoneType)):
            raise ConfigError(f"surrogate={self.surrogate!r} is not a Surrogate")
        if self.scoring == "surrogate" and self._aggregations != PREDICTED:
            raise ConfigError(
                f"agg_task={self.agg_task!r}, agg_group={self.agg_group!r}: scoring='surrogate' predicts max and mean"
            )

    @classmethod
    def paper(cls, **budget: Any) -> KVCompose:
        """The paper's exact settings, whatever our defaults are: the whole repeat in one piece, nothing forced.

        Args:
            **budget: one of Method's budgets, and what the paper does not decide, e.g. ``keep_last``.
        Raises:
            ConfigError: one of the settings that the paper decides.
        """
        settings: dict[str, Any] = {
            "scoring": "repeat", "scoring_chunk": None, "scoring_fraction": 1.0, "instruction": "",
            "agg_task": "max", "agg_group": "mean", "agg_head": "mean", "add_v_norm": False,
            "add_mean_across_heads": True, "keep_token_lower_bound": 0, "first_layer_rule": False,
            "allocation": "global", "n_sink": 0, "n_recent": 0,
        }  # fmt: skip
        if decided := sorted(settings.keys() & budget):
            raise ConfigError(f"{', '.join(decided)}: decided by the paper's settings, use {cls.__name__}()")
        return cls(**settings, **budget)

    @property
    def _aggregations(self) -> tuple[str, str]:
        return self.agg_task, self.agg_group

    @property
    def _can_be_predicted(self) -> bool:
        """No option asks for another repeat than surrogates are fitted to."""
        return (self.scoring_fraction, self.instruction, *self._aggregations) == (1, "", *PREDICTED)

    @property
    def _may_repeat(self) -> bool:
        return self.scoring in ("auto", "repeat")

    @property
    def attention_request(self) -> AttentionRequest | None:
        if self.scoring == "surrogate":
            return None
        queries: Repeat | Prompts | Window | Prefill
        if self._may_repeat:
            queries = Repeat(self.scoring_chunk, self.scoring_fraction, self.instruction)
        elif self.scoring == "prompts":
            queries = Prompts(tuple(self.prompts), self.scoring_chunk)
        elif self.scoring == "window":
            queries = Window(self.window)
        else:
            queries = Prefill()
        return AttentionRequest(queries, self.agg_task)  # type: ignore[arg-type]

    def for_model(self: K, model_path: Path) -> K:
        """With the model's surrogate, if it is needed and none was given; ``"auto"`` is decided."""
        if self.scoring == "surrogate" and self.surrogate is None:
            return replace(self, surrogate=load_surrogate(model_path))
        if self.scoring != "auto":
            return self
        surrogate = (self.surrogate or find_surrogate(model_path)) if self._can_be_predicted else None
        return replace(self, scoring="surrogate" if surrogate else "repeat", surrogate=surrogate)

    def rule(self) -> Allocation:
        """As ``Method.rule``; the name ``"global"`` is the method's own rule, with its options."""
        return self.default_allocation() if self.allocation == "global" else super().rule()

    def default_allocation(self) -> Allocation:
        return GlobalRanking(self.agg_head, self.keep_token_lower_bound, self.first_layer_rule)

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """Steps 4 and 5 of the method."""

        layers = range(len(evidence.layers) if self.add_v_norm else 0)
        # quantized values are stored Hadamard-rotated (llama-kv-cache.cpp, attn_rot_v), which keeps norms
        norms = [np.linalg.norm(evidence.read("values", l), axis=2) for l in layers]  # one layer in memory at a time

        predicted = self._predicted(evidence) if self.scoring == "surrogate" else []

        def score(l: int) -> FloatArray:
            if predicted:
                scores = predicted[l]
            else:
                scores = aggregate.aggregate_group(evidence.attention[l], evidence.layers[l].n_head_kv, self.agg_group)
            if self.add_v_norm:
                scores = scores * norms[l]
            return aggregate.add_mean_across_heads(scores) if self.add_mean_across_heads else scores

        return map_layers(score, len(evidence.layers))

    def _predicted(self, evidence: Evidence) -> list[FloatArray]:
        if self.surrogate is None:
            raise ConfigError("scoring='surrogate': kvcompose calibrate MODEL, then for_model(MODEL)")
        return self.surrogate.predict(evidence)
