"""Scores answers and summarises curves over compression ratios. Pure functions."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

CHUNK = 1 << 22  # logits processed at a time: 32 MiB of float64 in each of the few arrays
N_RESAMPLES = 2000  # bootstrap draws


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Share of references that the answer contains, ignoring case (RULER, scripts/eval/synthetic/constants.py)."""
    return sum(_matches(answer, references)) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """Returns 1.0 if the answer contains any of the references, else 0.0 (RULER's metric for qa)."""
    return float(any(_matches(answer, references)))


def exact_match(answer: str, references: Sequence[str], *, any_of: bool = False) -> float:
    """Returns 1.0 if the answer consists of the references and nothing else, else 0.0.

    Unlike containment, this does not reward an answer that lists everything. Every reference must occur once, in any
    order. Only white space, punctuation, bullets, numbers like ``1.`` or ``2)`` and the word "and" may surround them.
    Case is ignored, and so is punctuation around a reference, but not inside it.
    ``any_of``: the references are alternatives, as in ``string_match_part``; the answer must be one of them.
    """
    if any_of:
        return max((exact_match(answer, [reference]) for reference in _checked(references)), default=0.0)
    rest = f" {_normalised(answer)} "
    wanted = {_normalised(reference) for reference in _checked(references)}
    wanted = {reference.strip(" .,;:!?\"'()[]") or reference for reference in wanted}
    for reference in sorted(wanted, key=len, reverse=True):  # longest first, because one may contain another
        rest, n_found = re.subn(rf"(?<!\w){re.escape(reference)}(?!\w)", "\0", rest)
        if n_found != 1:
            return 0.0
    return float(re.fullmatch(r"(?:[\s\0.,;:!?\"'()\[\]*•&-]|\band\b|\b\d{1,3}[.)])*", rest) is not None)


def look_alike(answer: str, references: Sequence[str], *, any_of: bool = False) -> float:
    """Share of references that the answer lacks while it has another word of the same form.

    Such an answer looks right and is wrong: another number of as many digits, another UUID. Only references with digits
    have a form; letters and digits count as the same, because both are digits of a UUID.
    ``any_of``: the references are alternatives; 0 if the answer has one of them.
    """
    if any_of and any(_matches(answer, references)):
        return 0.0
    right = {reference.lower() for reference in _checked(references)}
    forms = {_form(word) for word in re.findall(r"[\w-]+", answer.lower()) if _form(word) and word not in right}
    pairs = zip(_matches(answer, references), references, strict=True)
    return sum(not found and _form(reference) in forms for found, reference in pairs) / len(references)


def _form(text: str) -> str:
    return re.sub(r"[^\W_]", "x", text) if any(map(str.isdigit, text)) else ""


def _matches(answer: str, references: Sequence[str]) -> list[bool]:
    text = re.sub(r"[\x00-\x1f]", "\n", answer.strip()).lower()
    return [reference.lower() in text for reference in _checked(references)]


def _normalised(text: str) -> str:
    return " ".join(re.sub(r"[\x00-\x1f]", " ", text).lower().split())


def _checked(references: Sequence[str]) -> Sequence[str]:
    if isinstance(references, str) or not references:
        raise ConfigError(f"references={references!r}; allowed: a sequence of at least one string")
    return references


#: the metric functions by the name stored in a sample
METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
}


