"""Runs llama.cpp's samplers for one generation, in llama-server's order (common/sampling.cpp)."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...errors import ConfigError, StateError
from ...kernels.types import FloatArray
from ...native.sampler import Candidates, SamplerChain, Step, last_logits
from ...support.arguments import option
from .constraint import Constraint, Guide, Thinking

if TYPE_CHECKING:
    from ...llama import Llama

#: the seed that means: choose one at random
RANDOM_SEED = 0xFFFFFFFF

#: a group of --help
SAMPLING = "Sampling defaults, for requests without them"

#: names of the samplers in requests, with their letters on the command line
SAMPLERS = {
    "penalties": "e", "dry": "d", "top_n_sigma": "s", "top_k": "k", "typ_p": "y", "top_p": "p", "min_p": "m",
    "xtc": "x", "temperature": "t", "infill": "i", "adaptive_p": "a",
}  # fmt: skip
DEFAULT_SAMPLERS = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of the samplers, with llama-server's names and defaults (common_params_sampling in common/common.h).

    Attributes:
        samplers: names of the samplers, in the order to apply them. Ignored if ``mirostat`` is 1 or 2.
        logit_bias: pairs of a token and the number to add to its logit. Minus infinity forbids the token.
        constraint: a grammar that the text has to follow. None: it is free.
        thinking: how the model thinks. None: it does not, or nobody needs to know.
    Raises:
        ConfigError: an option is out of range.
    """

    # fmt: off
    seed: int = option(
        RANDOM_SEED, "--seed", "-s", panel=SAMPLING, min=-1, option_default=-1,
        read=lambda seed: RANDOM_SEED if seed == -1 else seed,
        help="Seed of the sampler. -1 takes another seed each time.",
    )
    temperature: float = option(
        0.8, "--temp", panel=SAMPLING, min=0, help="Sampling temperature. 0 always takes the most probable token."
    )
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    top_k: int = option(
        40, "--top-k", panel=SAMPLING, min=0, help="Sample from this many most probable tokens. 0 takes all."
    )
    top_p: float = option(
        0.95, "--top-p", panel=SAMPLING, min=0, max=1,
        help="Sample from the most probable tokens that reach this total. 1 takes all.",
    )
    min_p: float = option(
        0.05, "--min-p", panel=SAMPLING, min=0, max=1,
        help="Drop tokens below this fraction of the largest probability. 0 drops none.",
    )
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    typical_p: float = 1.0
    repeat_penalty: float = option(
        1.0, "--repeat-penalty", panel=SAMPLING, help="Divide the logits of repeated tokens by this. 1 turns it off."
    )
    repeat_last_n: int = option(
        64, "--repeat-last-n", panel=SAMPLING, min=0, help="Number of latest tokens that the penalties look at."
    )
    presence_penalty: float = option(
        0.0, "--presence-penalty", panel=SAMPLING,
        help="Subtract this from the logits of tokens that occurred. 0 turns it off.",
    )
    frequency_penalty: float = option(
        0.0, "--frequency-penalty", panel=SAMPLING,
        help="Subtract this from a token's logit each time that it occurred. 0 turns it off.",
    )
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    adaptive_target: float = -1.0
    adaptive_decay: float = 0.9
    min_keep: int = 0
    samplers: tuple[str, ...] = DEFAULT_SAMPLERS
    logit_bias: tuple[tuple[int, float], ...] = ()
    constraint: Constraint | None = None
    thinking: Thinking | None = None
    # fmt: on

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name}={value} is not finite")
        if self.repeat_penalty <= 0:
            raise ConfigError(f"repeat_penalty={self.repeat_penalty} is not positive")
        if self.mirostat not in (0, 1, 2):
            raise ConfigError(f"mirostat={self.mirostat} is not 0, 1 or 2")
        if unknown := [name for name in self.samplers if name not in SAMPLERS]:
            raise ConfigError(f"samplers={unknown} are unknown: use {', '.join(SAMPLERS)}")
        for name in ("repeat_last_n", "dry_penalty_last_n"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} is negative")


