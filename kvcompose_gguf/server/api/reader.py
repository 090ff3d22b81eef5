"""Turns the fields of a request into tokens and a ``Generation``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...errors import ConfigError
from ...methods import METHODS, Method, make_method
from ..options import ServeOptions
from ..slots.constraint import Constraint, Thinking
from ..slots.sampling import RANDOM_SEED, SAMPLERS, Sampling
from ..slots.slot_llama import SlotLlama
from ..slots.steps import Generation
from .errors import invalid
from .grammars import check_grammar, grammar_of
from .schemas import GenerationRequest, KVCompress, Mixed, Prompt, PromptObject

PROMPT_KINDS = (
    '"prompt" elements must be a string, a list of tokens, a JSON object containing a prompt string, '
    "or a list of mixed strings & tokens."
)

NO_BUDGET = "kv_compress: the server was started without a budget: give ratio, n_kept or max_kv_bytes"

BUDGETS = ("compression_ratio", "n_kept", "max_kv_bytes")

#: longer texts cannot fit into a context, so they are refused without tokenizing them
MAX_CHARS_PER_TOKEN = 128

#: maximum bias of a logit; infinity would make all probabilities zero
MAX_BIAS = 1e4

#: maximum number of most probable tokens to report for a token
MAX_PROBS = 128

#: options of methods that a request may set, beside the budget: none of them makes a request more expensive
METHOD_OPTIONS = frozenset({
    "scoring", "window", "scoring_fraction", "agg_task", "agg_group", "agg_head", "add_v_norm", "add_mean_across_heads",
    "n_sink", "n_recent", "allocation", "kernel", "n_heads", "per_head", "first_layer_rule", "keep_token_lower_bound",
    "threshold",
})  # fmt: skip

#: fields that have the same name in a request and in Sampling
SAMPLING_FIELDS = tuple(
    name for name in Sampling.__dataclass_fields__
    if name not in ("samplers", "logit_bias", "constraint", "thinking", "dry_sequence_breakers")
)  # fmt: skip


class Reader:
    """Reads requests for one model.

    Args:
        llama: a ``Llama`` of the model, for its vocabulary.
        options: the server's options, with defaults for absent fields.
    """

    def __init__(self, llama: SlotLlama, options: ServeOptions) -> None:
        self._llama, self._options = llama, options
        self._n_vocab = llama.n_vocab()
        self._methods: dict[str, Method] = {}

    #
    # prompts
    #

    def prompts(self, prompt: Prompt, begin: bool = True) -> list[tuple[int, ...]]:
        """Returns the tokens of every prompt. A list is several prompts, unless it contains a number.

        Args:
            begin: whether texts begin with the BOS token, if the model uses one.
        Raises:
            ApiError: ``prompt`` is not a prompt.
        """
        if not isinstance(prompt, list):
            return [self._prompt(prompt, begin)]
        if any(_is_token(item) for item in prompt):
            return [self._prompt(prompt, begin)]
        if not prompt:
            raise invalid('"prompt" must not be empty')
        return [self._prompt(item, begin) for item in prompt]

    def _prompt(self, prompt: Any, begin: bool) -> tuple[int, ...]:
        if isinstance(prompt, dict) and "prompt_string" in prompt:
            try:
                prompt = PromptObject.model_validate(prompt)
            except ValidationError as error:
                raise invalid(PROMPT_KINDS) from error
        if isinstance(prompt, PromptObject):
            if prompt.multimodal_data:
                raise invalid("Multimodal data provided, but model does not support multimodal requests.")
            prompt = prompt.prompt_string
        if isinstance(prompt, str):
            return self.tokens(prompt, begin=begin)
        if isinstance(prompt, list) and prompt and all(_is_token(item) or isinstance(item, str) for item in prompt):
            return self.mixed(prompt, begin)
        raise invalid(PROMPT_KINDS)

    def tokens(self, text: str, special: bool = True, begin: bool = True) -> tuple[int, ...]:
        """Returns the tokens of a text, after the BOS token if ``begin`` and the model uses one.

        Raises:
            ApiError: the text is too long for any context.
        """
        if len(text) > MAX_CHARS_PER_TOKEN * self._llama.n_ctx():
            raise invalid(
                f"a text of {len(text)} characters exceeds the available context size, {self._llama.n_ctx()} tokens"
            )
        bos = [self._llama.token_bos()] if begin and self._llama.adds_bos else []
        return (*bos, *self._llama.tokenize(text.encode("utf-8", "replace"), add_bos=False, special=special))

    def text(self, token: int) -> str:
        """Returns the text of a token, also of a control token. Empty if ``token`` is negative: the model has none."""
        return self._llama.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def mixed(self, parts: Mixed, begin: bool = True, special: bool = True) -> tuple[int, ...]:
        """Returns the tokens of a list of texts and tokens."""
        out: list[int] = []
        for number, part in enumerate(parts):
            if isinstance(part, str):
                out += self.tokens(part, special, begin and number == 0)
            elif 0 <= part < self._n_vocab:
                out.append(part)
            else:
                raise invalid("Prompt contains invalid tokens")
        return tuple(out)

    #
    # generations
    #

    def generation(
        self,
        request: GenerationRequest,
        tokens: Sequence[int],
        constraint: Constraint | None = None,
        thinking: Thinking | None = None,
    ) -> Generation:
        """Returns the generation that a request asks for.

        Args:
            tokens: the prompt's tokens.
            constraint: what the answer has to be, instead of the request's own grammar.
            thinking: how the model thinks, if it does.
        Raises:
            ApiError: a field is invalid.
        """
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        n_predict = request.n_predict
        try:
            sampling = self._sampling(request, constraint or self._constraint(request), thinking)
        except ConfigError as error:
            raise invalid(f"Failed to initialize samplers: {error}") from error
        return Generation(
            tokens=tuple(tokens),
            sampling=sampling,
            method=self.method(request.kv_compress),
            n_predict=self._options.n_predict if n_predict is None or n_predict == -1 else n_predict,
            n_indent=request.n_indent,
            t_max_predict_ms=request.t_max_predict_ms,
            stops=tuple(stop for stop in stops if stop),
            ignore_eos=request.ignore_eos,
            reuse=self._options.cache_prompt if request.cache_prompt is None else request.cache_prompt,
            n_probs=min(request.n_probs or 0, MAX_PROBS, self._n_vocab),
            post_sampling_probs=request.post_sampling_probs,
        )

    def method(self, how: KVCompress | bool | None) -> Method | None:
        """Returns the method that compresses a prompt, or None.

        Raises:
            ApiError: ``how`` is invalid.
        """
        default = self._options.method
        if how is False:
            return None
        if how is None or how is True:
            if how is True and default is None:
                raise invalid(NO_BUDGET)
            return default
        given = how.model_dump(exclude_none=True)
        budget: dict[str, Any] = {name: given.pop(name) for name in ("n_kept", "max_kv_bytes") if name in given}
        if "ratio" in given:
            budget["compression_ratio"] = given.pop("ratio")
        try:
            spec = given.pop("method", None)
            if spec is not None:
                # only names of our methods: make_method would import others
                name, *options = spec.split(",")
                if name not in METHODS:
                    raise ConfigError(f"method={spec!r} is none of {', '.join(METHODS)}")
                if unknown := {option.partition("=")[0].strip() for option in options} - METHOD_OPTIONS:
                    raise ConfigError(f"method={spec!r}: {', '.join(unknown)} cannot be chosen by a request")
                method = make_method(spec, **(budget or _budget_of(default)), **given)
            elif default is None:
                method = make_method("kvcompose", **budget, **given)
            else:
                unset: dict[str, Any] = dict.fromkeys(BUDGETS) if budget else {}
                method = replace(default, **(unset | budget | given))
            if method.simulated:
                raise ConfigError(f"{type(method).__name__} is only simulated: kvcompose eval")
            return self._ready(method)
        except ConfigError as error:
            raise invalid(f"kv_compress: {error}") from error

    def _ready(self, method: Method) -> Method:
        key = repr(method)
        if key not in self._methods:
            if len(self._methods) >= 256:  # bounds the memory
                self._methods.clear()
            self._methods[key] = method.for_model(Path(self._llama.model_path))
        return self._methods[key]

    def _sampling(
        self, request: GenerationRequest, constraint: Constraint | None, thinking: Thinking | None
    ) -> Sampling:
        if constraint is not None:
            check_grammar(constraint.grammar)
        given = {name: getattr(request, name) for name in SAMPLING_FIELDS if getattr(request, name, None) is not None}
        if "seed" in given:
            given["seed"] = _seed(given["seed"])
        if request.dry_sequence_breakers is not None:
            given["dry_sequence_breakers"] = tuple(request.dry_sequence_breakers)
        if given.get("dry_base", 1.0) < 1.0:
            del given["dry_base"]
        if request.samplers is not None:
            given["samplers"] = _samplers(request.samplers)
        bias = self._biases(request.logit_bias)
        if request.ignore_eos:
            bias += [(token, float("-inf")) for token in self.end_tokens]
        return replace(
            self._options.sampling, **given, logit_bias=tuple(bias), constraint=constraint, thinking=thinking
        )

    @functools.cached_property
    def end_tokens(self) -> list[int]:
        """All tokens that end a generation."""
        return [token for token in range(self._n_vocab) if self._llama.is_end(token)]

    def _biases(self, logit_bias: Any) -> list[tuple[int, float]]:
        pairs = list(logit_bias.items()) if isinstance(logit_bias, dict) else logit_bias or []
        out = []
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or pair[1] is True:
                continue
            key, bias = pair
            if bias is not False and not isinstance(bias, (int, float)):
                continue
            value = float("-inf") if bias is False else min(max(bias, -MAX_BIAS), MAX_BIAS)
            if value != value:
                raise ConfigError(f"logit_bias of {key!r} is not a number")
            if isinstance(key, str) and isinstance(logit_bias, dict) and key.isdecimal():
                key = int(key)
            tokens = self.tokens(key, special=False, begin=False) if isinstance(key, str) else [key]
            out += [(token, value) for token in tokens if _is_token(token) and 0 <= token < self._n_vocab]
        return out

    @staticmethod
    def _constraint(request: GenerationRequest) -> Constraint | None:
        grammar = request.grammar
        if grammar is None and request.json_schema is not None:
            grammar = grammar_of(request.json_schema)
        return Constraint(grammar=grammar) if grammar else None


def _seed(seed: int) -> int:
    """Returns a seed of 32 bits for one of OpenAI's, which have 64. Only -1 and ``RANDOM_SEED`` are random."""
    if seed in (-1, RANDOM_SEED):
        return RANDOM_SEED
    return min(seed % 2**32, RANDOM_SEED - 1)


def _samplers(names: list[str] | str) -> tuple[str, ...]:
    """Returns samplers given by names, aliases or letters. Ignores unknown ones, as llama-server does."""
    if isinstance(names, str):
        by_letter = {letter: name for name, letter in SAMPLERS.items()}
        return tuple(by_letter[letter] for letter in names if letter in by_letter)
    known = {name.replace("_", ""): name for name in SAMPLERS} | {
        "nucleus": "top_p", "temp": "temperature", "typ": "typ_p", "typical": "typ_p", "typicalp": "typ_p"
    }  # fmt: skip
    plain = [name.lower().replace("-", "").replace("_", "") for name in names]
    return tuple(known[name] for name in plain if name in known)


def _is_token(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _budget_of(method: Method | None) -> dict[str, Any]:
    if method is None:
        return {}
    return {name: getattr(method, name) for name in BUDGETS if getattr(method, name) is not None}
