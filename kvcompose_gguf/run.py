"""What ``kvcompose run`` does: one question about a file, answered from a compressed cache."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from . import models
from .errors import ConfigError, ContextLengthError
from .methods import Method, make_method
from .report import KVReport
from .tables import layer_bars

if TYPE_CHECKING:
    from .llama import Llama

#: prompt tokens that a chat template may put around a question
_N_TEMPLATE = 64


@dataclass(frozen=True, eq=False)
class RunResult:
    """An answer from a compressed cache; ``report`` is None if the text was too short to be compressed."""

    answer: str
    report: KVReport | None
    n_ctx: int


def run(
    model: str,
    context_file: Path,
    question: str,
    compression_ratio: float,
    *,
    method: str = "kvcompose",
    n_ctx: int | None = None,
    max_tokens: int = 256,
    flash_attn: bool = True,
    threads: int | None = None,
) -> RunResult:
    """Answer one question about a file from a compressed cache and print answer, report and layers.

    Args:
        method: a text for ``make_method``.
    """
    console = Console()
    compressor = make_method(method, compression_ratio=compression_ratio)
    context = read_context(context_file)
    model_path = resolve_model(model)
    with console.status("reading and compressing the context"):
        result = answer_question(
            model_path, context, question, compressor,
            n_ctx=n_ctx, max_tokens=max_tokens, flash_attn=flash_attn, threads=threads,
        )  # fmt: skip
    console.print(Text(result.answer), soft_wrap=True)
    console.print()
    if result.report is None:
        least = compressor.min_tokens
        console.print(f"The context has fewer than {least} tokens and was not compressed.", style="yellow")
    else:
        console.print(Text(str(result.report)))
        console.print(layer_bars(result.report))
    return result


def answer_question(
    model_path: Path,
    context: str,
    question: str,
    method: Method,
    *,
    n_ctx: int | None = None,
    max_tokens: int = 256,
    flash_attn: bool = True,
    threads: int | None = None,
) -> RunResult:
    """Answer ``question`` about ``context`` greedily; only the context is compressed.

    A model with a chat template gets both as one user message, another one as a text to continue.

    Args:
        n_ctx: None: enough for the context, the question and ``max_tokens``, rounded up to 256.
    Raises:
        ConfigError: llama.cpp cannot load the model.
        ContextLengthError: the prompt does not fit into ``n_ctx``.
    """
    n_context, n_question = token_counts(model_path, [context, question])
    n_prompt = n_context + n_question + _N_TEMPLATE
    if n_ctx is None:
        n_ctx = -(-(n_prompt + max_tokens) // 256) * 256
    elif n_ctx <= n_prompt:
        raise ContextLengthError(f"n_ctx={n_ctx} is too small, context and question may need {n_prompt} and an answer")

    # everything from the question on stays uncompressed
    method = dataclasses.replace(method, keep_last=n_question + _N_TEMPLATE // 2)
    llm = load_model(model_path, n_ctx, method, flash_attn=flash_attn, threads=threads)
    try:
        if "tokenizer.chat_template" in llm.metadata:
            messages = [{"role": "user", "content": f"{context}\n\n{question}"}]
            output = llm.create_chat_completion(messages, max_tokens=max_tokens, temperature=0)
            answer = output["choices"][0]["message"]["content"] or ""
        else:
            answer, _ = timed_completion(llm, f"{context}\n\nQuestion: {question}\nAnswer:", max_tokens)
        return RunResult(answer.strip(), llm.kv_report, n_ctx)
    finally:
        llm.close()


def load_model(
    model_path: Path,
    n_ctx: int,
    method: Method,
    *,
    flash_attn: bool = True,
    threads: int | None = None,
    **options: Any,
) -> Llama:
    """A quiet ``Llama`` with more ``options`` of its own; ``threads=None`` leaves their number to llama-cpp-python.

    Raises:
        ConfigError: llama.cpp cannot load the file.
    """
    from .llama import Llama

    if threads is not None:
        options |= {"n_threads": threads, "n_threads_batch": threads}
    try:
        return Llama(
            str(model_path), n_ctx=n_ctx, flash_attn=flash_attn, kv_compressor=method, verbose=False, **options
        )
    except ConfigError:
        raise
    except ValueError as error:  # the bindings' only exception for a file or a context that llama.cpp refused
        raise ConfigError(f"{model_path} cannot be used: {error}") from error


def resolve_model(model: str) -> Path:
    """The file ``model``, or the fetched model of that name.

    Raises:
        ConfigError: neither.
        DownloadError: it could not be fetched.
    """
    if Path(model).is_file():
        return Path(model)
    if model in models.names():
        return models.fetch(model)
    raise ConfigError(f"model={model!r} is neither a file nor one of {', '.join(models.names())}")


def read_context(file: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        ConfigError: it cannot be read, is not UTF-8 or is empty.
    """
    try:
        text = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"context={str(file)!r} cannot be read: {error}") from error
    if not text:
        raise ConfigError(f"context={str(file)!r} is empty")
    return text


@contextlib.contextmanager
def open_vocabulary(model_path: Path) -> Iterator[Any]:
    """The bindings' ``LlamaModel`` with the vocabulary and metadata alone: its weights are not read.

    Raises:
        ConfigError: llama.cpp cannot load the file.
    """
    from .native import library

    llama_cpp = library.load()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    try:
        vocabulary = llama_cpp._internals.LlamaModel(path_model=str(model_path), params=params, verbose=False)
    except ValueError as error:
        raise ConfigError(f"{model_path} cannot be used: {error}") from error
    with contextlib.closing(vocabulary):
        yield vocabulary


def n_ctx_trained(vocabulary: Any) -> int:
    """Tokens that the model of an opened vocabulary was made for, 0 if its file does not say."""
    # n_ctx_train() is 0 without the weights: llama-model.cpp, load_hparams, returns before it
    metadata = vocabulary.metadata()
    return int(metadata.get(f"{metadata.get('general.architecture')}.context_length", 0))


def token_counts(model_path: Path, texts: Sequence[str]) -> list[int]:
    """Tokens of each text.

    Raises:
        ConfigError: llama.cpp cannot load the file.
    """
    with open_vocabulary(model_path) as vocabulary:
        return [len(vocabulary.tokenize(text.encode(), False, True)) for text in texts]


def timed_completion(llm: Llama, prompt: str, max_tokens: int) -> tuple[str, float]:
    """The greedy continuation of ``prompt`` up to the end of the line, and its seconds."""
    start = time.perf_counter()
    output = llm.create_completion(prompt, max_tokens=max_tokens, temperature=0, stop=["\n"])
    return output["choices"][0]["text"], time.perf_counter() - start
