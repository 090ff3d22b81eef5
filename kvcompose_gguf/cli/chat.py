"""The command lines of ``kvcompose chat``, ``compress`` and ``run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option, echo

from . import options as shared

Files = Annotated[
    list[str] | None,
    Argument(
        metavar="FILE",
        help="Documents to read: text, Markdown, code, HTML or PDF. `-` reads standard input.",
        show_default=False,
    ),
]
System = Annotated[
    str | None, Option("--system", help="System prompt. By default none, or the one of the chat template.")
]
FlashAttn = Annotated[
    bool, Option(rich_help_panel=shared.MODEL, help="Use flash attention for everything but the scoring.")
]
Ratio = Annotated[float | None, shared.ratio_option("By default 0.5, unless --max-kv-bytes is given.")]
CHAT_TEMPERATURE = 0.8  # llama-server's


def chat(
    model: shared.Model = None,
    files: Files = None,
    hf_repo: shared.HfRepo = None,
    question: Annotated[
        list[str] | None,
        Option("--question", "-q", help="Answer this question and exit. Repeat the option for several questions."),
    ] = None,
    json: Annotated[bool, Option("--json", help="Print one JSON document instead of text. Off by default.")] = False,
    session: Annotated[
        str | None,
        Option("--session", help="Start with this saved session, a name or the path of a .kvc file, instead of files."),
    ] = None,
    compression_ratio: Ratio = None,
    max_kv_bytes: shared.MaxKvBytes = None,
    method: shared.Method = "kvcompose",
    scoring: shared.Scoring = None,
    ctx_size: shared.CtxSize = None,
    max_tokens: Annotated[
        int, Option("--max-tokens", "-n", min=1, metavar="TOKENS", help="Length of the longest answer in tokens.")
    ] = 1024,
    temp: Annotated[
        float | None,
        Option(
            "--temp",
            min=0,
            help="Sampling temperature; 0 always takes the most probable token. "
            "By default 0.8 in a conversation, and 0 with -q or --json.",
        ),
    ] = None,
    seed: Annotated[
        int | None, Option("--seed", "-s", min=0, help="Seed of the sampler. By default another one each time.")
    ] = None,
    system: System = None,
    flash_attn: FlashAttn = True,
    threads: shared.Threads = None,
) -> None:
    """Talk with a model about documents, which are read once and compressed. /help lists the commands of a chat."""
    name, documents = shared.model_and_files(model, files, hf_repo)
    n_bytes = shared.one_budget(compression_ratio, max_kv_bytes)
    if temp is None:
        temp = 0.0 if question or json else CHAT_TEMPERATURE
    from ..chat.command import chat as talk
    from ..chat.options import ChatOptions

    options = ChatOptions(
        model=name, files=tuple(documents), questions=tuple(question or ()), session=session, json=json,
        compression_ratio=compression_ratio, max_kv_bytes=n_bytes, method=method, scoring=scoring, ctx_size=ctx_size,
        max_tokens=max_tokens, temperature=temp, seed=seed, system=system, flash_attn=flash_attn, threads=threads,
    )  # fmt: skip
    raise Exit(talk(options))


def compress(
    output: Annotated[
        str,
        Option(
            "--output",
            "-o",
            metavar="SESSION",
            help="Where to save the session: the path of a .kvc file, or a name for `kvcompose sessions`.",
        ),
    ],
    model: shared.Model = None,
    files: Files = None,
    hf_repo: shared.HfRepo = None,
    compression_ratio: Ratio = None,
    max_kv_bytes: shared.MaxKvBytes = None,
    method: shared.Method = "kvcompose",
    scoring: shared.Scoring = None,
    ctx_size: shared.CtxSize = None,
    system: System = None,
    flash_attn: FlashAttn = True,
    threads: shared.Threads = None,
) -> None:
    """Read and compress documents, and save them as a session, which `kvcompose chat --session` opens at once."""
    name, documents = shared.model_and_files(model, files, hf_repo)
    n_bytes = shared.one_budget(compression_ratio, max_kv_bytes)
    from ..chat.options import ChatOptions
    from .saved import compress_files

    options = ChatOptions(
        model=name, files=tuple(documents), compression_ratio=compression_ratio, max_kv_bytes=n_bytes, method=method,
        scoring=scoring, ctx_size=ctx_size, system=system, flash_attn=flash_attn, threads=threads,
    )  # fmt: skip
    compress_files(options, output)


def run(
    context: Annotated[Path, Option(help="Document to read and compress.")],
    question: Annotated[str, Option(help="Question to answer.")],
    model: shared.Model = None,
    hf_repo: shared.HfRepo = None,
    compression_ratio: Ratio = None,
    max_kv_bytes: shared.MaxKvBytes = None,
    method: shared.Method = "kvcompose",
    scoring: shared.Scoring = None,
    ctx_size: shared.CtxSize = None,
    n_ctx: Annotated[int | None, Option(min=1, hidden=True)] = None,
    max_tokens: Annotated[int, Option("--max-tokens", "-n", min=1, help="Length of the longest answer.")] = 256,
    flash_attn: FlashAttn = True,
    threads: shared.Threads = None,
) -> None:
    """Answer one question about a document: the old name of `kvcompose chat MODEL FILE -q QUESTION`."""
    echo(
        "hint: `kvcompose run` is now `kvcompose chat MODEL FILE -q QUESTION` and will be removed in the next version",
        err=True,
    )
    chat(
        model=shared.model_name(model, hf_repo), files=[str(context)], question=[question],
        compression_ratio=compression_ratio, max_kv_bytes=max_kv_bytes, method=method, scoring=scoring,
        ctx_size=shared.renamed("--n-ctx", n_ctx, "--ctx-size", ctx_size), max_tokens=max_tokens,
        flash_attn=flash_attn, threads=threads,
    )  # fmt: skip
