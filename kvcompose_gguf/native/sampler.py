"""llama.cpp's samplers: logits, numbers and names go in, the tokens that are left come out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..kernels.types import FloatArray
from . import chat_library, library

TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])

#: mirostat's parameter m (common/sampling.cpp)
MIROSTAT_M = 100

#: the name of a sampler and its parameters, as ``_make`` takes them
Step = tuple[Any, ...]


def last_logits(ctx: Any, n_vocab: int) -> FloatArray:
    """Returns the logits of the last token that a ``llama_context`` decoded, ``(n_vocab,)``: a view of its memory."""
    logits: FloatArray = np.ctypeslib.as_array(library.load().llama_get_logits_ith(ctx, -1), (n_vocab,))
    return logits


class Candidates:
    """The tokens that samplers choose from (llama_token_data_array). Use ``fill`` before every choice."""

    def __init__(self, n_vocab: int) -> None:
        self._memory = np.empty(n_vocab, dtype=TOKEN_DATA)
        self.array: Any = None

    def fill(self, logits: FloatArray) -> None:
        """Start with all tokens, with these logits ``(n_vocab,)``."""
        llama_cpp = library.load()
        self._memory["id"] = np.arange(len(self._memory))
        self._memory["logit"] = logits
        self._memory["p"] = 0
        data = self._memory.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
        self.array = llama_cpp.llama_token_data_array(data=data, size=len(self._memory), selected=-1, sorted=False)

    @property
    def left(self) -> npt.NDArray[Any]:
        """The tokens that are left, ``TOKEN_DATA`` ``(n_left,)``: a view of the memory where the samplers put them."""
        address = ctypes.addressof(self.array.data.contents)
        buffer = (ctypes.c_uint8 * (self.array.size * TOKEN_DATA.itemsize)).from_address(address)
        return np.frombuffer(buffer, dtype=TOKEN_DATA)

    @property
    def selected(self) -> int | None:
        """The token that the samplers chose. None: they chose none."""
        if not 0 <= self.array.selected < self.array.size:
            return None
        return int(self.array.data[self.array.selected].id)


class SamplerChain:
    """Samplers that work one after the other, with their memory of the tokens (llama_sampler_chain).

    Args:
        model: the ``llama_model``.
        n_vocab: number of its tokens.
        steps: the samplers, each a name and its parameters.
    """

    def __init__(self, model: Any, n_vocab: int, steps: Sequence[Step]) -> None:
        llama_cpp = library.load()
        vocab = llama_cpp.llama_model_get_vocab(model)
        self._chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        for name, *parameters in steps:
            llama_cpp.llama_sampler_chain_add(self._chain, _make(vocab, n_vocab, name, parameters))

    def apply(self, candidates: Candidates) -> None:
        """Let all samplers change ``candidates``; the last one selects a token."""
        library.load().llama_sampler_apply(self._chain, ctypes.byref(candidates.array))

    def accept(self, token: int) -> None:
        """Tell the samplers that ``token`` is the next one."""
        library.load().llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        """Free the samplers."""
        if self._chain is not None:
            library.load().llama_sampler_free(self._chain)
            self._chain = None


class Grammar:
    """A grammar that the tokens have to follow.

    Args:
        model: the ``llama_model``.
        text: GBNF, whose start is the rule ``root``.
        patterns, tokens: regular expressions and tokens that let the grammar begin where they are found; both empty: it
            holds from the first token on.
    Raises:
        ConfigError: llama.cpp cannot parse the text.
    """

    def __init__(self, model: Any, text: str, patterns: Sequence[str] = (), tokens: Sequence[int] = ()) -> None:
        self._sampler: Any = None
        if any("\0" in each for each in (text, *patterns)):
            raise ConfigError("failed to parse grammar: it contains a zero byte")
        llama_cpp = library.load()
        vocab, grammar = llama_cpp.llama_model_get_vocab(model), text.encode("utf-8", "replace")
        if patterns or tokens:
            words = (ctypes.c_char_p * len(patterns))(*(pattern.encode("utf-8", "replace") for pattern in patterns))
            self._sampler = llama_cpp.llama_sampler_init_grammar_lazy_patterns(
                vocab, grammar, b"root", words, len(words), (llama_cpp.llama_token * len(tokens))(*tokens), len(tokens)
            )
        else:
            self._sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar, b"root")
        if not self._sampler:
            raise ConfigError("failed to parse grammar")

    def apply(self, candidates: Candidates) -> None:
        """Set the logits of tokens that the grammar forbids to minus infinity."""
        library.load().llama_sampler_apply(self._sampler, ctypes.byref(candidates.array))

    def allows(self, token: int) -> bool:
        """Returns whether ``token`` may be the next one."""
        llama_cpp = library.load()
        one = llama_cpp.llama_token_data(token, 1.0, 0.0)
        candidates = llama_cpp.llama_token_data_array(data=ctypes.pointer(one), size=1, selected=-1, sorted=False)
        llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(candidates))
        return bool(np.isfinite(candidates.data[0].logit))

    def accept(self, token: int) -> None:
        """Tell the grammar the next token.

        Raises:
            ConfigError: it does not allow the token, although ``allows`` may have said so: a lazy grammar that begins
                within a token finds out only now. Do not use it any more.
        """
        if not self.allows(token):  # llama.cpp would end the process at an end token
            raise ConfigError("the grammar does not allow the token")
        chat_library.sampler_accept(self._sampler, token)

    def close(self) -> None:
        """Free the grammar."""
        if self._sampler:
            library.load().llama_sampler_free(self._sampler)
            self._sampler = None


def _make(vocab: Any, n_vocab: int, name: str, parameters: Sequence[Any]) -> Any:
    """Returns a ``llama_sampler``; the parameters are those of llama.cpp's function, in its order."""
    llama_cpp = library.load()
    if name == "dry":
        *numbers, breakers = parameters
        texts = [text.encode() for text in breakers]
        return llama_cpp.llama_sampler_init_dry(vocab, *numbers, (ctypes.c_char_p * len(texts))(*texts), len(texts))
    if name == "logit_bias":
        (biases,) = parameters
        array = (llama_cpp.llama_logit_bias * len(biases))(*biases)
        return llama_cpp.llama_sampler_init_logit_bias(n_vocab, len(biases), array)
    if name == "infill":
        return llama_cpp.llama_sampler_init_infill(vocab)
    if name == "penalties":
        return llama_cpp.llama_sampler_init_penalties(n_vocab, *parameters)
    if name == "mirostat":
        return llama_cpp.llama_sampler_init_mirostat(n_vocab, *parameters, MIROSTAT_M)
    return getattr(llama_cpp, f"llama_sampler_init_{name}")(*parameters)
