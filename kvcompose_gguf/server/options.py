"""What a server is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError
from ..methods import Method
from .sampling import Sampling

REASONING_FORMATS = ("none", "auto", "deepseek", "deepseek-legacy")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of ``kvcompose serve``; most are llama-server's.

    Attributes:
        model_path: of the weights.
        alias: the model's names for clients, with commas between; empty: its path.
        tags: words about it for clients, with commas between.
        method: that compresses prompts unless a request says otherwise, or None.
        n_ctx: tokens of all slots together, 0: what the model was trained for.
        n_parallel: slots.
        n_queue: requests that may wait for one.
        kv_budget: bytes of all slots' caches; None: no bound.
        n_predict: most tokens of requests that do not say, -1: as many as fit.
        sampling: of requests that do not say.
        api_keys: of which a request needs one; none: everybody may.
        max_body_bytes: of a request.
        timeout: seconds that a request may take, with its time in the queue, and that a piece of its body may; None: no
            bound.
        cors_origins: whose pages may ask: "*", "localhost" or an origin; empty: all where there are keys, else
            "localhost".
        chat_template: Jinja; None: the model's own, or ChatML.
        reasoning: whether models that can think before they answer do so.
        reasoning_format: of ``REASONING_FORMATS``: whether their thoughts are content ("none") or beside it.
        endpoint_metrics, endpoint_slots: whether /metrics and /slots answer.
        slot_save_path: folder of saved slots; None: they are not saved.
        idle_bytes: of the compressed contexts that slots had to give up, in a folder of that one; 0: not saved.
        embeddings: most tokens of a text whose vector is asked for; 0: none are made.
        pooling: of these vectors, "none", "mean", "cls" or "last"; None: the model's own.
        ui: whether there is a page at /.
        verbose: answers carry their prompts.
    Raises:
        ConfigError: an option out of its range.
    """

    model_path: Path
    alias: str = ""
    tags: str = ""
    method: Method | None = None
    n_ctx: int = 0
    n_parallel: int = 1
    n_queue: int = 64
    kv_budget: int | None = None
    n_predict: int = -1
    n_batch: int = 512
    n_ubatch: int = 512
    threads: int | None = None
    threads_batch: int | None = None
    n_gpu_layers: int = 0
    flash_attn: bool = True
    type_k: int | None = None
    type_v: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    cache_prompt: bool = True
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    timeout: float | None = None
    cors_origins: str = ""
    chat_template: str | None = None
    reasoning: bool = True
    reasoning_format: str = "auto"
    endpoint_metrics: bool = True
    endpoint_slots: bool = True
    slot_save_path: Path | None = None
    idle_bytes: int = 0
    embeddings: int = 0
    pooling: str | None = None
    ui: bool = True
    verbose: bool = False

    def __post_init__(self) -> None:
        for name in ("n_parallel", "n_batch", "n_ubatch", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not positive")
        for name in ("n_ctx", "n_queue", "embeddings", "idle_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} is negative")
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise ConfigError(f"timeout={self.timeout} is no number of seconds")
        if self.reasoning_format not in REASONING_FORMATS:
            raise ConfigError(f"reasoning_format={self.reasoning_format!r} is none of {', '.join(REASONING_FORMATS)}")
        if self.idle_bytes and self.slot_save_path is None:
            raise ConfigError("idle caches are saved in slot_save_path, which is not given")
        if self.n_predict < -1:
            raise ConfigError(f"n_predict={self.n_predict} is below -1")
        if self.slot_save_path is not None and not self.slot_save_path.is_dir():
            raise ConfigError(f"slot_save_path={str(self.slot_save_path)!r} is no folder")

    @property
    def model_name(self) -> str:
        """What clients call the model: of several aliases the first in the alphabet, as llama-server does it."""
        return min(self.aliases, default=str(self.model_path))

    @property
    def aliases(self) -> list[str]:
        """All names, sorted."""
        return _words(self.alias)

    @property
    def all_tags(self) -> list[str]:
        """All tags, sorted."""
        return _words(self.tags)


def _words(text: str) -> list[str]:
    return sorted({word.strip() for word in text.split(",")} - {""})
