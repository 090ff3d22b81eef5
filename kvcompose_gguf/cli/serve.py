"""Declares the ``kvcompose serve`` command: its options for the model and the method, and those of ``ServeOptions``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from typer import Option

from ..errors import ConfigError
from ..server.options import ServeOptions
from ..support.arguments import COMPRESSION, MODEL, arguments_of, field_values
from . import options as shared

F = TypeVar("F", bound=Callable[..., Any])


def _takes(cls: type) -> Callable[[F], F]:
    """Returns a decorator for a command: its ``**values`` become the options that set the fields of a dataclass."""

    def decorate(command: F) -> F:
        takes = inspect.signature(command, eval_str=True).parameters.values()
        own = [each for each in takes if each.kind is not inspect.Parameter.VAR_KEYWORD]
        more = shared.parameters(arguments_of(cls))
        command.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
        return command

    return decorate


@_takes(ServeOptions)
def serve(
    *,
    model: Annotated[
        str | None,
        Option(
            "--model",
            "-m",
            rich_help_panel=MODEL,
            help="Model to load: the path of a .gguf file, or a name that `kvcompose fetch` knows.",
        ),
    ] = None,
    hf_repo: shared.HfRepo = None,
    compression_ratio: Annotated[float | None, shared.ratio_option("By default prompts are not compressed.")] = None,
    max_kv_bytes: shared.MaxKvBytes = None,
    method: Annotated[
        str | None,
        Option(
            rich_help_panel=COMPRESSION,
            help="Compression method with its options, e.g. snapkv or kvcompose,n_sink=0. By default kvcompose.",
        ),
    ] = None,
    scoring: shared.Scoring = None,
    min_tokens: Annotated[
        int | None,
        Option(
            min=1,
            rich_help_panel=COMPRESSION,
            help="Do not compress prompts that are shorter than this. By default 256 tokens.",
        ),
    ] = None,
    kv_compress: Annotated[float | None, Option(hidden=True)] = None,
    kv_bytes: Annotated[str | None, Option(hidden=True)] = None,
    kv_method: Annotated[str | None, Option(hidden=True)] = None,
    kv_scoring: Annotated[str | None, Option(hidden=True)] = None,
    kv_min_tokens: Annotated[int | None, Option(min=1, hidden=True)] = None,
    jinja: Annotated[bool, Option("--jinja", hidden=True, help="Accepted for llama-server's sake. Always on.")] = True,
    **values: Any,
) -> None:
    """Serve llama-server's and OpenAI's HTTP interface, from compressed caches."""
    try:
        from ..server.command import serve as listen
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
    options = field_values(ServeOptions, shared.plain(values))
    path = resolve_model(name)
    ready = None if compressor is None else compressor.for_model(path)
    listen(ServeOptions(model_path=path, method=ready, **options))


def _method(spec: str, given: dict[str, Any]) -> Any:
    """The method that compresses prompts, or None without a budget."""
    from ..methods import make_method

    if given["compression_ratio"] is None and given["max_kv_bytes"] is None:
        return None
    return make_method(spec, **{name: value for name, value in given.items() if value is not None})
