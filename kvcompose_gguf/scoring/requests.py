"""What a method asks for (the queries that score a context), and the evidence that it receives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..kernels.types import FloatArray
from ..plan.geometry import LayerGeometry
from ..support.checks import check_choice, check_flag, check_integer, check_number, check_positive


@dataclass(frozen=True)
class Repeat:
    """The context itself, evaluated a second time on top of its cache.

    Attributes:
        chunk: number of query tokens on top of the context at a time; ``None``: all of them, in a cache of 2N cells.
        fraction: share of the context that is evaluated again, in pieces spread over all of it.
        instruction: text before every chunk, e.g. KVzip's; its tokens are queries too.
        continuation: text before every chunk but the first, followed by the 8 tokens before the chunk; empty: the
            ``instruction``.
        own: score a token only by the chunk that repeats it, as KVzip does; needs the whole context.
    Raises:
        ConfigError: an option is out of range. The requests below raise it too.
    """

    chunk: int | None = 512
    fraction: float = 1.0
    instruction: str = ""
    continuation: str = ""
    own: bool = False

    def __post_init__(self) -> None:
        _check_chunk(self.chunk)
        check_number("fraction", self.fraction)
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction={self.fraction} is not in (0, 1]")
        for name in ("instruction", "continuation"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not a text")
        check_flag("own", self.own)
        if self.own and self.fraction != 1:
            raise ConfigError(f"own=True needs the whole context, fraction=1, not {self.fraction}")


@dataclass(frozen=True)
class Prompts:
    """The user's texts, each evaluated on top of the context, ``chunk`` tokens at a time."""

    texts: Sequence[str]
    chunk: int | None = 512

    def __post_init__(self) -> None:
        is_list = isinstance(self.texts, (list, tuple))
        if not is_list or not self.texts or not all(isinstance(text, str) and text for text in self.texts):
            raise ConfigError(f"texts={self.texts!r} is not a list of texts")
        object.__setattr__(self, "texts", tuple(self.texts))  # equal requests must have equal hashes
        _check_chunk(self.chunk)


@dataclass(frozen=True)
class Window:
    """The last ``size`` tokens of the prompt; they may lie after the context, in the question."""

    size: int

    def __post_init__(self) -> None:
        check_integer("size", self.size)
        check_positive("size", self.size)


@dataclass(frozen=True)
class Prefill:
    """The context's own tokens during the prefill."""


Queries = Repeat | Prompts | Window | Prefill


@dataclass(frozen=True)
class AttentionRequest:
    """The attention that a method needs. Equal requests get equal answers.

    Attributes:
        queries: the query tokens.
        aggregation: over the queries: ``"max"``, or ``"mean"`` over those that can see the token.
    """

    queries: Queries
    aggregation: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        if not isinstance(self.queries, Queries):
            raise ConfigError(f"queries={self.queries!r} is none of Repeat, Prompts, Window and Prefill")
        check_choice("aggregation", self.aggregation, ("max", "mean"))


@dataclass(frozen=True)
class StateRequest:
    """Query vectors of the last ``n_queries`` context tokens (at most ``n_ubatch``), and a function to rotate them."""

    n_queries: int

    def __post_init__(self) -> None:
        check_integer("n_queries", self.n_queries)
        check_positive("n_queries", self.n_queries)


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
    rotate: Callable[[FloatArray, npt.NDArray[np.int32]], FloatArray]


@dataclass(frozen=True, eq=False)
class Evidence:
    """The data a method reads: a context in a full cache, and the attention that the method requested.

    Attributes:
        n_tokens: context tokens N.
        layers: the cached layers, in order.
        attention: for each layer float32 ``(n_head, N)``: attention probabilities on each context token, aggregated
            over the requested queries and not renormalised. Empty if the method requests no attention.
        n_window: number of last context tokens that are queries of a ``Window``; later queries cannot see all of them.
        keys, values: for a layer number return float32 ``(n_head_kv, N, n_embd_head)`` as cached: keys with their
            rotation, and both Hadamard-rotated if they are quantized. Called only when needed.
        states: returns a layer's query vectors, for methods with a ``state_request``.
        unrotate: for a layer number returns a function that undoes the rotation of cached keys float32
            ``(n_rows, n_embd_head_k)`` at positions int32 ``(n_rows,)``.
    """

    n_tokens: int
    layers: Sequence[LayerGeometry]
    attention: Sequence[FloatArray] = ()
    n_window: int = 0
    keys: Callable[[int], FloatArray] | None = None
    values: Callable[[int], FloatArray] | None = None
    states: Callable[[int], QueryStates] | None = None
    unrotate: Callable[[int], Callable[[FloatArray, npt.NDArray[np.int32]], FloatArray]] | None = None

    def __post_init__(self) -> None:
        if self.attention:
            check_layers("attention", self.attention, [(layer.n_head, self.n_tokens) for layer in self.layers])

    def read(self, which: Literal["keys", "values", "states", "unrotate"], l: int) -> Any:
        """Returns ``keys``, ``values``, ``states`` or ``unrotate`` of layer ``l``.

        Raises:
            ConfigError: this evidence does not include them.
        """
        reader = getattr(self, which)
        if reader is None:
            raise ConfigError(f"the evidence has no {which}")
        return reader(l)


def _check_chunk(chunk: int | None) -> None:
    check_integer("chunk", chunk, optional=True)
    check_positive("chunk", chunk)


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
