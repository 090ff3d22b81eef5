"""The evidence that a method reads: a context in a full cache, and the attention that the method requested."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..kernels.types import FloatArray
from ..plan.geometry import LayerGeometry

Positions = npt.NDArray[np.int32]


class RowReader(Protocol):
    """Reads the cached rows of a context, one layer ``l`` at a time; ``native.rows.ContextRows`` reads a live cache."""

    def keys(self, l: int) -> FloatArray:
        """Returns float32 ``(n_head_kv, N, n_embd_head_k)`` as cached: rotated, and Hadamard-rotated if quantized."""

    def values(self, l: int) -> FloatArray:
        """Returns float32 ``(n_head_kv, N, n_embd_head_v)`` as cached: Hadamard-rotated if quantized."""

    def rotate(self, l: int, rows: FloatArray, pos: Positions) -> FloatArray:
        """Returns rows float32 ``(n_rows, n_embd_head_k)`` with the model's RoPE for positions int32 ``(n_rows,)``.

        If the cached keys are Hadamard-rotated, so is the result.
        """

    def unrotate(self, l: int, rows: FloatArray, pos: Positions) -> FloatArray:
        """Inverts ``rotate``."""


@dataclass(frozen=True, eq=False)
class QueryStates:
    """Query vectors of one layer before their rotation.

    Attributes:
        queries: float32 ``(n_head, n_queries, n_embd_head_k)``, scaled so that the product of a rotated query with a
            cached key is the attention logit.
        rotate: applies RoPE to rows float32 ``(n_rows, n_embd_head_k)`` at positions int32 ``(n_rows,)``, with the
            model's own frequencies and scaling; also Hadamard-rotates them if the cached keys are.
    """

    queries: FloatArray
    rotate: Callable[[FloatArray, Positions], FloatArray]


@dataclass(frozen=True, eq=False)
class Evidence:
    """The data a method reads: a context in a full cache, and the attention that the method requested.

    While a prompt is read below a ceiling, the evidence is of its newest tokens alone, and its attention, if there is
    any, is what a piece of them pays to all of them. Then N is their number.

    Attributes:
        n_tokens: context tokens N.
        layers: the cached layers, in order.
        attention: for each layer float32 ``(n_head, N)``: attention probabilities on each context token, aggregated
            over the requested queries and not renormalised. Empty if the method requests no attention.
        n_window: number of last context tokens that are queries of a ``Window``; later queries cannot see all of them.
        rows: reads the cached keys and values; None: the evidence has none.
        repeated: the context tokens that were evaluated again at the positions that they have in the whole repeat,
            int32 ``(n,)``.
        queries: for each layer the queries of ``QueryStates``; empty if the method has no ``state_request``.
        first: position of the first token; 0 unless earlier tokens were read before.
        length: length of the whole context, as far as it is known; 0: it ends with these tokens.
    """

    n_tokens: int
    layers: Sequence[LayerGeometry]
    attention: Sequence[FloatArray] = ()
    n_window: int = 0
    rows: RowReader | None = None
    queries: Sequence[FloatArray] = ()
    repeated: Positions = field(default_factory=lambda: np.empty(0, np.int32))
    first: int = 0
    length: int = 0

    def __post_init__(self) -> None:
        if not self.length:
            object.__setattr__(self, "length", self.first + self.n_tokens)
        if self.attention:
            check_layers("attention", self.attention, [(layer.n_head, self.n_tokens) for layer in self.layers])

    def keys(self, l: int) -> FloatArray:
        """Returns the keys of layer ``l`` as ``RowReader.keys``. Raises ConfigError if there are no rows."""
        return self._reader("keys").keys(l)

    def values(self, l: int) -> FloatArray:
        """Returns the values of layer ``l`` as ``RowReader.values``. Raises ConfigError if there are no rows."""
        return self._reader("values").values(l)

    def unrotate(self, l: int, rows: FloatArray, pos: Positions) -> FloatArray:
        """Returns keys without their rotation, as ``RowReader.unrotate``. Raises ConfigError if there are no rows."""
        return self._reader("unrotate").unrotate(l, rows, pos)

    def states(self, l: int) -> QueryStates:
        """Returns the query vectors of layer ``l``, and the function that rotates them.

        Raises:
            ConfigError: the method has no ``state_request``, so this evidence has none.
        """
        if not self.queries:
            raise _missing("states")
        reader = self._reader("states")
        return QueryStates(self.queries[l], lambda rows, pos: reader.rotate(l, rows, pos))

    def read(self, which: Literal["keys", "values", "states", "unrotate"], l: int) -> Any:
        """Deprecated: call ``keys(l)``, ``values(l)``, ``states(l)`` or ``unrotate(l, rows, pos)`` instead."""
        warnings.warn(f"evidence.read({which!r}, l) is now evidence.{which}(l)", DeprecationWarning, stacklevel=2)
        if which == "unrotate":
            reader = self._reader("unrotate")
            return lambda rows, pos: reader.unrotate(l, rows, pos)
        return getattr(self, which)(l)

    def _reader(self, what: str) -> RowReader:
        if self.rows is None:
            raise _missing(what)
        return self.rows


def _missing(what: str) -> ConfigError:
    return ConfigError(f"the evidence has no {what}")


def check_layers(
    name: str, arrays: Sequence[FloatArray], shapes: Sequence[tuple[int, int]], infinite: bool = False
) -> None:
    """Checks for one finite float32 array of the given shape per layer; ``infinite`` also allows +infinity.

    Raises:
        ConfigError: an array does not fit.
    """
    if len(arrays) != len(shapes):
        raise ConfigError(f"{name} has {len(arrays)} layers; the cache has {len(shapes)}")
    for l, (array, shape) in enumerate(zip(arrays, shapes, strict=True)):
        if array.shape != shape or array.dtype != np.float32:
            raise ConfigError(f"{name}[{l}] is {array.dtype} {array.shape}; float32 {shape} is needed")
        if not (array > -np.inf if infinite else np.isfinite(array)).all():
            raise ConfigError(f"{name}[{l}] {'has NaN or -infinity' if infinite else 'is not finite'}")
