"""The options of ``kvcompose chat``."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..support.checks import check_integer, check_number, check_positive

#: the fraction removed if neither it nor a number of bytes is given
DEFAULT_RATIO = 0.5  # where answers are still those of the full cache (docs/evaluation.md)


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Options of ``kvcompose chat``.

    Attributes:
        model: path of a .gguf file, or a name that ``kvcompose fetch`` knows.
        files: documents that are read first; ``-`` is standard input.
        questions: questions to answer, one after the other; empty: the terminal or standard input asks.
        session: name or path of a saved session to go on with, instead of files.
        json: print one JSON document instead of text.
        compression_ratio: fraction of the KV entries that is removed, in [0, 1); ``DEFAULT_RATIO`` if
            ``max_kv_bytes`` is not given either.
        max_kv_bytes: bytes that the compressed context may take, instead of ``compression_ratio``.
        method: a text for ``make_method``, e.g. ``"kvcompose"`` or ``"snapkv,window=32"``.
        scoring: the method's ``scoring`` option; None: the method's default.
        ctx_size: longest conversation in tokens; None: as many as the documents need, up to the model's training
            length.
        max_tokens: longest answer in tokens.
        temperature: 0: always the most probable token.
        repeat_penalty: divides the logits of the answer's latest tokens, against answers that run in circles; 1: off.
            Above 1, small models also misspell names that they copy from a document.
        seed: seed of the sampler; None: another one each time.
        system: system prompt, or None.
        flash_attn: use flash attention for everything but the scoring.
        threads: CPU threads; None: llama-cpp-python's choice.
    Raises:
        ConfigError: an option is out of its range, or two options contradict each other.
    """

    model: str
    files: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    session: str | None = None
    json: bool = False
    compression_ratio: float | None = None
    max_kv_bytes: int | None = None
    method: str = "kvcompose"
    scoring: str | None = None
    ctx_size: int | None = None
    max_tokens: int = 1024
    temperature: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None
    system: str | None = None
    flash_attn: bool = True
    threads: int | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature)
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} is negative or not finite: 0 is greedy, 0.8 is usual")
        for name in ("ctx_size", "threads", "max_kv_bytes"):
            check_integer(name, getattr(self, name), optional=True)
            check_positive(name, getattr(self, name))
        check_number("repeat_penalty", self.repeat_penalty)
        check_positive("repeat_penalty", self.repeat_penalty)
        check_integer("max_tokens", self.max_tokens)
        check_positive("max_tokens", self.max_tokens)
        if self.compression_ratio is not None and self.max_kv_bytes is not None:
            raise ConfigError(
                f"compression_ratio={self.compression_ratio} and max_kv_bytes={self.max_kv_bytes} are two budgets: "
                "give one of them"
            )
        if self.session is not None and self.files:
            raise ConfigError(
                f"session={self.session!r} has its own documents: leave out {', '.join(self.files)}, "
                "and add files in the chat with /add"
            )
