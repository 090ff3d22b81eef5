"""The changes that an evaluation makes to a full cache, as a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.types import FloatArray
from .composition import CompositionPlan


@dataclass(frozen=True, eq=False)
class Trial:
    """A plan, and the changes to make after composing it. Methods that only an evaluation can run need these changes.

    Attributes:
        plan: the plan to compose; None: the cache stays full, and ``biases`` hide some of its rows.
        values: the new values of the composites for each layer, float32 ``(n_head_kv, n_kept[l], n_embd_head_v)``;
            empty: they keep their values.
        biases: the terms added to the logits of the rows for each layer, float32 ``(n_head_kv, n_rows)``, minus
            infinity for hidden rows; empty: no terms.
        state: the compressed cache itself, as ``Llama.save_state`` returns it, if it was composed again and again while
            the context was read; then there is no plan.
    """

    plan: CompositionPlan | None
    values: Sequence[FloatArray] = ()
    biases: Sequence[FloatArray] = ()
    state: Any = None

    @property
    def n_kept(self) -> npt.NDArray[Any]:
        """Returns how many tokens every layer keeps, the mean over its heads if these differ, ``(n_layer,)``."""
        if self.state is not None:
            n_rows: npt.NDArray[Any] = self.state.kv_composed.rows.n_rows
            return n_rows
        if self.plan is not None:
            return self.plan.n_kept
        return np.array([(biases > -np.inf).sum(axis=1).mean() for biases in self.biases])
