"""Options that several commands share: each name and each help text is written once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from inspect import Parameter
from typing import Annotated, Any, TypeVar

import typer

from ..errors import ConfigError
from ..support.arguments import COMPRESSION, MODEL, THREADS, Argument
from ..support.checks import parse_bytes

T = TypeVar("T")


def typer_type(argument: Argument) -> Any:
    """Returns the annotation of a typer command's parameter for a declared option."""
    make_enum: Any = Enum  # mypy wants the name of an enum as a literal
    choices = {word: word for word in argument.choices}
    kind = make_enum(argument.name, choices, type=str) if choices else argument.kind
    option = typer.Option(
        *argument.names, min=argument.min, max=argument.max, metavar=argument.metavar,
        rich_help_panel=argument.panel, help=argument.help,
    )  # fmt: skip
    return Annotated[kind if argument.default is not None else kind | None, option]


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the user typed for declared options: words instead of the members that typer makes of them."""
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def parameters(arguments: Iterable[Argument]) -> list[Parameter]:
    """Returns the parameters of a typer command for declared options."""
    return [
        Parameter(each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=typer_type(each))
        for each in arguments
    ]


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Model to load: the path of a .gguf file, or a name that `kvcompose fetch` knows.",
        show_default=False,
    ),
]

HfRepo = Annotated[
    str | None,
    typer.Option(
        "--hf-repo",
        "-hf",
        metavar="USER/REPO[:QUANT]",
        rich_help_panel=MODEL,
        help="Load the model from this Hugging Face repository, instead of MODEL. It is downloaded once. "
        "QUANT is a quantization such as Q8_0; by default Q4_K_M, or the first file if there is none.",
    ),
]


def ratio_option(default: str) -> Any:
    """``--compression-ratio``; ``default`` is a sentence about what happens without it."""
    return typer.Option(
        "--compression-ratio",
        metavar="RATIO",
        rich_help_panel=COMPRESSION,
        show_default=False,
        help=f"Remove this fraction of the KV entries, 0 to below 1. {default}",
    )


def ratios_option(default: str) -> Any:
    """``--compression-ratio`` of commands that measure several; ``default`` are those, separated by commas."""
    return typer.Option(
        "--compression-ratio",
        metavar="RATIO,...",
        rich_help_panel=COMPRESSION,
        help=f"Comma-separated fractions of the KV entries to remove; each is measured. By default {default}.",
    )


MaxKvBytes = Annotated[
    str | None,
    typer.Option(
        "--max-kv-bytes",
        metavar="SIZE",
        rich_help_panel=COMPRESSION,
        help="Keep as much of the context as fits into this size, e.g. 512MB or 1.5GiB, instead of a ratio. "
        "A plain number is bytes.",
    ),
]

Method = Annotated[
    str,
    typer.Option(
        "--method",
        rich_help_panel=COMPRESSION,
        help="Compression method with its options, e.g. snapkv or kvcompose,n_sink=0.",
    ),
]

Scoring = Annotated[
    str | None,
    typer.Option(
        "--scoring",
        rich_help_panel=COMPRESSION,
        help="How the method kvcompose scores tokens: auto, learned, repeat, window or prefill. "
        "By default auto: learned from earlier prompts, with a check of some pieces of each prompt.",
    ),
]

CtxSize = Annotated[
    int | None,
    typer.Option(
        "--ctx-size",
        "-c",
        min=1,
        metavar="TOKENS",
        rich_help_panel=MODEL,
        help="Longest context in tokens. By default as many as the documents need and the model allows.",
    ),
]

Threads = typer_type(THREADS)


def model_name(model: str | None, hf_repo: str | None, default: str | None = None) -> str:
    """The name of the model that MODEL or -hf means, as ``resolve_model`` takes it.

    Args:
        default: if neither is given.
    Raises:
        ConfigError: both are given, neither is given and there is no default, or ``hf_repo`` has another form.
    """
    from ..models.hub import PREFIX, parse_spec

    if model is not None and hf_repo is not None:
        raise ConfigError(f"model={model!r} and -hf {hf_repo} are two models: give one of them")
    if hf_repo is not None:
        parse_spec(hf_repo)
        return PREFIX + hf_repo.removeprefix(PREFIX)
    if model is None and default is None:
        raise ConfigError(
            "the model is missing: give a .gguf file, a name that `kvcompose fetch` knows, or -hf USER/REPO"
        )
    return model or default or ""


def model_and_files(model: str | None, files: list[str] | None, hf_repo: str | None) -> tuple[str, list[str]]:
    """The model's name, and the documents; with -hf the first argument is a document as well.

    Raises:
        ConfigError: as ``model_name``, and if a model is given beside -hf.
    """
    from ..models import known

    files = list(files or [])
    if hf_repo is None or model is None or model.endswith(".gguf") or model in known.names():
        return model_name(model, hf_repo), files
    return model_name(None, hf_repo), [model, *files]


def renamed(old: str, old_value: T | None, new: str, value: T | None) -> T | None:
    """The value of an option that had another name in the version before; the old name prints a hint.

    Raises:
        ConfigError: both names are used.
    """
    if old_value is None:
        return value
    if value is not None:
        raise ConfigError(f"{old} is the old name of {new}: give {new} only")
    typer.echo(f"hint: {old} is now called {new}, the old name will be removed in the next version", err=True)
    return old_value


def one_budget(compression_ratio: float | None, max_kv_bytes: str | None) -> int | None:
    """The bytes of ``--max-kv-bytes``, or None if it is not given.

    Raises:
        ConfigError: it is not a size, or a ratio is given as well.
    """
    if max_kv_bytes is None:
        return None
    if compression_ratio is not None:
        raise ConfigError(
            f"--compression-ratio {compression_ratio} and --max-kv-bytes {max_kv_bytes} are two budgets: give one"
        )
    return parse_bytes("max_kv_bytes", max_kv_bytes)
