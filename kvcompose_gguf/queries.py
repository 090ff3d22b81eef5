"""Whose attention judges a context: the values that a method asks with, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .errors import ConfigError
from .geometry import LayerGeometry
from .kernels.types import FloatArray


@dataclass(frozen=True)
class Repeat:
    """The context itself, a second time on top of its cache.

    Attributes:
        chunk: query tokens that are on top of the context at a time; ``None``: all of them, in a cache of 2N.
        fraction: share of the context that is run again, in pieces from all over.
        instruction: text before every chunk, e.g. KVzip's; its own tokens are queries as well.
        continuation: text before every chunk but the first, followed by the 8 tokens before the chunk; empty: the
            ``instruction``.
        own: a token is judged by the chunk that repeats it alone, as by KVzip; needs all of the context.
    """

    chunk: int | None = 512
    fraction: float = 1.0
    instruction: str = ""
    continuation: str = ""
    own: bool = False


@dataclass(frozen=True)
class Prompts:
    """Texts of the user, each on top of the context, ``chunk`` tokens at a time."""

    texts: tuple[str, ...]
    chunk: int | None = 512


@dataclass(frozen=True)
class Window:
    """The last ``size`` tokens of the prompt; they may lie behind the context, in the question."""

    size: int


@dataclass(frozen=True)
class Prefill:
    """The context's own tokens while they are prefilled."""


@dataclass(frozen=True)
class AttentionRequest:
    """The attention that a method needs: equal requests have equal answers.

    Attributes:
        queries: the query tokens.
        aggregation: over these, ``"max"``, or ``"mean"`` over those that could see the token.
    """

    queries: Repeat | Prompts | Window | Prefill
    aggregation: Literal["max", "mean"] = "max"


@dataclass(frozen=True)
class StateRequest:
    """Query vectors and the means to rotate them: the last ``n_queries`` context tokens, at most ``n_batch``."""

    n_queries: int


@dataclass(frozen=True, eq=False)
class QueryStates:
    """Query vectors of one layer before their rotation.

    Attributes:
        queries: float32 ``(n_head, n_queries, n_embd_head_k)``, scaled: the product of a rotated one with a cached key
            is the attention logit.
        rotate: RoPE of rows float32 ``(n_rows, n_embd_head_k)`` for positions int32 ``(n_rows,)``, with the model's own
            frequencies and scaling, and Hadamard-rotated if the cached keys are.
    """

    queries: FloatArray
    rotate: Callable[[FloatArray, npt.NDArray[np.int32]], FloatArray]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a method may look at: a context in a full cache, and the attention it asked for.

    Attributes:
        n_tokens: context tokens N.
        layers: the cached layers, in order.
        attention: for each layer float32 ``(n_head, N)``, the request's aggregate over its queries of their attention
            probability on each context token, not renormalised; empty if no attention was asked for.
        n_window: last context tokens that were queries of a ``Window`` themselves: later ones have not seen them all.
        keys, values: of a layer by its number, float32 ``(n_head_kv, N, n_embd_head)``, as they are cached: keys
            with their rotation, and both Hadamard-rotated if they are quantized. Read only when called.
        states: query vectors of a layer, for methods with a ``state_request``.
    """

    n_tokens: int
    layers: Sequence[LayerGeometry]
    attention: Sequence[FloatArray] = ()
    n_window: int = 0
    keys: Callable[[int], FloatArray] | None = None
    values: Callable[[int], FloatArray] | None = None
    states: Callable[[int], QueryStates] | None = None

    def __post_init__(self) -> None:
        if self.attention:
            check_layers("attention", self.attention, [(layer.n_head, self.n_tokens) for layer in self.layers])

    def read(self, which: Literal["keys", "values", "states"], l: int) -> Any:
        """``keys``, ``values`` or ``states`` of layer ``l``.

        Raises:
            ConfigError: this evidence is without them.
        """
        reader = getattr(self, which)
        if reader is None:
            raise ConfigError(f"the evidence has no {which}")
        return reader(l)


def check_layers(
    name: str, arrays: Sequence[FloatArray], shapes: Sequence[tuple[int, int]], infinite: bool = False
) -> None:
    """One float32 array of the given shape a layer, without NaN and, unless ``infinite``, without infinities.

    Raises:
        ConfigError: something else.
    """
    if len(arrays) != len(shapes):
        raise ConfigError(f"{name} has {len(arrays)} layers, the cache has {len(shapes)}")
    for l, (array, shape) in enumerate(zip(arrays, shapes, strict=True)):
        if array.shape != shape or array.dtype != np.float32:
            raise ConfigError(f"{name}[{l}] is {array.dtype} {array.shape}, float32 {shape} is needed")
        if np.isnan(array).any() if infinite else not np.isfinite(array).all():
            raise ConfigError(f"{name}[{l}] {'has NaN' if infinite else 'is not finite'}")
