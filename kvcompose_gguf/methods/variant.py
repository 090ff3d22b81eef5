"""Attempts to improve on the paper (`kvcompose eval --method @variants`); successful ones move into KVCompose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..errors import ConfigError, UnsupportedError
from ..kernels import aggregate
from ..kernels.types import FloatArray
from ..plan.trial import Trial
from ..scoring.evidence import Evidence
from ..scoring.requests import Repeat
from ..support.checks import check_choice, check_flag, check_number, check_odd
from .kvcompose import KVCompose


@dataclass(frozen=True, kw_only=True)
class Variant(KVCompose):
    """KVCompose with one more idea from the literature.

    Attributes:
        own: score a token only by the chunk that repeats it (KVzip).
        pool: number of tokens that scores are pooled over, odd (SnapKV).
        pooling: ``"mean"`` or ``"max"``.
        output_norm: multiply attention by the norm of the value's contribution to the residual stream, ||W_o v||.
        fold: share of an evicted token's weight with which its value is merged into the kept token of the same head
            that has the most similar key; the weights are the scores, and keys do not change.
        correct: raise the kept tokens' logits by this times log(all scores / kept scores) of their head.
    """

    own: bool = False
    pool: int = 1
    pooling: str = "mean"
    output_norm: bool = False
    fold: float = 0.0
    correct: float = 0.0
    grams: Sequence[FloatArray] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("own", self.own)
        check_flag("output_norm", self.output_norm)
        check_odd("pool", self.pool)
        check_choice("pooling", self.pooling, ("mean", "max"))
        check_number("fold", self.fold)
        check_number("correct", self.correct)
        for name in ("fold", "correct"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ConfigError(f"{name}={getattr(self, name)} is not a finite number of at least 0")
        if self.own and not (self.takes("scoring_fraction") and self.scoring_fraction == 1):
            raise ConfigError("own=True needs scoring='repeat' of the whole context")
        if self.output_norm and self.scoring == "learned":
            raise ConfigError("output_norm=True weighs attention, but scoring='learned' predicts it")

    @property
    def can_be_predicted(self) -> bool:
        return super().can_be_predicted and not self.own and not self.output_norm

    def repeat(self) -> Repeat:
        return replace(super().repeat(), own=self.own, in_place=self.in_place and not self.own)

    def for_model(self, model_path: Path) -> Variant:
        """Returns the variant with the Gram matrices of the output projections, if it needs them."""
        made = super().for_model(model_path)
        return replace(made, grams=output_grams(model_path)) if self.output_norm and not self.grams else made

    def scores(self, evidence: Evidence) -> list[FloatArray]:
        """Returns the scores of KVCompose's steps 4 and 5, with the variant's idea in between."""
        attention = list(evidence.attention)
        if self.output_norm:
            attention = [self._weighed(evidence, l) for l in range(len(attention))]
        scores = super().scores(replace(evidence, attention=attention))
        if self.pool == 1:
            return scores
        return [aggregate.pool_tokens(s, self.pool, self.pooling) for s in scores]

    def _weighed(self, evidence: Evidence, l: int) -> FloatArray:
        layer = evidence.layers[l]
        if layer.v_quantized:
            raise UnsupportedError("output_norm=True: quantized values are Hadamard-rotated and cannot be weighed")
        if layer.v_in_k:
            raise UnsupportedError("output_norm=True: latent attention has another output matrix behind its values")
        values = np.repeat(evidence.values(l), layer.n_head // layer.n_head_kv, axis=0)
        squared = np.einsum("hid,hde,hie->hi", values, self.grams[layer.il], values, optimize=True)
        weighed: FloatArray = (evidence.attention[l] * np.sqrt(np.maximum(squared, 0))).astype(np.float32)
        return weighed

    @property
    def simulated(self) -> bool:
        return bool(self.fold or self.correct or self.output_norm)

    def trial(self, evidence: Evidence, scores: Sequence[FloatArray] | None = None) -> Trial:
        """Returns the plan with its edits."""
        scores = self.scores(evidence) if scores is None else scores
        plan = self.plan(evidence, scores)
        layers = range(len(evidence.layers))
        values = [self._folded(evidence, scores[l], plan.rows[l], l) for l in layers] if self.fold else []
        biases = [self._corrections(scores[l], plan.rows[l]) for l in layers] if self.correct else []
        return Trial(plan, values, biases)

    def _folded(self, evidence: Evidence, scores: FloatArray, cells: np.ndarray, l: int) -> FloatArray:
        keys, values = evidence.keys(l), evidence.values(l)
        keys = keys / np.maximum(np.linalg.norm(keys, axis=2, keepdims=True), 1e-12)
        out = np.empty((len(cells), cells.shape[1], values.shape[2]), dtype=np.float32)
        for h, kept in enumerate(cells):
            gone = np.setdiff1d(np.arange(evidence.n_tokens), kept)
            weight = scores[h, kept].astype(np.float64)
            total = weight[:, None] * values[h, kept]
            if len(kept) and len(gone):
                to = (keys[h, gone] @ keys[h, kept].T).argmax(axis=1)
                share = self.fold * scores[h, gone].astype(np.float64)
                np.add.at(total, to, share[:, None] * values[h, gone])
                np.add.at(weight, to, share)
            out[h] = values[h, kept]  # values without weight stay unchanged
            np.divide(total, weight[:, None], out=out[h], where=weight[:, None] > 0, casting="same_kind")
        return out

    def _corrections(self, scores: FloatArray, cells: np.ndarray) -> FloatArray:
        kept = np.take_along_axis(scores, cells.astype(np.int64), axis=1).sum(axis=1, dtype=np.float64)
        whole = scores.sum(axis=1, dtype=np.float64)
        raised = self.correct * np.log(np.maximum(whole, 1e-30) / np.maximum(kept, 1e-30))
        return np.repeat(raised[:, None], cells.shape[1], axis=1).astype(np.float32)


def output_grams(model_path: Path) -> list[FloatArray]:
    """Returns W_h^T W_h of each query head's output projection for each layer of the model, float32 ``(n_head, d, d)``.

    Raises:
        UnsupportedError: a layer has no output projection.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(model_path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    arch = reader.fields["general.architecture"].contents()
    n_layer = int(reader.fields[f"{arch}.block_count"].contents())
    n_head = int(reader.fields[f"{arch}.attention.head_count"].contents())
    grams = []
    for il in range(n_layer):
        tensor = tensors.get(f"blk.{il}.attn_output.weight")
        if tensor is None:
            raise UnsupportedError(f"{model_path.name} has no output projection in layer {il}")
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)  # (n_embd, n_head*d)
        heads = weight.reshape(weight.shape[0], n_head, -1)
        grams.append(np.einsum("nhd,nhe->hde", heads, heads, optimize=True).astype(np.float32))
    return grams
