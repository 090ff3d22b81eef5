"""The ``kvcompose serve`` command: llama-server's options, and the options of the compression."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from ..errors import ConfigError
from ..support.checks import parse_bytes
from . import options as shared

Flash = Enum("Flash", {"on": "on", "off": "off", "auto": "auto"}, type=str)
Reasoning = Enum("Reasoning", {"on": "on", "off": "off", "auto": "auto"}, type=str)
Pooling = Enum("Pooling", {"none": "none", "mean": "mean", "cls": "cls", "last": "last"}, type=str)

#: groups of --help
OURS, MODEL = shared.COMPRESSION, shared.MODEL
SERVER, SAMPLING = "Server", "Sampling defaults, for requests without them"


def _ours(*names: str, **options: Any) -> Any:
    return Option(*names, rich_help_panel=OURS, **options)


def _server(*names: str, **options: Any) -> Any:
    return Option(*names, rich_help_panel=SERVER, **options)


def _sampling(*names: str, **options: Any) -> Any:
    return Option(*names, rich_help_panel=SAMPLING, **options)


def _model(*names: str, **options: Any) -> Any:
    return Option(*names, rich_help_panel=MODEL, **options)


def serve(
    model: Annotated[
        str | None,
        _model(
            "--model", "-m", help="Model to load: the path of a .gguf file, or a name that `kvcompose fetch` knows."
        ),
    ] = None,
    hf_repo: shared.HfRepo = None,
    compression_ratio: Annotated[float | None, shared.ratio_option("By default prompts are not compressed.")] = None,
    max_kv_bytes: shared.MaxKvBytes = None,
    method: Annotated[
        str | None,
        _ours(help="Compression method with its options, e.g. snapkv or kvcompose,n_sink=0. By default kvcompose."),
    ] = None,
    scoring: shared.Scoring = None,
    min_tokens: Annotated[
        int | None, _ours(min=1, help="Do not compress prompts that are shorter than this. By default 256 tokens.")
    ] = None,
    kv_compress: Annotated[float | None, Option(hidden=True)] = None,
    kv_bytes: Annotated[str | None, Option(hidden=True)] = None,
    kv_method: Annotated[str | None, Option(hidden=True)] = None,
    kv_scoring: Annotated[str | None, Option(hidden=True)] = None,
    kv_min_tokens: Annotated[int | None, Option(min=1, hidden=True)] = None,
    kv_budget: Annotated[
        str | None,
        _ours(
            metavar="SIZE",
            help="Limit the caches of all slots together to this size, e.g. 2GiB. Idle slots are evicted, least "
            "recently used first. By default there is no limit.",
        ),
    ] = None,
    kv_save_idle: Annotated[
        str,
        _ours(
            metavar="SIZE",
            help="Save the compressed contexts of evicted slots in --slot-save-path, up to this size, e.g. 4GB. "
            "0 saves none.",
        ),
    ] = "0",
    host: Annotated[str, _server(help="Comma-separated addresses to listen on.")] = "127.0.0.1",
    port: Annotated[int, _server(min=0, max=65535, help="Port to listen on. 0 takes a free one.")] = 8080,
    parallel: Annotated[
        int, _server("--parallel", "-np", min=1, help="Number of slots, which each hold one conversation.")
    ] = 1,
    queue: Annotated[
        int, _server(min=0, help="Number of requests that may wait for a slot. Further requests are answered 503.")
    ] = 64,
    timeout: Annotated[
        float, _server("--timeout", "-to", min=0, help="Longest time for a request in seconds. 0 sets no limit.")
    ] = 3600,
    max_body: Annotated[int, _server(min=1, help="Size of the largest request in MiB.")] = 16,
    alias: Annotated[
        str,
        _server(
            "--alias", "-a", help="Comma-separated names of the model for clients. By default the path of the model."
        ),
    ] = "",
    tags: Annotated[str, _server(help="Comma-separated tags reported by `/v1/models`. By default none.")] = "",
    api_key: Annotated[
        str, _server(help="Comma-separated API keys. A request needs one of them. By default no key is needed.")
    ] = "",
    api_key_file: Annotated[
        Path | None, _server(help="File of further API keys, one per line. By default there is none.")
    ] = None,
    cors_origins: Annotated[
        str,
        _server(
            help="Allowed CORS origins: `*`, `localhost`, or a list of origins. By default `*` if there are API keys, "
            "else `localhost`."
        ),
    ] = "",
    slot_save_path: Annotated[
        Path | None, _server(help="Folder to save slots in. By default slots cannot be saved.")
    ] = None,
    metrics: Annotated[bool, _server(help="Answer /metrics with Prometheus metrics.")] = True,
    slots: Annotated[bool, _server(help="Answer /slots with the state of each slot.")] = True,
    ui: Annotated[bool, _server(help="Serve a chat page at /.")] = True,
    embeddings: Annotated[
        int, _server(min=0, help="Answer requests for embeddings of texts up to this number of tokens. 0 answers none.")
    ] = 0,
    pooling: Annotated[Pooling | None, _server(help="Pooling of the embeddings. By default the model's own.")] = None,
    verbose: Annotated[
        bool, _server("--verbose", "-v", help="Include the prompt in each answer. Off by default.")
    ] = False,
    ctx_size: Annotated[
        int,
        _model("--ctx-size", "-c", min=0, help="Context size of all slots together in tokens. 0 takes the model's."),
    ] = 0,
    batch_size: Annotated[
        int, _model("--batch-size", "-b", min=1, help="Largest number of tokens in a decode call.")
    ] = 512,
    ubatch_size: Annotated[
        int, _model("--ubatch-size", "-ub", min=1, help="Largest number of tokens computed at once.")
    ] = 512,
    threads: shared.Threads = None,
    threads_batch: Annotated[
        int | None,
        _model("--threads-batch", "-tb", min=1, help="CPU threads for prompts. By default as --threads, or all cores."),
    ] = None,
    n_gpu_layers: Annotated[
        int, _model("--n-gpu-layers", "-ngl", min=-1, help="Number of layers to compute on a GPU. -1 takes all layers.")
    ] = 0,
    flash_attn: Annotated[
        Flash, _model("--flash-attn", "-fa", help="Use flash attention for everything but the scoring. `auto` is `on`.")
    ] = Flash.auto,
    cache_type_k: Annotated[
        str, _model("--cache-type-k", "-ctk", help="Type of the cached keys, e.g. f16 or q8_0.")
    ] = "f16",
    cache_type_v: Annotated[
        str, _model("--cache-type-v", "-ctv", help="Type of the cached values, e.g. f16 or q8_0.")
    ] = "f16",
    chat_template: Annotated[
        str | None, _model(help="Chat template: Jinja text, or `chatml`. By default the model's own, or ChatML.")
    ] = None,
    chat_template_file: Annotated[
        Path | None, _model(help="File of a chat template, which is used instead of --chat-template. By default none.")
    ] = None,
    reasoning: Annotated[
        Reasoning,
        _model("--reasoning", "-rea", help="Let models think before they answer, if they can. `auto` is `on`."),
    ] = Reasoning.auto,
    reasoning_format: Annotated[
        str,
        _model(
            help="Where thoughts go: `none` leaves them in the content; `auto`, `deepseek` and `deepseek-legacy` put "
            "them into reasoning_content."
        ),
    ] = "auto",
    n_predict: Annotated[
        int,
        _sampling("--n-predict", "-n", min=-1, help="Length of the longest answer in tokens. -1 fills the context."),
    ] = -1,
    seed: Annotated[
        int, _sampling("--seed", "-s", min=-1, help="Seed of the sampler. -1 takes another seed each time.")
    ] = -1,
    temp: Annotated[
        float, _sampling(min=0, help="Sampling temperature. 0 always takes the most probable token.")
    ] = 0.8,
    top_k: Annotated[int, _sampling(min=0, help="Sample from this many most probable tokens. 0 takes all.")] = 40,
    top_p: Annotated[
        float, _sampling(min=0, max=1, help="Sample from the most probable tokens that reach this total. 1 takes all.")
    ] = 0.95,
    min_p: Annotated[
        float,
        _sampling(min=0, max=1, help="Drop tokens below this fraction of the largest probability. 0 drops none."),
    ] = 0.05,
    repeat_penalty: Annotated[
        float, _sampling(help="Divide the logits of repeated tokens by this. 1 turns it off.")
    ] = 1.0,
    repeat_last_n: Annotated[int, _sampling(min=0, help="Number of latest tokens that the penalties look at.")] = 64,
    presence_penalty: Annotated[
        float, _sampling(help="Subtract this from the logits of tokens that occurred. 0 turns it off.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, _sampling(help="Subtract this from a token's logit each time that it occurred. 0 turns it off.")
    ] = 0.0,
    cache_prompt: Annotated[bool, _sampling(help="Do not read again what the cache already has of a prompt.")] = True,
    jinja: Annotated[bool, Option("--jinja", hidden=True, help="Accepted for llama-server's sake. Always on.")] = True,
) -> None:
    """Serve llama-server's and OpenAI's HTTP interface, from compressed caches."""
    try:
        from ..server.command import read_keys
        from ..server.command import serve as listen
        from ..server.options import ServeOptions
        from ..server.slots.sampling import RANDOM_SEED, Sampling
    except ImportError as error:
        raise ConfigError(f"{error}: pip install 'kvcompose-gguf[serve]'") from error
    from ..models.resolve import resolve_model

    name = shared.model_name(model, hf_repo)
    spec = shared.renamed("--kv-method", kv_method, "--method", method) or "kvcompose"
    given = {
        "compression_ratio": shared.renamed("--kv-compress", kv_compress, "--compression-ratio", compression_ratio),
        "max_kv_bytes": shared.renamed("--kv-bytes", kv_bytes, "--max-kv-bytes", max_kv_bytes),
        "scoring": shared.renamed("--kv-scoring", kv_scoring, "--scoring", scoring),
        "min_tokens": shared.renamed("--kv-min-tokens", kv_min_tokens, "--min-tokens", min_tokens),
    }
    compressor = _method(spec, given)
    budget = _size("kv_budget", kv_budget)
    idle_bytes = _size("kv_save_idle", kv_save_idle, least=0) or 0
    path = resolve_model(name)
    sampling = Sampling(
        seed=RANDOM_SEED if seed == -1 else seed, temperature=temp, top_k=top_k, top_p=top_p, min_p=min_p,
        repeat_penalty=repeat_penalty, repeat_last_n=repeat_last_n, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )  # fmt: skip
    options = ServeOptions(
        model_path=path, alias=alias, tags=tags,
        method=None if compressor is None else compressor.for_model(path), n_ctx=ctx_size,
        n_parallel=parallel, n_queue=queue, kv_budget=budget, n_predict=n_predict, n_batch=batch_size,
        n_ubatch=ubatch_size, threads=threads, threads_batch=threads_batch, n_gpu_layers=n_gpu_layers,
        flash_attn=flash_attn is not Flash.off, type_k=_kv_type(cache_type_k), type_v=_kv_type(cache_type_v),
        sampling=sampling, cache_prompt=cache_prompt, api_keys=read_keys(api_key, api_key_file),
        max_body_bytes=max_body << 20, timeout=timeout or None, cors_origins=cors_origins,
        chat_template=_text(chat_template_file) if chat_template_file is not None else chat_template,
        reasoning=reasoning is not Reasoning.off, reasoning_format=reasoning_format,
        endpoint_metrics=metrics, endpoint_slots=slots, slot_save_path=slot_save_path, idle_bytes=idle_bytes,
        embeddings=embeddings, pooling=pooling.value if pooling is not None else None, ui=ui, verbose=verbose,
    )  # fmt: skip
    listen(options, host, port)


def _method(spec: str, given: dict[str, Any]) -> Any:
    """The method that compresses prompts, or None without a budget."""
    from ..methods import make_method

    if given["compression_ratio"] is None and given["max_kv_bytes"] is None:
        return None
    return make_method(spec, **{name: value for name, value in given.items() if value is not None})


def _size(name: str, text: str | None, least: int = 1) -> int | None:
    """The bytes of an option, None if it is not given.

    Raises:
        ConfigError: it is not a size, or less than ``least`` bytes.
    """
    if text is None:
        return None
    n_bytes = parse_bytes(name, text)
    if n_bytes < least:
        raise ConfigError(f"{name}={text!r} is less than {least} byte")
    return n_bytes


def _kv_type(name: str) -> int:
    from ..native import library
    from ..native.kv_types import KV_TYPES

    if name not in KV_TYPES:
        raise ConfigError(f"{name!r} is not a type of a KV cache, use one of {', '.join(KV_TYPES)}")
    return int(getattr(library.load(), f"GGML_TYPE_{name.upper()}"))


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(file)!r} cannot be read: {error}") from error
