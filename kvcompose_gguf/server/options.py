"""Options of the server: what they are called on the command line, what they do, and their defaults."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..native.kv_types import ggml_type
from ..native.pooling import POOLING
from ..support.arguments import COMPRESSION, MODEL, THREADS, Argument, option, options, part
from ..support.checks import parse_bytes
from .slots.sampling import SAMPLING, Sampling

if TYPE_CHECKING:
    from ..methods import Method

REASONING_FORMATS = ("none", "auto", "deepseek", "deepseek-legacy")

#: a group of --help
SERVER = "Server"

#: MiB of the copies in memory of what slots held; they are compressed, so that an eighth of llama-server's has as much
CACHE_RAM = 1024

#: values of llama-server's switches
SWITCH = ("on", "off", "auto")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of ``kvcompose serve``. Most are llama-server's; ``help`` says what each does.

    Attributes:
        model_path: the model file.
        method: the method that compresses prompts, unless a request chooses another. None: no compression.
        kv_budget: bytes. None: no limit.
        idle_bytes: maximum bytes of the saved contexts of evicted slots, in ``slot_save_path``. 0: none are saved.
        cache_ram: maximum MiB of the copies in memory of what slots held. 0: none, -1: no limit. None: 1024, or 0 with
            ``kv_budget``.
        timeout: maximum seconds of a request, including its time in the queue, and between two pieces of its body.
            None: no limit.
        max_body_bytes: maximum bytes of a request's body.
        api_keys: a request needs one of them. Empty: no key is needed.
        type_k, type_v: ``ggml_type`` of the cached keys and values. None: f16.
        chat_template: a Jinja template or the name of one of llama.cpp's formats. None: the model's own, or ChatML.
        reasoning_format: one of ``REASONING_FORMATS``. "none" leaves thoughts in the content, others separate them.
        sampling: default options of the samplers.
    Raises:
        ConfigError: an option is out of range.
    """

    # fmt: off
    model_path: Path
    method: Method | None = None
    kv_budget: int | None = option(
        None, "--kv-budget", panel=COMPRESSION, metavar="SIZE", read=lambda text: _size("kv_budget", text),
        help="Limit the caches of all slots together to this size, e.g. 2GiB. Idle slots are evicted, least recently "
        "used first. By default there is no limit.",
    )
    idle_bytes: int = option(
        0, "--kv-save-idle", panel=COMPRESSION, metavar="SIZE", option_default="0",
        read=lambda text: _size("kv_save_idle", text, least=0) or 0,
        help="Save the compressed contexts of evicted slots in --slot-save-path, up to this size, e.g. 4GB. 0 saves "
        "none.",
    )
    cache_ram: int | None = option(
        None, "--cache-ram", "-cram", panel=COMPRESSION, min=-1, kind=int,
        help="Keep in memory what a slot held before another prompt took it, up to this number of MiB for all. 0 keeps "
        "nothing, -1 sets no limit. By default 1024, or 0 with --kv-budget.",
    )
    documents_bytes: int = option(
        4 << 30, "--kv-documents", panel=COMPRESSION, metavar="SIZE", option_default="4GiB",
        read=lambda text: _size("kv_documents", text) or 4 << 30,
        help="Keep the compressed contexts of documents up to this size, in --slot-save-path, or else until the server "
        "ends.",
    )
    host: str = option("127.0.0.1", "--host", panel=SERVER, help="Comma-separated addresses to listen on.")
    port: int = option(
        8080, "--port", panel=SERVER, min=0, max=65535, help="Port to listen on. 0 takes a free one."
    )
    n_parallel: int = option(
        1, "--parallel", "-np", panel=SERVER, min=1, help="Number of slots, which each hold one conversation."
    )
    n_queue: int = option(
        64, "--queue", panel=SERVER, min=0,
        help="Number of requests that may wait for a slot. Further requests are answered 503.",
    )
    timeout: float | None = option(
        None, "--timeout", "-to", panel=SERVER, min=0, option_default=3600, kind=float,
        read=lambda seconds: seconds or None, help="Longest time for a request in seconds. 0 sets no limit.",
    )
    max_body_bytes: int = option(
        16 << 20, "--max-body", panel=SERVER, min=1, option_default=16, read=lambda mib: mib << 20,
        help="Size of the largest request in MiB.",
    )
    alias: str = option(
        "", "--alias", "-a", panel=SERVER,
        help="Comma-separated names of the model for clients. By default the path of the model.",
    )
    tags: str = option(
        "", "--tags", panel=SERVER, help="Comma-separated tags reported by `/v1/models`. By default none."
    )
    api_keys: tuple[str, ...] = options(
        (),
        Argument(
            ("--api-key",), "Comma-separated API keys. A request needs one of them. By default no key is needed.",
            SERVER, default="",
        ),
        Argument(
            ("--api-key-file",), "File of further API keys, one per line. By default there is none.", SERVER, kind=Path
        ),
        read=lambda keys, file: _keys(keys, file),
    )
    cors_origins: str = option(
        "", "--cors-origins", panel=SERVER,
        help="Allowed CORS origins: `*`, `localhost`, or a list of origins. By default `*` if there are API keys, else "
        "`localhost`.",
    )
    slot_save_path: Path | None = option(  # noqa: RUF009 (a field)
        None, "--slot-save-path", panel=SERVER, kind=Path,
        help="Folder to save slots in. By default slots cannot be saved.",
    )
    endpoint_metrics: bool = option(
        True, "--metrics/--no-metrics", panel=SERVER, help="Answer /metrics with Prometheus metrics."
    )
    endpoint_slots: bool = option(
        True, "--slots/--no-slots", panel=SERVER, help="Answer /slots with the state of each slot."
    )
    ui: bool = option(True, "--ui/--no-ui", panel=SERVER, help="Serve a chat page at /.")
    embeddings: int = option(
        0, "--embeddings", panel=SERVER, min=0,
        help="Answer requests for embeddings of texts up to this number of tokens. 0 answers none.",
    )
    pooling: str | None = option(
        None, "--pooling", panel=SERVER, choices=tuple(POOLING),
        help="Pooling of the embeddings. By default the model's own.",
    )
    verbose: bool = option(
        False, "--verbose", "-v", panel=SERVER, help="Include the prompt in each answer. Off by default."
    )
    n_ctx: int = option(
        0, "--ctx-size", "-c", panel=MODEL, min=0,
        help="Context size of all slots together in tokens. 0 takes the model's; a slot never has more than that.",
    )
    n_batch: int = option(
        512, "--batch-size", "-b", panel=MODEL, min=1, help="Largest number of tokens in a decode call."
    )
    n_ubatch: int | None = option(
        None, "--ubatch-size", "-ub", panel=MODEL, min=1, kind=int,
        help="Largest number of tokens computed at once. By default 128 on the CPU with a method, else 512.",
    )
    threads: int | None = options(None, THREADS, read=lambda n: n)
    threads_batch: int | None = option(
        None, "--threads-batch", "-tb", panel=MODEL, min=1, kind=int,
        help="CPU threads for prompts. By default as --threads, or all cores.",
    )
    n_gpu_layers: int = option(
        0, "--n-gpu-layers", "-ngl", panel=MODEL, min=-1,
        help="Number of layers to compute on a GPU. -1 takes all layers.",
    )
    flash_attn: bool = option(
        True, "--flash-attn", "-fa", panel=MODEL, option_default="auto", choices=SWITCH,
        read=lambda word: word != "off", help="Use flash attention for everything but the scoring. `auto` is `on`.",
    )
    type_k: int | None = option(
        None, "--cache-type-k", "-ctk", panel=MODEL, option_default="f16", read=ggml_type,
        help="Type of the cached keys, e.g. f16 or q8_0.",
    )
    type_v: int | None = option(
        None, "--cache-type-v", "-ctv", panel=MODEL, option_default="f16", read=ggml_type,
        help="Type of the cached values, e.g. f16 or q8_0.",
    )
    chat_template: str | None = options(
        None,
        Argument(
            ("--chat-template",), "Chat template: Jinja text, or `chatml`. By default the model's own, or ChatML.",
            MODEL,
        ),
        Argument(
            ("--chat-template-file",),
            "File of a chat template, which is used instead of --chat-template. By default none.", MODEL, kind=Path,
        ),
        read=lambda text, file: text if file is None else _text(file),
    )
    reasoning: bool = option(
        True, "--reasoning", "-rea", panel=MODEL, option_default="auto", choices=SWITCH,
        read=lambda word: word != "off", help="Let models think before they answer, if they can. `auto` is `on`.",
    )
    reasoning_format: str = option(
        "auto", "--reasoning-format", panel=MODEL,
        help="Where thoughts go: `none` leaves them in the content; `auto`, `deepseek` and `deepseek-legacy` put them "
        "into reasoning_content.",
    )
    n_predict: int = option(
        -1, "--n-predict", "-n", panel=SAMPLING, min=-1,
        help="Length of the longest answer in tokens. -1 fills the context.",
    )
    sampling: Sampling = part(Sampling)  # noqa: RUF009 (a field)
    cache_prompt: bool = option(
        True, "--cache-prompt/--no-cache-prompt", panel=SAMPLING,
        help="Do not read again what the cache already has of a prompt.",
    )
    # fmt: on

    def __post_init__(self) -> None:
        for name in ("n_parallel", "n_batch", "n_ubatch", "max_body_bytes"):
            if (n := getattr(self, name)) is not None and n < 1:
                raise ConfigError(f"{name}={n} is not positive")
        for name in ("n_ctx", "n_queue", "embeddings", "idle_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} is negative")
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise ConfigError(f"timeout={self.timeout} is not a positive number of seconds")
        if self.reasoning_format not in REASONING_FORMATS:
            raise ConfigError(f"reasoning_format={self.reasoning_format!r} is none of {', '.join(REASONING_FORMATS)}")
        if self.idle_bytes and self.slot_save_path is None:
            raise ConfigError(f"idle_bytes={self.idle_bytes} needs slot_save_path, the folder for the files")
        if self.cache_ram is not None and self.cache_ram < -1:
            raise ConfigError(f"cache_ram={self.cache_ram} is below -1")
        if self.n_predict < -1:
            raise ConfigError(f"n_predict={self.n_predict} is below -1")
        if self.slot_save_path is not None and not self.slot_save_path.is_dir():
            raise ConfigError(f"slot_save_path={str(self.slot_save_path)!r} is no folder: create it first")

    @property
    def memory_bytes(self) -> int:
        """Maximum bytes of the copies in memory of what slots held."""
        if self.cache_ram is None:
            return 0 if self.kv_budget is not None else CACHE_RAM << 20
        return sys.maxsize if self.cache_ram < 0 else self.cache_ram << 20

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


def _keys(keys: str, file: Path | None) -> tuple[str, ...]:
    """Returns API keys from a comma-separated text and from the lines of a file.

    Raises:
        ConfigError: the file cannot be read, or contains no key.
    """
    found = [key.strip() for key in keys.split(",")]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api_key_file={str(file)!r} cannot be read: {error}") from error
        if not any(lines):
            raise ConfigError(f"api_key_file={str(file)!r} has no key")
        found += lines
    return tuple(key for key in found if key)


def _size(name: str, text: str | None, least: int = 1) -> int | None:
    """Returns the bytes of an option, None if it is not given.

    Raises:
        ConfigError: it is not a size, or less than ``least`` bytes.
    """
    if text is None:
        return None
    n_bytes = parse_bytes(name, text)
    if n_bytes < least:
        raise ConfigError(f"{name}={text!r} is less than {least} byte")
    return n_bytes


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(file)!r} cannot be read: {error}") from error
