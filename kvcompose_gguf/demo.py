"""What ``kvcompose demo`` and ``kvcompose run`` do: questions about a text, to a full and to a compressed cache."""

from __future__ import annotations

import dataclasses
import importlib.resources
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import models
from .errors import ConfigError, ContextLengthError
from .methods.kvcompose import KVCompose
from .report import KVReport

if TYPE_CHECKING:
    from .llama import Llama

MODEL = "smollm2"
N_CTX = 4096
N_ANSWER = 12  # tokens: the fact comes first, and after it a model of this size begins to repeat itself

#: prompt tokens that a chat template may put around a question
_N_TEMPLATE = 64


@dataclass(frozen=True)
class Question:
    """The beginning of a sentence, and what has to occur in its continuation for it to be right.

    Sentences to finish, not questions: a model of 135M parameters copies well and reasons badly.
    """

    prompt: str
    expected: str

    def is_answered_by(self, answer: str) -> bool:
        """Whether ``answer`` has the expected words, in upper or lower case."""
        return self.expected.lower() in answer.lower()


#: in the order of the document; chosen so that the model knows most of them from a full cache
QUESTIONS = (
    Question("The supply boat is called the", "Marigold"),
    Question("The observatory was founded in the year", "1887"),
    Question("The first keeper of the observatory was", "Agnes Thorvald"),
    Question("The lens was ground in the city of", "Utrecht"),
    Question("The radio call sign of the station is", "Yellow Lantern"),
    Question("The dog on the island is called", "Biscuit"),
    Question("The library holds exactly", "3,412"),
    Question("The comet found by Jonas Reed was named", "Reed's Feather"),
    Question("The plates of the sky survey are stored in the", "salt cellar"),
    Question("The copper sheets of the dome were renewed by a firm from", "Lisbon"),
)


@dataclass(frozen=True)
class Answers:
    """One round of all questions.

    Attributes:
        texts: the model's answers, in the order of the questions.
        seconds: wall time of all of them, without reading the document.
        n_bytes_kv: bytes allocated for the KV cache at the end.
        n_bytes_rss: memory of the process at the end.
    """

    texts: tuple[str, ...]
    seconds: float
    n_bytes_kv: int
    n_bytes_rss: int

    def right(self, questions: Sequence[Question]) -> list[bool]:
        """Which of the ``questions`` these answers are right for."""
        return [question.is_answered_by(text) for question, text in zip(questions, self.texts, strict=True)]


@dataclass(frozen=True, eq=False)
class DemoResult:
    """The same questions to a full and to a compressed cache; ``prefill_seconds`` is reading the document, once."""

    questions: tuple[Question, ...]
    prefill_seconds: float
    full: Answers
    compressed: Answers
    report: KVReport


@dataclass(frozen=True, eq=False)
class RunResult:
    """An answer from a compressed cache; ``report`` is None if the text was too short to be compressed."""

    answer: str
    report: KVReport | None
    n_ctx: int


def document() -> str:
    """The demo's text: a made-up report in English, about 2,600 SmolLM2 tokens."""
    return importlib.resources.files("kvcompose_gguf").joinpath("data/observatory.md").read_text("utf-8").strip()


def demo(compression_ratio: float = 0.75, threads: int | None = None) -> DemoResult:
    """Fetch the model, run the comparison and print it."""
    method = KVCompose(compression_ratio=compression_ratio)  # a wrong ratio is found before a download
    console = Console()
    result = run_demo(models.fetch(MODEL), method, threads=threads, console=console)
    print_demo(result, console)
    return result


def run_demo(
    model_path: Path,
    method: KVCompose,
    *,
    questions: Sequence[Question] = QUESTIONS,
    text: str | None = None,
    threads: int | None = None,
    console: Console | None = None,
) -> DemoResult:
    """Ask ``questions`` about ``text``, greedily, before and after its cache is compressed.

    Args:
        text: the demo's own document by default.
        console: where progress is shown, if it is a terminal; None: nowhere.
    """
    console = console or Console(quiet=True)
    text = document() if text is None else text
    with console.status("loading the model") as status:
        llm = load_model(model_path, N_CTX, method, threads=threads)
        try:
            status.update("reading the document")
            llm.kv_compressor = None
            _, prefill_seconds = _timed_completion(llm, text, 1)
            full = _ask(llm, text, questions, lambda n: status.update(f"full cache: {n}"))
            status.update("compressing the cache")
            llm.kv_compressor = method
            report = llm.compress(text)
            compressed = _ask(llm, text, questions, lambda n: status.update(f"compressed cache: {n}"))
        finally:
            llm.close()
    return DemoResult(tuple(questions), prefill_seconds, full, compressed, report)


