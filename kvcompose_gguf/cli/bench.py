"""The ``kvcompose bench`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from ..support.checks import parse_numbers
from . import options as shared

RATIOS = "0.5,0.75,0.9"


def bench(
    model: shared.Model = None,
    hf_repo: shared.HfRepo = None,
    n_tokens: Annotated[
        str | None,
        Option(
            help="Comma-separated context sizes in tokens, e.g. 1024,2048. "
            "By default powers of two from 1024 on, up to the longest context of the model."
        ),
    ] = None,
    up_to: Annotated[int | None, Option(help="Largest of the default context sizes, in tokens.")] = None,
    compression_ratio: Annotated[str | None, shared.ratios_option(RATIOS)] = None,
    ratios: Annotated[str | None, Option(hidden=True)] = None,
    kv_types: Annotated[
        str, Option(help="Comma-separated types of the cached keys and values. The first is the baseline.")
    ] = "f16,q8_0",
    n_decode: Annotated[int, Option(help="Number of tokens decoded in each sample.")] = 32,
    repeats: Annotated[int, Option(help="Number of decode samples of each cache.")] = 5,
    threads: shared.Threads = None,
    text: Annotated[
        Path | None, Option(help="Use this UTF-8 file as the context. By default random tokens are used.")
    ] = None,
    json: Annotated[
        Path | None, Option(help="Write the results to this JSON file. `-` prints them as the last line.")
    ] = None,
    plot: Annotated[Path | None, Option(help="Draw the results into this .svg, .png or .pdf file.")] = None,
    from_file: Annotated[
        Path | None, Option("--from", help="Show the results of an earlier --json file instead of measuring.")
    ] = None,
) -> None:
    """Measure how time and memory grow with the context, for full and compressed caches side by side."""
    from ..bench.command import bench
    from ..bench.options import BenchOptions

    asked = shared.renamed("--ratios", ratios, "--compression-ratio", compression_ratio)
    options = BenchOptions(
        parse_numbers("n_tokens", n_tokens, int), up_to,
        parse_numbers("compression_ratio", RATIOS if asked is None else asked, float) or (),
        tuple(kv_types.split(",")), n_decode, repeats, threads, text,
    )  # fmt: skip
    name = shared.model_name(model, hf_repo) if from_file is None or hf_repo is not None else model
    bench(name, options, json_file=json, plot_file=plot, from_file=from_file)