@dataclass(frozen=True)
class Chosen:
    """A sampled token.

    Attributes:
        token: the token's number.
        probability: the token's probability, NaN if probabilities were not requested.
        best: the most probable tokens with their probabilities, in falling order.
    """

    token: int
    probability: float = math.nan
    best: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The samplers of one generation, with their memory of its tokens.

    Args:
        llama: the ``Llama`` that has the logits.
        sampling: the options.
        n_best: number of most probable tokens to return with every token.
        after_sampling: return probabilities after the samplers, not the model's own.
    Raises:
        ConfigError: the grammar cannot be parsed.
    """

    def __init__(self, llama: Llama, sampling: Sampling, n_best: int = 0, after_sampling: bool = False) -> None:
        self._llama, self._n_best, self._after_sampling = llama, n_best, after_sampling
        #: the seed in use, also if a random one was requested
        self.seed = secrets.randbits(32) if sampling.seed == RANDOM_SEED else sampling.seed
        # llama.cpp allocates memory for these, and a context has at most n_ctx tokens
        n_ctx, n_vocab = llama.n_ctx(), llama.n_vocab()
        sampling = replace(
            sampling, seed=self.seed, repeat_last_n=min(sampling.repeat_last_n, n_ctx),
            dry_penalty_last_n=min(sampling.dry_penalty_last_n, n_ctx),
        )  # fmt: skip
        self._n_remembered = max(sampling.repeat_last_n, sampling.dry_penalty_last_n)
        self._candidates = Candidates(n_vocab)
        self._guide = Guide(llama.model, sampling.constraint, sampling.thinking)
        self._chain = SamplerChain(llama.model, n_vocab, steps(sampling, n_vocab))

    def close(self) -> None:
        """Free the samplers."""
        self._guide.close()
        self._chain.close()

    def accept(self, tokens: Sequence[int]) -> None:
        """Tell the samplers the last tokens of the prompt, as many as the penalties use."""
        for token in tokens[max(0, len(tokens) - self._n_remembered) :]:
            self._chain.accept(token)

    def sample(self) -> Chosen:
        """Returns the next token, sampled from the logits of the latest decode.

        Raises:
            StateError: the samplers or the grammar leave no token.
        """
        logits = last_logits(self._llama.ctx, self._llama.n_vocab())
        self._candidates.fill(logits)
        forced = self._guide.forced
        token = self._choose(logits) if forced is None else forced
        chosen = self._with_probabilities(token, logits)
        self._guide.accept(token)
        self._chain.accept(token)
        return chosen

    def _choose(self, logits: FloatArray) -> int:
        candidates = self._candidates
        self._chain.apply(candidates)
        token = candidates.selected
        if token is not None and self._guide.allows(token):
            return token
        if token is None and self._guide.is_free:
            raise StateError("the samplers leave no token")
        # rejected: sample again from the tokens that the grammar allows
        candidates.fill(logits)
        self._guide.apply(candidates)
        if not np.isfinite(candidates.left["logit"]).any():
            raise StateError("the grammar allows no token that the model has")
        self._chain.apply(candidates)
        token = candidates.selected
        if token is None or not self._guide.allows(token):
            raise StateError("the samplers leave no token that the grammar allows")
        return token

    def _with_probabilities(self, token: int, logits: FloatArray) -> Chosen:
        if self._n_best <= 0:
            return Chosen(token)
        if self._after_sampling:
            left = self._candidates.left
            ids, probabilities = left["id"], left["p"]
        else:
            ids, probabilities = np.arange(len(logits)), softmax(logits)
        order = np.argsort(-probabilities, kind="stable")[: self._n_best]
        of_token = probabilities[ids == token]
        best = tuple((int(ids[i]), float(probabilities[i])) for i in order)
        return Chosen(token, float(of_token[0]) if len(of_token) else 0.0, best)


def steps(s: Sampling, n_vocab: int) -> list[Step]:
    """Returns the samplers of a chain in their order, each a name and its parameters. The last one selects a token."""
    found: list[Step] = []
    biases = [(token, bias) for token, bias in s.logit_bias if 0 <= token < n_vocab]
    if biases:
        found.append(("logit_bias", biases))
    if s.mirostat:
        rest = (s.seed, s.mirostat_tau, s.mirostat_eta)
        return [*found, ("temp", s.temperature), ("mirostat" if s.mirostat == 1 else "mirostat_v2", *rest)]
    names = list(s.samplers)
    if "infill" in names and "top_k" not in names[: names.index("infill")]:
        names.insert(0, "top_k")  # the infill sampler compares every pair of tokens
    found += [_step(name, s) for name in names if name != "adaptive_p"]
    if "adaptive_p" in s.samplers:
        return [*found, ("adaptive_p", s.adaptive_target, s.adaptive_decay, s.seed)]
    return [*found, ("dist", s.seed)]


def _step(name: str, s: Sampling) -> Step:
    found: dict[str, Step] = {
        "penalties": ("penalties", s.repeat_last_n, s.repeat_penalty, s.frequency_penalty, s.presence_penalty),
        "dry": (
            "dry", s.dry_multiplier, s.dry_base, s.dry_allowed_length, s.dry_penalty_last_n, s.dry_sequence_breakers
        ),
        "top_n_sigma": ("top_n_sigma", s.top_n_sigma),
        "top_k": ("top_k", s.top_k),
        "typ_p": ("typical", s.typical_p, s.min_keep),
        "top_p": ("top_p", s.top_p, s.min_keep),
        "min_p": ("min_p", s.min_p, s.min_keep),
        "xtc": ("xtc", s.xtc_probability, s.xtc_threshold, s.min_keep, s.seed),
        "temperature": ("temp_ext", s.temperature, s.dynatemp_range, s.dynatemp_exponent),
        "infill": ("infill",),
    }  # fmt: skip
    return found[name]


def softmax(logits: npt.NDArray[np.float32]) -> FloatArray:
    """Returns the probabilities of logits ``(n_vocab,)``."""
    shifted = np.exp(logits - logits.max())
    probabilities: FloatArray = shifted / shifted.sum()
    return probabilities
