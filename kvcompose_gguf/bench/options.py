"""What ``kvcompose bench`` measures: context sizes and variants of the cache, as values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, ContextLengthError
from ..native.kv_types import KV_TYPES
from .result import Variant

#: smallest default context size
N_FIRST = 1024
#: cells after the context, if the model has room for them: one scoring chunk
N_ROOM = 512


@dataclass(frozen=True)
class BenchOptions:
    """Options of a benchmark.

    Attributes:
        n_tokens: context sizes; None: powers of two from 1,024 on, and the largest that the model allows.
        up_to: upper limit of the default sizes; None: the model's limit.
        ratios: fractions that KVCompose removes. Each is measured with the first of ``kv_types``, and the middle one
            with the other types as well.
        kv_types: types of keys and values, each measured with a full cache; the first full cache is the baseline.
        n_decode: tokens per decode sample.
        repeats: decode samples per variant and size.
        threads: None: llama-cpp-python's default.
        text: a UTF-8 file, cut or repeated to each size; None: seeded random tokens of the model's vocabulary.
    Raises:
        ConfigError: an option is out of range.
    """

    n_tokens: tuple[int, ...] | None = None
    up_to: int | None = None
    ratios: tuple[float, ...] = (0.5, 0.75, 0.9)
    kv_types: tuple[str, ...] = ("f16", "q8_0")
    n_decode: int = 32
    repeats: int = 5
    threads: int | None = None
    text: Path | None = None

    def __post_init__(self) -> None:
        for name in ("n_tokens", "ratios", "kv_types"):
            values = getattr(self, name)
            if values is not None and (len(values) == 0 or len(set(values)) < len(values)):
                shown = "compression_ratio" if name == "ratios" else name  # the option's name
                raise ConfigError(f"{shown}={list(values)} must be a list of different values and not empty")
        for name in ("up_to", "n_decode", "repeats", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is not positive")
        for n in self.n_tokens or ():
            if n < 2:
                raise ConfigError(f"n_tokens={n} is too small; use 2 or more")
        for ratio in self.ratios:
            if not 0 <= ratio < 1:
                raise ConfigError(f"compression_ratio={ratio}: the fraction removed must be in [0, 1)")
        for type_kv in self.kv_types:
            if type_kv not in KV_TYPES:
                raise ConfigError(f"kv_types={type_kv!r} is not one of {', '.join(KV_TYPES)}")

    @property
    def variants(self) -> list[Variant]:
        """Returns the variants to compare, the baseline first."""
        first, *others = self.kv_types
        middle = sorted(self.ratios)[len(self.ratios) // 2]
        return [
            *(Variant(type_kv) for type_kv in self.kv_types),
            *(Variant(first, ratio) for ratio in self.ratios),
            *(Variant(type_kv, middle) for type_kv in others),
        ]

    def sizes(self, n_ctx_train: int) -> list[int]:
        """Returns the context sizes for a model trained for ``n_ctx_train`` positions, ascending.

        Raises:
            ContextLengthError: one of ``n_tokens`` is too large, or the decode alone does not fit.
        """
        limit = n_ctx_train - self.n_decode
        too_large = [n for n in self.n_tokens or () if n > limit]
        if too_large or limit < 2:
            raise ContextLengthError(
                f"n_tokens={max(too_large, default=2)} is too large: of the model's {n_ctx_train} positions, "
                f"n_decode={self.n_decode} leaves {max(limit, 0)}"
            )
        if self.n_tokens is not None:
            return sorted(self.n_tokens)
        top = min(max(n_ctx_train - max(N_ROOM, self.n_decode), 2), self.up_to or n_ctx_train)
        powers = [N_FIRST << i for i in range(n_ctx_train.bit_length())]
        return [*(n for n in powers if n < top), top]
