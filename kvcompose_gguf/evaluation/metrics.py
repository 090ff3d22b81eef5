"""How answers are scored, and what a curve over compression ratios says. Pure functions."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

CHUNK = 1 << 22  # logits that are worked on at a time: 32 MiB of float64 for each of the few arrays
N_RESAMPLES = 2000  # of the bootstrap


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the answer, in any case (RULER, scripts/eval/synthetic/constants.py)."""
    return sum(_matches(answer, references)) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """1.0 if any of the references occurs in the answer, else 0.0 (RULER's, for qa)."""
    return float(any(_matches(answer, references)))


def exact_match(answer: str, references: Sequence[str], *, any_of: bool = False) -> float:
    """1.0 if the answer is the references and nothing else, else 0.0; containment rewards saying everything.

    Every reference once, in any order; between and around them only white space, punctuation, bullets, numbers like
    ``1.`` or ``2)``, and the word "and". Case does not count, nor does punctuation around a reference; inside it does.
    ``any_of``: the references are alternatives, as those of ``string_match_part`` are, and the answer is one of them.
    """
    if any_of:
        return max((exact_match(answer, [reference]) for reference in _checked(references)), default=0.0)
    rest = f" {_normalised(answer)} "
    wanted = {_normalised(reference) for reference in _checked(references)}
    wanted = {reference.strip(" .,;:!?\"'()[]") or reference for reference in wanted}
    for reference in sorted(wanted, key=len, reverse=True):  # the longest first: one may be part of another
        rest, n_found = re.subn(rf"(?<!\w){re.escape(reference)}(?!\w)", "\0", rest)
        if n_found != 1:
            return 0.0
    return float(re.fullmatch(r"(?:[\s\0.,;:!?\"'()\[\]*•&-]|\band\b|\b\d{1,3}[.)])*", rest) is not None)


def _matches(answer: str, references: Sequence[str]) -> list[bool]:
    text = re.sub(r"[\x00-\x1f]", "\n", answer.strip()).lower()
    return [reference.lower() in text for reference in _checked(references)]


def _normalised(text: str) -> str:
    return " ".join(re.sub(r"[\x00-\x1f]", " ", text).lower().split())


def _checked(references: Sequence[str]) -> Sequence[str]:
    if isinstance(references, str) or not references:
        raise ConfigError(f"references={references!r}, allowed is a sequence of at least one string")
    return references


#: by the name that a sample has
METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
}


def bootstrap_interval(
    values: Sequence[float] | NDArray[np.float64], strata: Sequence[str] = ()
) -> tuple[float, float]:
    """(low, high), the 95 % interval of the mean: quantiles of those of 2,000 draws with replacement.

    Args:
        strata: of each value; draws are within them, the mean is that of their means. Empty: all are of one.

    Raises:
        ConfigError: no values, or not as many strata.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size or len(strata) not in (0, array.size):
        raise ConfigError(
            f"values of shape {array.shape}, {len(strata)} strata, allowed is one dimension with at least one value,"
            " and none or as many strata"
        )
    low, high = np.quantile(_weights(tuple(strata) or ("",) * array.size) @ array, [0.025, 0.975])
    return float(low), float(high)


@functools.lru_cache(maxsize=4)
def _weights(strata: tuple[str, ...]) -> NDArray[np.float64]:
    """Of the values in every draw, ``(N_RESAMPLES, n_values)``; rows sum to 1."""
    names, codes = np.unique(strata, return_inverse=True)
    weights = np.zeros((N_RESAMPLES, len(codes)))
    rng = np.random.default_rng(0)
    for code in range(len(names)):
        members = np.flatnonzero(codes == code)
        draws = members[rng.integers(0, members.size, (N_RESAMPLES, members.size))]
        np.add.at(weights, (np.arange(N_RESAMPLES)[:, None], draws), 1 / (members.size * len(names)))
    return weights


def area_under_curve(ratios: Sequence[float], scores: Sequence[float]) -> float:
    """Mean score over compression ratios from 0 to the largest measured one, straight lines between (trapezoids).

    Raises:
        ConfigError: see :func:`largest_ratio_within`; or only one ratio.
    """
    x, y = _curve(ratios, scores)
    if x.size < 2:
        raise ConfigError(f"ratios={list(ratios)}, allowed are at least two")
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum() / x[-1])


def largest_ratio_within(ratios: Sequence[float], scores: Sequence[float], loss: float) -> float:
    """The ratio at which the score first falls below ``1 - loss`` of that at ratio 0, on straight lines between points.

    The largest measured ratio if it never does; nan if the score at ratio 0 is not positive, as nothing can be lost.

    Raises:
        ConfigError: lengths differ, no ratio 0, a ratio twice or outside [0, 1], or a loss outside [0, 1].
    """
    x, y = _curve(ratios, scores)
    if not 0 <= loss <= 1:
        raise ConfigError(f"loss={loss}, allowed are 0 to 1")
    if y[0] <= 0:
        return float("nan")
    least = y[0] * (1 - loss)
    below = np.flatnonzero(y < least)
    if not below.size:
        return float(x[-1])
    i = below[0]
    return float(x[i - 1] + (x[i] - x[i - 1]) * (y[i - 1] - least) / (y[i - 1] - y[i]))


def _curve(ratios: Sequence[float], scores: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(ratios, np.float64), np.asarray(scores, np.float64)
    if x.ndim != 1 or x.shape != y.shape or not x.size:
        raise ConfigError(f"ratios of shape {x.shape}, scores of {y.shape}, allowed is one dimension, the same length")
    order = np.argsort(x)
    x, y = x[order], y[order]
    if x[0] != 0 or x[-1] > 1 or not (np.diff(x) > 0).all():
        raise ConfigError(f"ratios={list(ratios)}, allowed are 0 and others up to 1, each once")
    return x, y


def kl_divergence(logits_p: NDArray[np.float32], logits_q: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(P||Q) in nats at every position; P is the reference, e.g. the uncompressed run.

    Args:
        logits_p, logits_q: (n, n_vocab); -inf is a probability of 0.

    Returns:
        float64 (n,), in [0, inf].

    Raises:
        ConfigError: two shapes, or not two dimensions.
    """
    n_rows = max(1, CHUNK // _same_shape(logits_p, logits_q)[1])
    divergence = np.empty(len(logits_p))
    for start in range(0, len(logits_p), n_rows):
        rows = slice(start, start + n_rows)
        log_p, log_q = _log_softmax(logits_p[rows]), _log_softmax(logits_q[rows])
        p = np.exp(log_p)
        with np.errstate(invalid="ignore"):  # -inf - -inf where p is 0, which counts as 0
            divergence[rows] = np.where(p > 0, p * (log_p - log_q), 0).sum(1)
    return np.maximum(divergence, 0)  # rounding can make it -1e-17


def same_top(logits_p: NDArray[np.float32], logits_q: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether both would choose the same token, at every position of (n, n_vocab) logits; of equal logits the first."""
    _same_shape(logits_p, logits_q)
    return np.asarray(logits_p.argmax(1) == logits_q.argmax(1))


def _same_shape(logits_p: NDArray[np.float32], logits_q: NDArray[np.float32]) -> tuple[int, int]:
    if logits_p.shape != logits_q.shape or logits_p.ndim != 2 or not logits_p.shape[1]:
        raise ConfigError(f"logits of shapes {logits_p.shape} and {logits_q.shape}, allowed is (n, n_vocab) for both")
    return logits_p.shape[0], logits_p.shape[1]


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    return shifted
