"""KVCompose (arXiv 2509.05165): per-head token choice, composite tokens, one global budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..errors import ConfigError
from ..kernels import aggregate
from ..kernels.threads import map_layers
from ..kernels.types import FloatArray
from ..measurements.learned import Learned, may_learn
from ..models.hashes import remembered
from ..native.family import family_of
from ..plan.geometry import LayerGeometry
from ..scoring.evidence import Evidence
from ..scoring.requests import CHUNK, AttentionRequest, Repeat, SpotCheck
from ..support.checks import check_choice, check_finite, check_flag, check_integer, check_number, check_positive
from .allocation import Allocation, GlobalRanking
from .base import Method
from .modes import MODES
from .predictor import Predictor

K = TypeVar("K", bound="KVCompose")

#: the agg_task and agg_group that are learnt
PREDICTED = ("max", "mean")


@dataclass(frozen=True, kw_only=True)
class KVCompose(Method):
    """The KVCompose method; the defaults are the paper's (section 4) unless said otherwise.

    ``Method`` describes the options that all methods share, including the budget.

    Attributes:
        scoring: the source of the attention that scores the context. ``"repeat"``: the context itself, read a second
            time (the paper's). ``"prompts"``: the given ``prompts`` (task-aware). ``"window"``: the last tokens of the
            prompt. ``"prefill"``: all of the context's own tokens during the prefill. The last two need no second pass;
            with ``agg_task="mean"`` they average for each token only over the queries that can see it. ``"learned"``:
            predicts the repeat's attention from keys and values, with what earlier prompts of the model have taught,
            and repeats some pieces of the context to check and to learn. ``"auto"``: ``for_model`` replaces it by
            ``"learned"`` if the other options allow it, else by ``"repeat"``.
        scoring_fraction: share of the context that is read a second time, in pieces spread over all of it, for
            ``scoring="repeat"``; trades quality for time.
        instruction: text that every chunk of the repeat begins with, for ``scoring="repeat"``.
        window: number of last prompt tokens that act as queries, for ``scoring="window"``; they may lie after the
            context, in the question.
        prompts: texts that are each evaluated on top of the context, for ``scoring="prompts"``.
        scoring_chunk: number of query tokens on top of the context at a time; they are removed before the next chunk.
            ``None`` keeps the whole repeat until the end, as the reference does, in a cache of 2N cells.
        agg_task: aggregation over query tokens, ``"max"`` or ``"mean"``.
        agg_group: aggregation over the query heads of a KV head, ``"mean"`` or ``"max"``.
        agg_head: aggregation over the heads of a composite token, ``"mean"`` or ``"max"``.
        add_v_norm: multiply by the L2 norm of the token's value.
        add_mean_across_heads: add the mean over the layer's KV heads.
        n_sink: as in ``Method``, but 4: the paper keeps no sinks, and loses most where little is kept.
        keep_token_lower_bound: number of first composite ranks in every layer that are kept before all others. Without
            it and ``n_sink`` a layer may keep nothing; there the newest reference keeps one token more than its budget.
        threshold: smallest composite score that is kept, although the budget has room for more; with the defaults a
            score is at most 2. A text of which little matters gets a smaller cache. Without a budget all of the context
            may be kept, and what is removed is a result (``KVReport``). Sinks, recent tokens and
            ``keep_token_lower_bound`` stay in any case. None: no limit.
        first_layer_rule: layer 0 gets the highest composite score of all layers at every rank. The reference has this
            as a side effect (Hugging Face reads the cache length from layer 0). It costs budget; use it for parity
            checks.
        in_place: evaluate the chunks of the repeat at the positions that they have in the whole repeat, whose attention
            they then have nearly; False: each directly after the context (``scoring.requests.Repeat``).
        spot_check: share of the context that ``scoring="learned"`` repeats, in [0, 1]. None: a fifth of a model's
            first prompt, 256 to 1,024 tokens; all of the second, at most 2,048 tokens; later an eighth or, if the
            prediction is good, a sixteenth, at most 256 tokens. 0: nothing, once two prompts are known. Of each later
            part of a prompt that is read in parts this share (None: an eighth) is repeated, at most 128 tokens.
        learn: keep what is learnt of the model for later prompts and processes. ``scoring="repeat"`` teaches as well,
            if it is ``in_place`` or whole (``scoring_chunk=None``). With ``KVCOMPOSE_LEARN=off`` in the environment
            nothing is kept or used: every prompt is scored as if it were the model's first.
        predictor: the model, and what is known of it, for ``scoring="learned"``; ``for_model`` sets it.
    Raises:
        ConfigError: an option is out of range, or the number of budgets given is not one.
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
    threshold: float | None = None
    first_layer_rule: bool = False
    in_place: bool = False
    spot_check: float | None = None
    learn: bool = True
    predictor: Predictor = field(default_factory=Predictor, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_finite("threshold", self.threshold)
        if self.threshold is not None and (self.compression_ratio, self.max_kv_bytes, self.n_kept) == (None,) * 3:
            object.__setattr__(self, "compression_ratio", 0.0)
        super().__post_init__()
        if self.threshold is not None and (self.simulated or getattr(self.rule(), "threshold", None) != self.threshold):
            raise ConfigError(f"threshold={self.threshold} needs the method's own ranking of composite tokens")
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
        check_number("spot_check", self.spot_check, optional=True)
        if self.spot_check is not None and not 0 <= self.spot_check <= 1:
            raise ConfigError(f"spot_check={self.spot_check}, a share of the context, is not in [0, 1]")
        for name in ("add_v_norm", "add_mean_across_heads", "first_layer_rule", "in_place", "learn"):
            check_flag(name, getattr(self, name))
        self._check_scoring()

    def _check_scoring(self) -> None:
        if self.scoring == "surrogate":
            raise ConfigError("scoring='surrogate' is now scoring='learned', which needs no calibration")
        check_choice("scoring", self.scoring, tuple(MODES))
        if not 0 < self.scoring_fraction <= 1:
            raise ConfigError(f"scoring_fraction={self.scoring_fraction} is not in (0, 1]")
        if self.scoring_fraction != 1 and not self.takes("scoring_fraction"):
            raise ConfigError(f"scoring_fraction={self.scoring_fraction} needs scoring='repeat'")
        if not isinstance(self.instruction, str) or (self.instruction and not self.takes("instruction")):
            raise ConfigError(f"instruction={self.instruction!r} must be a text, and needs scoring='repeat'")
        is_list = isinstance(self.prompts, (list, tuple))
        if not is_list or not all(isinstance(text, str) and text for text in self.prompts):
            raise ConfigError(f"prompts={self.prompts!r} must be a list of texts that are not empty")
        if self.takes("prompts") != bool(self.prompts):
            raise ConfigError(f"prompts={self.prompts!r}: scoring='prompts' needs at least one text, others none")
        if self.scoring == "learned" and self._aggregations != PREDICTED:
            given = f"agg_task={self.agg_task!r}, agg_group={self.agg_group!r}"
            raise ConfigError(f"{given}: scoring='learned' predicts max and mean")

    @classmethod
    def paper(cls, **budget: Any) -> KVCompose:
        """Returns the paper's exact settings, whatever our defaults are: the whole repeat in one piece, no sinks.

        Args:
            **budget: one of Method's budgets, and options that the paper does not decide, e.g. ``keep_last``.
        Raises:
            ConfigError: an option that the paper decides.
        """
        settings: dict[str, Any] = {
            "scoring": "repeat", "scoring_chunk": None, "scoring_fraction": 1.0, "instruction": "",
            "agg_task": "max", "agg_group": "mean", "agg_head": "mean", "add_v_norm": False,
            "add_mean_across_heads": True, "keep_token_lower_bound": 0, "first_layer_rule": False,
            "allocation": "global", "n_sink": 0, "n_recent": 0, "threshold": None,
        }  # fmt: skip
        if decided := sorted(settings.keys() & budget):
            raise ConfigError(f"{', '.join(decided)}: the paper's settings decide this; use {cls.__name__}() instead")
        return cls(**settings, **budget)

    @property
    def _aggregations(self) -> tuple[str, str]:
        return self.agg_task, self.agg_group

    def takes(self, option: str) -> bool:
        """Returns whether the chosen ``scoring`` allows ``option``, one of those in ``MODES``."""
        return option in MODES[self.scoring].takes

    def repeat(self) -> Repeat:
        """Returns the repeat that the options describe."""
        return Repeat(self.scoring_chunk, self.scoring_fraction, self.instruction, in_place=self.in_place)

    def check(self) -> SpotCheck | None:
        """Returns the pieces of the context that ``scoring="learned"`` repeats; None: it repeats nothing."""
        return self.predictor.check(self.spot_check) if self.scoring == "learned" else None

    @property
    def can_be_predicted(self) -> bool:
        """Returns whether the options ask for the repeat that is learnt."""
        return (self.scoring_fraction, self.instruction, *self._aggregations) == (1, "", *PREDICTED)

    @property
    def scores_alone(self) -> bool:
        return self.scoring == "learned"

    @property
    def reads_in_parts(self) -> bool:
        # the first prompts teach most if all of them can be repeated; only a budget in tokens or bytes forbids it
        return self.streams and (self.has_ceiling or self.predictor.is_trusted)

    @property
    def n_on_top(self) -> int:
        check = self.check()
        if check is None:
            return 0
        return CHUNK if check.share == 1 else check.piece  # a whole repeat goes in chunks

    def n_again(self, n_tokens: int) -> int:
        return self.predictor.n_again(self.spot_check, n_tokens) if self.scoring == "learned" else 0

    def can_score_alone(self, layers: Sequence[LayerGeometry]) -> bool:
        return self.streams and self.known is not None and self.known.fits(layers)

    @property
    def attention_request(self) -> AttentionRequest | None:
        queries = MODES[self.scoring].queries(self)
        return None if queries is None else AttentionRequest(queries, self.agg_task)  # type: ignore[arg-type]

    def for_model(self: K, model_path: Path) -> K:
        """Returns the method with ``"auto"`` resolved, and with what it needs to know about the model."""
        scoring = self.scoring
        if scoring == "auto":
            scoring = "learned" if self.can_be_predicted else "repeat"
        repeats = scoring == "repeat" and self.can_be_predicted and self.repeat().is_at_its_places
        learns = scoring == "learned" or repeats
        family = remembered(model_path, "family", family_of) if learns else ""
        return replace(self, scoring=scoring, predictor=replace(self.predictor, family=family))

    def informed(self: K, learn: bool = True, known: Learned | None = None) -> K:
        """Returns the method with what is known of the model now."""
        predictor = self.predictor.informed(known) if self.scoring == "learned" else self.predictor
        return replace(self, predictor=predictor, learn=self.learn and learn)

    def taught_by(self: K, evidence: Evidence) -> K:
        """Returns the method with what the check of this context taught, and keeps that for later prompts."""
        if self.scoring == "learned":
            predictor = self.predictor.taught_by(evidence, self._grouped(evidence), self.learn)
            return replace(self, predictor=predictor)
        if self.learn and may_learn() and self.predictor.family and len(evidence.repeated):
            self.predictor.learn_from(evidence, self._grouped(evidence))  # a repeat that was asked for teaches as well
        return self

    @property
    def known(self) -> Learned | None:
        return self.predictor.known

    @property
    def note(self) -> str:
        return self.predictor.note

    def fingerprint(self) -> bytes:
        """Returns what is known of the model, as bytes; empty: nothing."""
        return b"".join(layer.weights.tobytes() for layer in self.known.layers) if self.known else b""

    def rule(self) -> Allocation:
        """Same as ``Method.rule``, but ``"global"`` is the method's own rule, with its options."""
        return self.default_allocation() if self.allocation == "global" else super().rule()

    def default_allocation(self) -> Allocation:
        return GlobalRanking(self.agg_head, self.keep_token_lower_bound, self.first_layer_rule, self.threshold)

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """Returns the scores of the method's steps 4 and 5."""
        layers = range(len(evidence.layers) if self.add_v_norm else 0)
        # quantized values are stored Hadamard-rotated (llama-kv-cache.cpp, attn_rot_v), which keeps norms
        norms = [np.linalg.norm(evidence.values(l), axis=2) for l in layers]  # one layer in memory at a time

        predicted = self._predicted(evidence)

        def score(l: int) -> FloatArray:
            scores = predicted[l] if predicted else self._grouped_layer(evidence, l)
            if self.add_v_norm:
                scores = scores * norms[l]
            return aggregate.add_mean_across_heads(scores) if self.add_mean_across_heads else scores

        return map_layers(score, len(evidence.layers))

    def _grouped(self, evidence: Evidence) -> list[FloatArray]:
        """Returns the attention that was collected, for each layer ``(n_head_kv, N)``; empty: none was."""
        return map_layers(lambda l: self._grouped_layer(evidence, l), len(evidence.attention))

    def _grouped_layer(self, evidence: Evidence, l: int) -> FloatArray:
        return aggregate.aggregate_group(evidence.attention[l], evidence.layers[l].n_head_kv, self.agg_group)

    def _predicted(self, evidence: Evidence) -> list[FloatArray]:
        """Returns the predicted attention, for each layer ``(n_head_kv, N)``; empty: it was collected."""
        if self.scoring != "learned":
            return []
        # scores alone keep nothing: ``compress`` does, once for each context
        method = self if self.note else self.informed(learn=False).taught_by(evidence)
        return method.predictor.predict(evidence, self._grouped(evidence))
