"""The ``kvcompose serve`` command: llama-server's options, and ours."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from .errors import ConfigError

Flash = Enum("Flash", {"on": "on", "off": "off", "auto": "auto"}, type=str)
Reasoning = Enum("Reasoning", {"on": "on", "off": "off", "auto": "auto"}, type=str)
Pooling = Enum("Pooling", {"none": "none", "mean": "mean", "cls": "cls", "last": "last"}, type=str)

#: groups of --help
OURS, SERVER, SAMPLING, MODEL = "The cache", "The server", "Sampling, where a request does not say", "The model"


def serve(
    model: Annotated[str, Option("--model", "-m", help="A .gguf file, or a name that `fetch` knows.")],
    kv_compress: Annotated[
        float | None,
        Option(min=0, max=0.999, help="Fraction of every prompt's KV entries that is removed.", rich_help_panel=OURS),
    ] = None,
    kv_bytes: Annotated[
        int | None, Option(min=1, help="Instead: bytes that a prompt's kept rows may take.", rich_help_panel=OURS)
    ] = None,
    kv_method: Annotated[str, Option(help="E.g. snapkv or kvcompose,n_sink=0.", rich_help_panel=OURS)] = "kvcompose",
    kv_scoring: Annotated[
        str | None,
        Option(help="KVCompose's: auto, surrogate, repeat, window or prefill.", rich_help_panel=OURS),
    ] = None,
    kv_min_tokens: Annotated[
        int | None, Option(min=1, help="Shorter prompts are left as they are.", rich_help_panel=OURS)
    ] = None,
    kv_budget: Annotated[
        int | None, Option(min=1, help="Bytes of all slots' caches; idle ones make room.", rich_help_panel=OURS)
    ] = None,
    kv_save_idle: Annotated[
        int,
        Option(
            min=0,
            rich_help_panel=OURS,
            help="Bytes of compressed contexts kept under --slot-save-path when slots have to give them up; 0: none.",
        ),
    ] = 0,
    host: Annotated[
        str, Option(help="Addresses to listen on, with commas between.", rich_help_panel=SERVER)
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on.", rich_help_panel=SERVER)] = 8080,
    parallel: Annotated[
        int, Option("--parallel", "-np", min=1, help="Slots: conversations at a time.", rich_help_panel=SERVER)
    ] = 1,
    queue: Annotated[int, Option(min=0, help="Requests that may wait for a slot.", rich_help_panel=SERVER)] = 64,
    timeout: Annotated[
        float,
        Option("--timeout", "-to", min=0, help="Seconds that a request may take; 0: no bound.", rich_help_panel=SERVER),
    ] = 3600,
    max_body: Annotated[int, Option(min=1, help="Megabytes of a request.", rich_help_panel=SERVER)] = 16,
    alias: Annotated[
        str, Option("--alias", "-a", help="The model's names for clients, with commas.", rich_help_panel=SERVER)
    ] = "",
    tags: Annotated[str, Option(help="Words about it for clients, with commas.", rich_help_panel=SERVER)] = "",
    api_key: Annotated[
        str, Option(help="Keys, with commas between; none: everybody may ask.", rich_help_panel=SERVER)
    ] = "",
    api_key_file: Annotated[Path | None, Option(help="A file with a key a line.", rich_help_panel=SERVER)] = None,
    cors_origins: Annotated[
        str,
        Option(help="Whose pages may ask: *, localhost or an origin; * where there are keys.", rich_help_panel=SERVER),
    ] = "",
    slot_save_path: Annotated[Path | None, Option(help="Folder of saved slots.", rich_help_panel=SERVER)] = None,
    metrics: Annotated[bool, Option(help="Whether /metrics answers.", rich_help_panel=SERVER)] = True,
    slots: Annotated[bool, Option(help="Whether /slots answers.", rich_help_panel=SERVER)] = True,
    ui: Annotated[bool, Option(help="Whether there is a page at /.", rich_help_panel=SERVER)] = True,
    embeddings: Annotated[
        int, Option(min=0, help="Most tokens of a text whose vector is asked for; 0: none.", rich_help_panel=SERVER)
    ] = 0,
    pooling: Annotated[
        Pooling | None, Option(help="Of vectors; the model's own by default.", rich_help_panel=SERVER)
    ] = None,
    verbose: Annotated[bool, Option("--verbose", "-v", help="Answers carry prompts.", rich_help_panel=SERVER)] = False,
    ctx_size: Annotated[
        int, Option("--ctx-size", "-c", min=0, help="Tokens of all slots; 0: the model's.", rich_help_panel=MODEL)
    ] = 0,
    batch_size: Annotated[
        int, Option("--batch-size", "-b", min=1, help="Tokens decoded at once.", rich_help_panel=MODEL)
    ] = 512,
    ubatch_size: Annotated[
        int, Option("--ubatch-size", "-ub", min=1, help="Tokens computed at once.", rich_help_panel=MODEL)
    ] = 512,
    threads: Annotated[
        int | None, Option("--threads", "-t", min=1, help="CPU threads; half of the cores.", rich_help_panel=MODEL)
    ] = None,
    threads_batch: Annotated[
        int | None, Option("--threads-batch", "-tb", min=1, help="CPU threads of prompts.", rich_help_panel=MODEL)
    ] = None,
    n_gpu_layers: Annotated[
        int, Option("--n-gpu-layers", "-ngl", min=-1, help="Layers on a GPU; -1: all.", rich_help_panel=MODEL)
    ] = 0,
    flash_attn: Annotated[
        Flash, Option("--flash-attn", "-fa", help="Flash attention.", rich_help_panel=MODEL)
    ] = Flash.auto,
    cache_type_k: Annotated[str, Option("--cache-type-k", "-ctk", help="Type of keys.", rich_help_panel=MODEL)] = "f16",
    cache_type_v: Annotated[
        str, Option("--cache-type-v", "-ctv", help="Type of values.", rich_help_panel=MODEL)
    ] = "f16",
    chat_template: Annotated[
        str | None, Option(help="Jinja text, or `chatml`; the model's by default.", rich_help_panel=MODEL)
    ] = None,
    chat_template_file: Annotated[Path | None, Option(help="A file with one.", rich_help_panel=MODEL)] = None,
    reasoning: Annotated[
        Reasoning, Option("--reasoning", "-rea", help="Whether models think that can.", rich_help_panel=MODEL)
    ] = Reasoning.auto,
    reasoning_format: Annotated[
        str, Option(help="none: thoughts are content; auto: reasoning_content.", rich_help_panel=MODEL)
    ] = "auto",
    n_predict: Annotated[
        int, Option("--n-predict", "-n", min=-1, help="Most tokens; -1: as many as fit.", rich_help_panel=SAMPLING)
    ] = -1,
    seed: Annotated[int, Option("--seed", "-s", min=-1, help="-1: random.", rich_help_panel=SAMPLING)] = -1,
    temp: Annotated[float, Option(min=0, help="Temperature.", rich_help_panel=SAMPLING)] = 0.8,
    top_k: Annotated[int, Option(min=0, help="0: off.", rich_help_panel=SAMPLING)] = 40,
    top_p: Annotated[float, Option(min=0, max=1, help="1: off.", rich_help_panel=SAMPLING)] = 0.95,
    min_p: Annotated[float, Option(min=0, max=1, help="0: off.", rich_help_panel=SAMPLING)] = 0.05,
    repeat_penalty: Annotated[float, Option(help="1: off.", rich_help_panel=SAMPLING)] = 1.0,
    repeat_last_n: Annotated[int, Option(min=0, help="Tokens that it looks at.", rich_help_panel=SAMPLING)] = 64,
    presence_penalty: Annotated[float, Option(help="0: off.", rich_help_panel=SAMPLING)] = 0.0,
    frequency_penalty: Annotated[float, Option(help="0: off.", rich_help_panel=SAMPLING)] = 0.0,
    cache_prompt: Annotated[
        bool, Option(help="What the cache has of a prompt is not read again.", rich_help_panel=SAMPLING)
    ] = True,
    jinja: Annotated[bool, Option("--jinja", hidden=True, help="As it always is.")] = True,
) -> None:
    """Answer HTTP requests as llama-server does, from compressed caches."""
    try:
        from .server.command import read_keys
        from .server.command import serve as listen
        from .server.options import ServeOptions
        from .server.sampling import RANDOM_SEED, Sampling
    except ImportError as error:
        raise ConfigError(f"{error}: pip install 'kvcompose-gguf[serve]'") from error
    from .run import resolve_model

    path = resolve_model(model)
    sampling = Sampling(
        seed=RANDOM_SEED if seed == -1 else seed, temperature=temp, top_k=top_k, top_p=top_p, min_p=min_p,
        repeat_penalty=repeat_penalty, repeat_last_n=repeat_last_n, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )  # fmt: skip
    options = ServeOptions(
        model_path=path, alias=alias, tags=tags,
        method=_method(path, kv_method, kv_compress, kv_bytes, kv_scoring, kv_min_tokens), n_ctx=ctx_size,
        n_parallel=parallel, n_queue=queue, kv_budget=kv_budget, n_predict=n_predict, n_batch=batch_size,
        n_ubatch=ubatch_size, threads=threads, threads_batch=threads_batch, n_gpu_layers=n_gpu_layers,
        flash_attn=flash_attn is not Flash.off, type_k=_kv_type(cache_type_k), type_v=_kv_type(cache_type_v),
        sampling=sampling, cache_prompt=cache_prompt, api_keys=read_keys(api_key, api_key_file),
        max_body_bytes=max_body << 20, timeout=timeout or None, cors_origins=cors_origins,
        chat_template=_text(chat_template_file) if chat_template_file is not None else chat_template,
        reasoning=reasoning is not Reasoning.off, reasoning_format=reasoning_format,
        endpoint_metrics=metrics, endpoint_slots=slots, slot_save_path=slot_save_path, idle_bytes=kv_save_idle,
        embeddings=embeddings, pooling=pooling.value if pooling is not None else None, ui=ui, verbose=verbose,
    )  # fmt: skip
    listen(options, host, port)


def _method(
    path: Path, spec: str, ratio: float | None, n_bytes: int | None, scoring: str | None, min_tokens: int | None
) -> Any:
    """What compresses prompts, or None without a budget."""
    from .methods import make_method

    given = {"compression_ratio": ratio, "max_kv_bytes": n_bytes, "scoring": scoring, "min_tokens": min_tokens}
    if ratio is None and n_bytes is None:
        return None
    return make_method(spec, **{name: value for name, value in given.items() if value is not None}).for_model(path)


def _kv_type(name: str) -> int:
    from .bench import KV_TYPES
    from .native import library

    if name not in KV_TYPES:
        raise ConfigError(f"{name!r} is no type of a cache: {', '.join(KV_TYPES)}")
    return int(getattr(library.load(), f"GGML_TYPE_{name.upper()}"))


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(file)!r} cannot be read: {error}") from error