def bootstrap_interval(
    values: Sequence[float] | NDArray[np.float64], strata: Sequence[str] = ()
) -> tuple[float, float]:
    """Returns (low, high), the 95 % bootstrap interval of the mean, from 2,000 draws with replacement.

    Args:
        strata: the stratum of each value. Draws stay within a stratum, and the mean is the mean of the strata's means.
            Empty: all values form one stratum.

    Raises:
        ConfigError: there are no values, or ``strata`` has another length.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size or len(strata) not in (0, array.size):
        raise ConfigError(
            f"values of shape {array.shape}, {len(strata)} strata; allowed: one dimension with at least one value,"
            " and none or as many strata"
        )
    low, high = np.quantile(_weights(tuple(strata) or ("",) * array.size) @ array, [0.025, 0.975])
    return float(low), float(high)


@functools.lru_cache(maxsize=4)
def _weights(strata: tuple[str, ...]) -> NDArray[np.float64]:
    """Returns the weight of every value in every draw, ``(N_RESAMPLES, n_values)``; each row sums to 1."""
    names, codes = np.unique(strata, return_inverse=True)
    weights = np.zeros((N_RESAMPLES, len(codes)))
    rng = np.random.default_rng(0)
    for code in range(len(names)):
        members = np.flatnonzero(codes == code)
        draws = members[rng.integers(0, members.size, (N_RESAMPLES, members.size))]
        np.add.at(weights, (np.arange(N_RESAMPLES)[:, None], draws), 1 / (members.size * len(names)))
    return weights


def area_under_curve(ratios: Sequence[float], scores: Sequence[float]) -> float:
    """Returns the mean score between ratio 0 and the largest measured ratio, by the trapezoidal rule.

    Raises:
        ConfigError: as :func:`largest_ratio_within`, or there is only one ratio.
    """
    x, y = _curve(ratios, scores)
    if x.size < 2:
        raise ConfigError(f"ratios={list(ratios)}; allowed: at least two")
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum() / x[-1])


def largest_ratio_within(ratios: Sequence[float], scores: Sequence[float], loss: float) -> float:
    """Returns the ratio at which the score first falls below ``1 - loss`` times the score at ratio 0.

    Interpolates linearly between measured ratios. Returns the largest measured ratio if the score never falls that low,
    and nan if the score at ratio 0 is not positive.

    Raises:
        ConfigError: lengths differ, ratio 0 is missing, a ratio is repeated or outside [0, 1], or ``loss`` is outside
            [0, 1].
    """
    x, y = _curve(ratios, scores)
    if not 0 <= loss <= 1:
        raise ConfigError(f"loss={loss}; allowed: 0 to 1")
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
        raise ConfigError(f"ratios of shape {x.shape}, scores of {y.shape}; allowed: one dimension, the same length")
    order = np.argsort(x)
    x, y = x[order], y[order]
    if x[0] != 0 or x[-1] > 1 or not (np.diff(x) > 0).all():
        raise ConfigError(f"ratios={list(ratios)}; allowed: 0 and others up to 1, each once")
    return x, y


def kl_divergence(logits_p: NDArray[np.float32], logits_q: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns KL(P||Q) in nats at every position; P is the reference, e.g. the uncompressed run.

    Args:
        logits_p, logits_q: (n, n_vocab); -inf means a probability of 0.

    Returns:
        float64 (n,), in [0, inf].

    Raises:
        ConfigError: the shapes differ, or the arrays do not have two dimensions.
    """
    n_rows = max(1, CHUNK // _same_shape(logits_p, logits_q)[1])
    divergence = np.empty(len(logits_p))
    for start in range(0, len(logits_p), n_rows):
        rows = slice(start, start + n_rows)
        log_p, log_q = _log_softmax(logits_p[rows]), _log_softmax(logits_q[rows])
        p = np.exp(log_p)
        with np.errstate(invalid="ignore"):  # -inf - -inf occurs where p is 0; such terms count as 0
            divergence[rows] = np.where(p > 0, p * (log_p - log_q), 0).sum(1)
    return np.maximum(divergence, 0)  # rounding can give -1e-17


def same_top(logits_p: NDArray[np.float32], logits_q: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Returns whether both choose the same token at each position of (n, n_vocab) logits; ties go to the first."""
    _same_shape(logits_p, logits_q)
    return np.asarray(logits_p.argmax(1) == logits_q.argmax(1))


def _same_shape(logits_p: NDArray[np.float32], logits_q: NDArray[np.float32]) -> tuple[int, int]:
    if logits_p.shape != logits_q.shape or logits_p.ndim != 2 or not logits_p.shape[1]:
        raise ConfigError(f"logits of shapes {logits_p.shape} and {logits_q.shape}; allowed: (n, n_vocab) for both")
    return logits_p.shape[0], logits_p.shape[1]


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    return shifted
