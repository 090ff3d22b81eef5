"""The ``kvcompose eval`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from ..support.checks import parse_numbers
from . import options as shared

RATIOS = "0.25,0.5,0.75,0.875,0.9375"


def evaluate(
    model: shared.Model = None,
    hf_repo: shared.HfRepo = None,
    out: Annotated[Path, Option(help="Folder of the run. A run that was interrupted goes on where it stopped.")] = Path(
        "eval"
    ),
    tasks: Annotated[
        str, Option(help="Comma-separated names of RULER tasks, or passkey; `all` runs all of RULER.")
    ] = "all",
    n_tokens: Annotated[int, Option(min=1, help="Length of a sample in tokens, with its answer.")] = 2048,
    samples: Annotated[int, Option(min=1, help="Number of samples of each task.")] = 20,
    method: Annotated[
        list[str] | None,
        Option(
            help="Compression method with its options, e.g. snapkv or kvcompose,scoring=window, or one of the groups "
            "@baselines, @scoring and @ablations. Repeat the option for several. By default @baselines.",
        ),
    ] = None,
    compression_ratio: Annotated[str | None, shared.ratios_option(RATIOS)] = None,
    ratios: Annotated[str | None, Option(hidden=True)] = None,
    kv_types: Annotated[
        str, Option(help="Comma-separated types of the cache, e.g. f16,q8_0/q4_0 (keys q8_0, values q4_0).")
    ] = "f16",
    question_seen: Annotated[
        bool, Option(help="Show the question to methods that look at the last tokens of the prompt.")
    ] = False,
    chat: Annotated[bool, Option(help="Use the chat format of the model, if it has one.")] = True,
    texts: Annotated[
        str,
        Option(
            help="Source of prose and questions: package (a package with texts that is installed), generated, or auto "
            "(package if there is one, else generated)."
        ),
    ] = "auto",
    seed: Annotated[int, Option(help="Seed of the samples.")] = 0,
    jobs: Annotated[
        int | None, Option(min=1, help="Number of processes, which load the model each. By default one per core.")
    ] = None,
    threads: Annotated[int, Option("--threads", "-t", min=1, help="Number of CPU threads of each process.")] = 1,
    quick: Annotated[bool, Option(help="Run a few short samples only, which takes minutes.")] = False,
    report_only: Annotated[bool, Option(help="Write the report of a finished or interrupted run.")] = False,
) -> None:
    """Compare compression methods on long-context tasks and write a report with tables and pictures.

    The model is smollm2 by default.
    """
    from ..evaluation.command import evaluate

    asked = shared.renamed("--ratios", ratios, "--compression-ratio", compression_ratio)
    evaluate(
        shared.model_name(model, hf_repo, default="smollm2"), out, tasks=tasks, n_tokens=n_tokens, n_samples=samples,
        methods=method or ["@baselines"],
        ratios=parse_numbers("compression_ratio", RATIOS if asked is None else asked, float) or (),
        types_kv=tuple(kv_types.split(",")), question_seen=question_seen, chat=chat, texts=texts, seed=seed, jobs=jobs,
        threads=threads, quick=quick, report_only=report_only,
    )  # fmt: skip
