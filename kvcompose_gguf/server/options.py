"""Options of the server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError
from ..methods import Method
from .slots.sampling import Sampling

REASONING_FORMATS = ("none", "auto", "deepseek", "deepseek-legacy")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of ``kvcompose serve``. Most are llama-server's.

    Attributes:
        model_path: the model file.
        alias: comma-separated names of the model for clients. Empty: its path.
        tags: comma-separated tags reported by ``/v1/models``.
        method: the method that compresses prompts, unless a request chooses another. None: no compression.
        n_ctx: tokens of all slots together. 0: the length that the model was trained for.
        n_parallel: number of slots.
        n_queue: maximum number of requests that wait for a slot.
        kv_budget: maximum bytes of all slots' caches together. None: no limit.
        n_predict: default for the maximum number of tokens. -1: as many as fit.
        sampling: default options of the samplers.
        api_keys: a request needs one of them. Empty: no key is needed.
        max_body_bytes: maximum bytes of a request's body.
        timeout: maximum seconds of a request, including its time in the queue, and between two pieces of its body.
            None: no limit.
        cors_origins: allowed CORS origins: "*", "localhost" or one origin. Empty: "*" with API keys, else "localhost".
        chat_template: a Jinja template or the name of one of llama.cpp's formats. None: the model's own, or ChatML.
        reasoning: whether models that can think before they answer do so.
        reasoning_format: one of ``REASONING_FORMATS``. "none" leaves thoughts in the content, others separate them.
        endpoint_metrics, endpoint_slots: whether the server has /metrics and /slots.
        slot_save_path: folder for saved slots. None: slots cannot be saved.
        idle_bytes: maximum bytes of the saved contexts of evicted slots, in ``slot_save_path``. 0: none are saved.
        embeddings: maximum tokens of a text for embeddings. 0: no embeddings.
        pooling: pooling of the embeddings: "none", "mean", "cls" or "last". None: the model's own.
        ui: whether the server has a web page at /.
        verbose: whether answers contain their prompts.
    Raises:
        ConfigError: an option is out of range.
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
            raise ConfigError(f"timeout={self.timeout} is not a positive number of seconds")
        if self.reasoning_format not in REASONING_FORMATS:
            raise ConfigError(f"reasoning_format={self.reasoning_format!r} is none of {', '.join(REASONING_FORMATS)}")
        if self.idle_bytes and self.slot_save_path is None:
            raise ConfigError(f"idle_bytes={self.idle_bytes} needs slot_save_path, the folder for the files")
        if self.n_predict < -1:
            raise ConfigError(f"n_predict={self.n_predict} is below -1")
        if self.slot_save_path is not None and not self.slot_save_path.is_dir():
            raise ConfigError(f"slot_save_path={str(self.slot_save_path)!r} is no folder: create it first")

    @property
    def model_name(self) -> str:
        """The model's name for clients: the alphabetically first alias, as in llama-server, or the path."""
        return min(self.aliases, default=str(self.model_path))

    @property
    def aliases(self) -> list[str]:
        """All aliases, sorted."""
        return _words(self.alias)

    @property
    def all_tags(self) -> list[str]:
        """All tags, sorted."""
        return _words(self.tags)


def _words(text: str) -> list[str]:
    return sorted({word.strip() for word in text.split(",")} - {""})