def run(
    model: str,
    context_file: Path,
    question: str,
    compression_ratio: float,
    *,
    n_ctx: int | None = None,
    max_tokens: int = 256,
    flash_attn: bool = True,
    threads: int | None = None,
) -> RunResult:
    """Answer one question about a file from a compressed cache and print answer, report and layers."""
    console = Console()
    method = KVCompose(compression_ratio=compression_ratio)
    context = read_context(context_file)
    model_path = resolve_model(model)
    with console.status("reading and compressing the context"):
        result = answer_question(
            model_path, context, question, method,
            n_ctx=n_ctx, max_tokens=max_tokens, flash_attn=flash_attn, threads=threads,
        )  # fmt: skip
    console.print(Text(result.answer), soft_wrap=True)
    console.print()
    if result.report is None:
        console.print(f"The context has fewer than {method.min_tokens} tokens and was not compressed.", style="yellow")
    else:
        console.print(Text(str(result.report)))
        console.print(layer_bars(result.report))
    return result


def answer_question(
    model_path: Path,
    context: str,
    question: str,
    method: KVCompose,
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
            answer, _ = _timed_completion(llm, f"{context}\n\nQuestion: {question}\nAnswer:", max_tokens)
        return RunResult(answer.strip(), llm.kv_report, n_ctx)
    finally:
        llm.close()


def load_model(
    model_path: Path, n_ctx: int, method: KVCompose, *, flash_attn: bool = True, threads: int | None = None
) -> Llama:
    """A quiet ``Llama``; ``threads=None`` leaves their number to llama-cpp-python.

    Raises:
        ConfigError: llama.cpp cannot load the file.
    """
    from .llama import Llama

    options = {} if threads is None else {"n_threads": threads, "n_threads_batch": threads}
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


def token_counts(model_path: Path, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, from the model's vocabulary alone: its weights are not read.

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
    try:
        return [len(vocabulary.tokenize(text.encode(), False, True)) for text in texts]
    finally:
        vocabulary.close()


def print_demo(result: DemoResult, console: Console) -> None:
    """Answers side by side, layers, memory and time."""
    console.print(answer_table(result))
    console.print(layer_bars(result.report))
    console.print(cost_table(result))


def answer_table(result: DemoResult) -> Table:
    """A row per question, with both answers and whether they are right, and the counts below."""
    table = Table(show_footer=True, expand=True)
    rounds = {"full cache": result.full, f"{result.report.compression_ratio:.0%} removed": result.compressed}
    table.add_column("the sentence to finish", ratio=4)
    for title, answers in rounds.items():
        right = answers.right(result.questions)
        table.add_column(title, f"{sum(right)} of {len(right)} right", ratio=3)
    for i, question in enumerate(result.questions):
        cells = [_marked(answers.texts[i], question) for answers in rounds.values()]
        table.add_row(f"{question.prompt} …", *cells)
    return table


def layer_bars(report: KVReport) -> Table:
    """Tokens that every layer keeps, as horizontal bars on the scale of the whole context."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(justify="right")
    table.add_column(ratio=1)
    table.add_column(justify="right")
    table.add_row("layer", Text(f"of {report.n_tokens} tokens"), "kept", style="dim")
    for il, n_kept in enumerate(report.n_kept.tolist()):
        table.add_row(str(il), Bar(report.n_tokens, 0, n_kept, color="cyan"), str(n_kept))
    return table


def cost_table(result: DemoResult) -> Table:
    """Bytes and seconds of both rounds."""
    report, full, compressed = result.report, result.full, result.compressed
    n_questions = len(result.questions)
    table = Table("", "full cache", "compressed", caption="allocated: with the room for new tokens", expand=True)
    table.add_row("document in the KV cache", _megabytes(report.kv_bytes_full), _megabytes(report.kv_bytes_kept))
    table.add_row("KV cache allocated", _megabytes(full.n_bytes_kv), _megabytes(compressed.n_bytes_kv))
    table.add_row("process memory (RSS)", _megabytes(full.n_bytes_rss), _megabytes(compressed.n_bytes_rss))
    table.add_row(f"reading {report.n_tokens} tokens, once", f"{result.prefill_seconds:.1f} s", "")
    table.add_row("compressing", "", f"{report.score_seconds + report.plan_seconds + report.compose_seconds:.1f} s")
    table.add_row(f"{n_questions} answers", f"{full.seconds:.1f} s", f"{compressed.seconds:.1f} s")
    return table


def _ask(llm: Llama, text: str, questions: Sequence[Question], show: Callable[[str], None]) -> Answers:
    """All ``questions`` about ``text``, which is in the cache already; ``show`` is told the number of each."""
    answers, seconds = [], 0.0
    for i, question in enumerate(questions):
        show(f"question {i + 1} of {len(questions)}")
        answer, elapsed = _timed_completion(llm, f"{text}\n\n{question.prompt}", N_ANSWER)
        answers.append(answer.strip())
        seconds += elapsed
    return Answers(tuple(answers), seconds, llm.kv_bytes, psutil.Process().memory_info().rss)


def _timed_completion(llm: Llama, prompt: str, max_tokens: int) -> tuple[str, float]:
    """The greedy continuation of ``prompt`` up to the end of the line, and its seconds."""
    start = time.perf_counter()
    output = llm.create_completion(prompt, max_tokens=max_tokens, temperature=0, stop=["\n"])
    return output["choices"][0]["text"], time.perf_counter() - start


def _marked(answer: str, question: Question) -> Text:
    right = question.is_answered_by(answer)
    return Text("✓ " if right else "✗ ", style="green" if right else "red").append(answer, style="default")


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"
