"""Runs llama.cpp's samplers for one generation, in llama-server's order (common/sampling.cpp)."""

from __future__ import annotations

import ctypes
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...errors import ConfigError, StateError
from ...kernels.types import FloatArray
from ...native import library

if TYPE_CHECKING:
    from ...llama import Llama

llama_cpp = library.load()

#: the seed that means: choose one at random
RANDOM_SEED = 0xFFFFFFFF

#: names of the samplers in requests, with their letters on the command line
SAMPLERS = {
    "penalties": "e", "dry": "d", "top_n_sigma": "s", "top_k": "k", "typ_p": "y", "top_p": "p", "min_p": "m",
    "xtc": "x", "temperature": "t", "infill": "i", "adaptive_p": "a",
}  # fmt: skip
DEFAULT_SAMPLERS = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")

#: mirostat's parameter m (common/sampling.cpp)
MIROSTAT_M = 100

TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of the samplers, with llama-server's names and defaults (common_params_sampling in common/common.h).

    Attributes:
        samplers: names of the samplers, in the order to apply them. Ignored if ``mirostat`` is 1 or 2.
        logit_bias: pairs of a token and the number to add to its logit. Minus infinity forbids the token.
        grammar: a GBNF grammar that the text has to follow. Empty: none.
    Raises:
        ConfigError: an option is out of range.
    """

    seed: int = RANDOM_SEED
    temperature: float = 0.8
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    typical_p: float = 1.0
    repeat_last_n: int = 64
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
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
    grammar: str = ""

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
        n_ctx = llama.n_ctx()
        sampling = replace(
            sampling, repeat_last_n=min(sampling.repeat_last_n, n_ctx),
            dry_penalty_last_n=min(sampling.dry_penalty_last_n, n_ctx),
        )  # fmt: skip
        self._n_remembered = max(sampling.repeat_last_n, sampling.dry_penalty_last_n)
        self._vocab = llama._model.vocab
        self._cells = np.empty(llama.n_vocab(), dtype=TOKEN_DATA)
        self._grammar = self._make_grammar(sampling.grammar)
        self._chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        for sampler in self._make(sampling):
            llama_cpp.llama_sampler_chain_add(self._chain, sampler)

    def close(self) -> None:
        """Free the samplers."""
        for name in ("_grammar", "_chain"):
            if getattr(self, name) is not None:
                llama_cpp.llama_sampler_free(getattr(self, name))
                setattr(self, name, None)

    def accept(self, tokens: Sequence[int]) -> None:
        """Tell the samplers the last tokens of the prompt, as many as the penalties use."""
        for token in tokens[max(0, len(tokens) - self._n_remembered) :]:
            llama_cpp.llama_sampler_accept(self._chain, token)

    def sample(self) -> Chosen:
        """Returns the next token, sampled from the logits of the latest decode.

        Raises:
            StateError: the samplers or the grammar leave no token.
        """
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._llama.ctx, -1), (self._llama.n_vocab(),))
        candidates = self._candidates(logits)
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(candidates))
        token = _selected(candidates)
        if self._grammar is not None and (token is None or not self._allows(token)):
            # rejected: sample again from the tokens that the grammar allows
            candidates = self._candidates(logits)
            llama_cpp.llama_sampler_apply(self._grammar, ctypes.byref(candidates))
            if not np.isfinite(_cells(candidates)["logit"]).any():
                raise StateError("the grammar allows no token that the model has")
            llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(candidates))
            token = _selected(candidates)
            if token is None or not self._allows(token):
                raise StateError("the samplers leave no token that the grammar allows")
        if token is None:
            raise StateError("the samplers leave no token")
        chosen = self._with_probabilities(token, logits, candidates)
        if self._grammar is not None:
            llama_cpp.llama_sampler_accept(self._grammar, token)
        llama_cpp.llama_sampler_accept(self._chain, token)
        return chosen

    def _with_probabilities(self, token: int, logits: FloatArray, candidates: Any) -> Chosen:
        if self._n_best <= 0:
            return Chosen(token)
        if self._after_sampling:
            cells = _cells(candidates)
            ids, probabilities = cells["id"], cells["p"]
        else:
            ids, probabilities = np.arange(len(logits)), softmax(logits)
        order = np.argsort(-probabilities, kind="stable")[: self._n_best]
        of_token = probabilities[ids == token]
        best = tuple((int(ids[i]), float(probabilities[i])) for i in order)
        return Chosen(token, float(of_token[0]) if len(of_token) else 0.0, best)

    def _candidates(self, logits: FloatArray) -> Any:
        self._cells["id"] = np.arange(len(self._cells))
        self._cells["logit"] = logits
        self._cells["p"] = 0
        data = self._cells.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
        return llama_cpp.llama_token_data_array(data=data, size=len(self._cells), selected=-1, sorted=False)

    def _allows(self, token: int) -> bool:
        """Returns whether the grammar allows a token. llama.cpp ends the process on accept() of a forbidden one."""
        one = llama_cpp.llama_token_data(token, 1.0, 0.0)
        candidates = llama_cpp.llama_token_data_array(data=ctypes.pointer(one), size=1, selected=-1, sorted=False)
        llama_cpp.llama_sampler_apply(self._grammar, ctypes.byref(candidates))
        return bool(np.isfinite(candidates.data[0].logit))

    def _make_grammar(self, grammar: str) -> Any:
        if not grammar:
            return None
        if "\0" in grammar:
            raise ConfigError("failed to parse grammar: it contains a zero byte")
        sampler = llama_cpp.llama_sampler_init_grammar(self._vocab, grammar.encode("utf-8", "replace"), b"root")
        if not sampler:
            raise ConfigError("failed to parse grammar")
        return sampler

    def _make(self, s: Sampling) -> list[Any]:
        samplers = []
        biases = [(token, bias) for token, bias in s.logit_bias if 0 <= token < len(self._cells)]
        if biases:
            array = (llama_cpp.llama_logit_bias * len(biases))(*biases)
            samplers.append(llama_cpp.llama_sampler_init_logit_bias(len(self._cells), len(biases), array))
        if s.mirostat:
            samplers.append(llama_cpp.llama_sampler_init_temp(s.temperature))
            rest = (self.seed, s.mirostat_tau, s.mirostat_eta)
            samplers.append(
                llama_cpp.llama_sampler_init_mirostat(len(self._cells), *rest, MIROSTAT_M)
                if s.mirostat == 1
                else llama_cpp.llama_sampler_init_mirostat_v2(*rest)
            )
            return samplers
        names = list(s.samplers)
        if "infill" in names and "top_k" not in names[: names.index("infill")]:
            names.insert(0, "top_k")  # the infill sampler compares every pair of tokens
        samplers += [self._make_one(name, s) for name in names if name != "adaptive_p"]
        if "adaptive_p" in s.samplers:
            last = llama_cpp.llama_sampler_init_adaptive_p(s.adaptive_target, s.adaptive_decay, self.seed)
        else:
            last = llama_cpp.llama_sampler_init_dist(self.seed)
        return [*samplers, last]

    def _make_one(self, name: str, s: Sampling) -> Any:
        n_vocab, keep = len(self._cells), s.min_keep
        if name == "dry":
            breakers = [text.encode() for text in s.dry_sequence_breakers]
            return llama_cpp.llama_sampler_init_dry(
                self._vocab, s.dry_multiplier, s.dry_base, s.dry_allowed_length, s.dry_penalty_last_n,
                (ctypes.c_char_p * len(breakers))(*breakers), len(breakers),
            )  # fmt: skip
        make = {
            "penalties": lambda: llama_cpp.llama_sampler_init_penalties(
                n_vocab, s.repeat_last_n, s.repeat_penalty, s.frequency_penalty, s.presence_penalty
            ),
            "top_n_sigma": lambda: llama_cpp.llama_sampler_init_top_n_sigma(s.top_n_sigma),
            "top_k": lambda: llama_cpp.llama_sampler_init_top_k(s.top_k),
            "typ_p": lambda: llama_cpp.llama_sampler_init_typical(s.typical_p, keep),
            "top_p": lambda: llama_cpp.llama_sampler_init_top_p(s.top_p, keep),
            "min_p": lambda: llama_cpp.llama_sampler_init_min_p(s.min_p, keep),
            "xtc": lambda: llama_cpp.llama_sampler_init_xtc(s.xtc_probability, s.xtc_threshold, keep, self.seed),
            "temperature": lambda: llama_cpp.llama_sampler_init_temp_ext(
                s.temperature, s.dynatemp_range, s.dynatemp_exponent
            ),
            "infill": lambda: llama_cpp.llama_sampler_init_infill(self._vocab),
        }  # fmt: skip
        return make[name]()


def softmax(logits: npt.NDArray[np.float32]) -> FloatArray:
    """Returns the probabilities of logits ``(n_vocab,)``."""
    shifted = np.exp(logits - logits.max())
    probabilities: FloatArray = shifted / shifted.sum()
    return probabilities


def _cells(candidates: Any) -> npt.NDArray[Any]:
    """Returns the candidates that the samplers left, at the address where they put them."""
    address = ctypes.addressof(candidates.data.contents)
    buffer = (ctypes.c_uint8 * (candidates.size * TOKEN_DATA.itemsize)).from_address(address)
    return np.frombuffer(buffer, dtype=TOKEN_DATA)


def _selected(candidates: Any) -> int | None:
    if not 0 <= candidates.selected < candidates.size:
        return None
    return int(candidates.data[candidates.selected].id)
