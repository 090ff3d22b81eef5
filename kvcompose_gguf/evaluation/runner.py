"""`kvcompose eval`: runs the same samples with every method, ratio and cache type, each prefilled once per type."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import ConfigError, StateError
from ..load import n_ctx_trained, open_vocabulary, resolve_model
from ..methods import Method, make_method
from ..methods.base import check_positive
from ..methods.compresskv import CompressKV
from ..methods.kvcompose import KVCompose
from ..methods.unstructured import Unstructured
from ..plan.composition import CompositionPlan, TokenMask
from ..scoring.evidence import Evidence
from ..scoring.requests import AttentionRequest, StateRequest
from ..tasks.answering import Drafts, Reply, answer, answer_again
from ..tasks.prompts import chat_frame, prompt_tokens
from ..tasks.ruler import RULER_TASKS, TASKS, make_sample
from ..tasks.samples import Sample
from ..tasks.texts import load_texts
from . import metrics, suites
from .records import FULL, Answer, RunFolder, SampleCost
from .variants import EditedPlan, Variant

if TYPE_CHECKING:
    from ..llama import Llama

#: cache types that allow per-cell biases and writes
PLAIN_TYPES = ("f32", "f16", "bf16")
#: cells beyond the context and its answer, for the queries of a scoring pass
N_SCORING = 1024


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of an evaluation.

    Attributes:
        tasks: names in ``ruler.TASKS``; ``passkey`` is reported separately from the means.
        n_tokens: length of a sample including its longest answer, without the chat format.
        n_samples: samples per task.
        methods: texts for ``make_method``.
        ratios: fractions removed.
        types_kv: names of ggml types, for keys and values.
        question_seen: append the question to the prompt that the methods read. By default it is hidden, as in the
            field's protocol. Only methods that read the last tokens of the prompt are affected.
        chat: use the model's chat format, if it has one.
        n_depths: number of needle depths in ``passkey``.
        texts: source of prose and questions, see ``load_texts``.
        seed: seed of the samples.
        max_tokens: longest answer. None: twice the tokens of the references plus 16, at most RULER's limit.
    Raises:
        ConfigError: an option is out of range.
    """

    tasks: tuple[str, ...] = RULER_TASKS
    n_tokens: int = 2048
    n_samples: int = 20
    methods: tuple[str, ...] = suites.SUITES["baselines"]
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75, 0.875, 0.9375)
    types_kv: tuple[str, ...] = ("f16",)
    question_seen: bool = False
    chat: bool = True
    n_depths: int = 5
    texts: str = "auto"
    seed: int = 0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("tasks", "methods", "ratios", "types_kv"):  # each value once
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        for name in ("n_tokens", "n_samples", "n_depths", "max_tokens"):
            check_positive(name, getattr(self, name))
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ConfigError(f"tasks={','.join(self.tasks)}; allowed: {', '.join(TASKS)}")
        wrong = [ratio for ratio in self.ratios if not 0 < ratio < 1]
        if wrong or (self.methods and not self.ratios):
            raise ConfigError(f"compression_ratio={wrong}: give one or more in (0, 1); 0 is always included")
        if not self.types_kv:
            raise ConfigError("types_kv is empty")
        for type_kv in self.types_kv:
            kv_type(type_kv)
        self.make_methods()

    def make_methods(self, model_path: Path | None = None) -> dict[str, list[Method]]:
        """Returns one method per ratio for every text, calibrated for ``model_path`` if it is given."""
        made = {}
        for spec in self.methods:
            for_ratio = [make_method(spec, compression_ratio=ratio, min_tokens=1) for ratio in self.ratios]
            first = for_ratio[0]
            quantized = [kv for kv in self.types_kv if kv.lower() not in PLAIN_TYPES]
            if quantized and first.simulated:
                raise ConfigError(f"method={spec!r} is simulated, not for types_kv={','.join(quantized)}")
            if model_path is not None:
                first = first.for_model(model_path)
            made[spec] = [replace(first, compression_ratio=ratio) for ratio in self.ratios]
        return made


@dataclass(frozen=True)
class Job:
    """A sample to run in a process that has loaded the model."""

    task: str
    index: int
    type_kv: str


def kv_type(name: str) -> int:
    """Returns the ggml type for a name such as ``"q8_0"``."""
    from gguf import GGMLQuantizationType

    try:
        return int(GGMLQuantizationType[name.upper()])
    except KeyError as error:
        raise ConfigError(f"types_kv={name!r} is not a ggml type; use for example f16 or q8_0") from error


def evaluate(
    model: str,
    options: EvalOptions,
    out: Path,
    *,
    jobs: int | None = None,
    threads: int = 1,
    console: Console | None = None,
) -> RunFolder:
    """Starts the run in ``out``, or finishes it; returns its folder.

    Args:
        jobs: number of processes, each with its own copy of the model; None: one per core. llama.cpp's threads wait for
            each other at every step, so many one-thread processes are faster than one process with many threads.
        console: where to show progress.
    Raises:
        ConfigError: ``out`` contains a run with other settings.
    """
    model_path = resolve_model(model)
    jobs = jobs or psutil.cpu_count(logical=False) or 1
    methods = options.make_methods(model_path)  # a missing calibration must raise before the folder is created
    settings = _settings(model_path, options, methods)
    folder = RunFolder.open(out, settings, _environment(jobs, threads, options))
    done = folder.done()
    everything = dict.fromkeys(itertools.product(options.types_kv, range(options.n_samples), options.tasks))
    left = [Job(task, index, kv) for kv, index, task in everything if (task, index, kv) not in done]
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console or Console(stderr=True)) as progress:
        bar = progress.add_task("samples", total=len(left) + len(done), completed=len(done))
        for cost, answers in _work(model_path, options, left, jobs, threads):
            folder.add(cost, answers)
            progress.advance(bar)
    return folder


def _work(
    model_path: Path, options: EvalOptions, left: Sequence[Job], jobs: int, threads: int
) -> Iterator[tuple[SampleCost, list[Answer]]]:
    if jobs == 1 or len(left) == 1:
        worker = Worker(model_path, options, threads)
        with contextlib.closing(worker):
            yield from map(worker.do, left)
        return
    with ProcessPoolExecutor(
        min(jobs, max(1, len(left))), get_context("spawn"), _start_worker, (model_path, options, threads)
    ) as pool:
        try:
            for future in as_completed([pool.submit(_do, job) for job in left]):
                yield future.result()
        except BrokenProcessPool as error:
            raise StateError("a worker died, perhaps for lack of memory; run again to continue") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker: Worker | None = None  # the worker of this process, in a process pool


def _start_worker(model_path: Path, options: EvalOptions, threads: int) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Worker(model_path, options, threads)


def _end_with_parent() -> None:
    """Ends this process when its parent dies; otherwise it would wait for its next job forever and hold the model."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(job: Job) -> tuple[SampleCost, list[Answer]]:
    assert _worker is not None
    return _worker.do(job)


class Worker:
    """A loaded model that runs samples one after the other."""

    def __init__(self, model_path: Path, options: EvalOptions, threads: int) -> None:
        self._model_path = model_path
        self._options = options
        self._threads = threads
        self._texts = load_texts(options.texts)
        self._llama: Llama | None = None
        self._type_kv = ""
        self._frame = ("", "")
        self._methods = options.make_methods(model_path)

    def close(self) -> None:
        """Frees the model."""
        if self._llama is not None:
            self._llama.close()
            self._llama = None

    def do(self, job: Job) -> tuple[SampleCost, list[Answer]]:
        """Runs one sample; returns its cost and all its answers."""
        start = time.perf_counter()
        llama = self._load(job.type_kv)
        options = self._options
        depth = (job.index % options.n_depths) / max(1, options.n_depths - 1) if job.task == "passkey" else None
        sample = make_sample(
            job.task, options.n_tokens, job.index, options.seed,
            lambda text: len(llama.tokenize(text.encode(), add_bos=False)), self._texts, depth=depth,
        )  # fmt: skip
        context, question = prompt_tokens(llama, sample, self._frame)
        max_tokens = self._max_tokens(llama, sample)

        llama.reset()
        scoring_seconds: dict[str, float] = {}
        prefill_seconds = 0.0
        if not self._scored_prefills():
            _, prefill_seconds = _timed(lambda: llama.prefill(context))
        plans = dict(self._plans(llama, context, question if options.question_seen else [], scoring_seconds))
        prefill_seconds = prefill_seconds or next(iter(scoring_seconds.values()))
        state = llama.save_state()

        def grade(method: str, ratio: float, reply: Reply, full: Reply, seconds: float, plan: Plan | None) -> Answer:
            n_kept = np.full(len(llama.kv_layers), len(context)) if plan is None else plan.n_kept
            rows = [float(n) * layer.n_bytes_row for n, layer in zip(n_kept, llama.kv_layers, strict=True)]
            return Answer(
                sample.task, sample.index, job.type_kv, method, ratio,
                score=metrics.METRICS[sample.metric](reply.text, sample.references),
                exact=metrics.exact_match(_answer(reply.text, sample), sample.references, any_of=_is_any(sample)),
                kl=float(metrics.kl_divergence(full.logits, reply.logits).mean()),
                same_top=float(metrics.same_top(full.logits, reply.logits).mean()),
                depth=sample.depth, n_tokens=len(context), n_kept=tuple(round(float(n)) for n in n_kept),
                kv_bytes=round(sum(rows)), seconds=seconds, answer=reply.text,
            )  # fmt: skip

        full, seconds = _timed(lambda: answer(llama, question, max_tokens))
        answers, drafts = [grade(FULL, 0.0, full, full, seconds, None)], Drafts()
        for (spec, ratio), plan in plans.items():
            begin = time.perf_counter()
            with compressed(llama, state, plan) as restore:
                reply = answer_again(llama, question, max_tokens, full, restore, drafts)
            drafts.add(reply.choices)
            answers.append(grade(spec, ratio, reply, full, time.perf_counter() - begin, plan))
        total = time.perf_counter() - start
        return SampleCost(
            sample.task, sample.index, job.type_kv, len(context), prefill_seconds, scoring_seconds, total
        ), answers  # fmt: skip

    def _load(self, type_kv: str) -> Llama:
        if self._llama is None or self._type_kv != type_kv:
            from ..load import load_model

            self.close()
            n_ctx = 2 * self._options.n_tokens + N_SCORING  # the cache is elastic: unused cells take no memory
            any_method = make_method("kvcompose", compression_ratio=0.5)  # enables the kernel that scores prompts
            kind = kv_type(type_kv)
            self._llama = load_model(
                self._model_path, n_ctx, any_method, threads=self._threads, type_k=kind, type_v=kind
            )
            self._type_kv = type_kv
            self._frame = chat_frame(self._llama) if self._options.chat else ("", "")
        return self._llama

    def _max_tokens(self, llama: Llama, sample: Sample) -> int:
        if self._options.max_tokens is not None:
            return self._options.max_tokens
        counts = [len(llama.tokenize(f" {text}, ".encode(), add_bos=False)) for text in sample.references]
        return min(sample.max_tokens, 16 + 2 * (max(counts) if _is_any(sample) else sum(counts)))

    def _scored_prefills(self) -> list[tuple[AttentionRequest | None, StateRequest | None]]:
        """Returns the requests for attention of a prefill; the first of them also fills the cache with the context."""
        asked = [(methods[0].attention_request, methods[0].state_request) for methods in self._methods.values()]
        return [request for request in asked if request[0] is not None and request[0].queries.scores_while_reading]

    def _plans(
        self, llama: Llama, context: list[int], suffix: list[int], seconds: dict[str, float]
    ) -> Iterator[tuple[tuple[str, float], Plan]]:
        """Yields the plans of all methods and ratios in order; collects each request, and scores each method, once."""
        requests: dict[tuple[AttentionRequest | None, StateRequest | None], list[str]] = {}
        for spec, methods in self._methods.items():
            requests.setdefault((methods[0].attention_request, methods[0].state_request), []).append(spec)
        plans: dict[tuple[str, float], Plan] = {}
        for attention, states in sorted(requests, key=lambda request: request not in self._scored_prefills()):
            specs = requests[attention, states]
            evidence, elapsed = _timed(partial(llama.observe, context, self._methods[specs[0]][0], suffix))
            if attention is not None or states is not None:
                seconds[_label(attention, states)] = elapsed
            for spec in specs:
                scores, elapsed = _timed(partial(self._methods[spec][0].scores, evidence))
                if attention is None and states is None:  # scoring is the method's only cost
                    seconds[spec] = elapsed
                for ratio, method in zip(self._options.ratios, self._methods[spec], strict=True):
                    plans[spec, ratio] = plan_of(method, evidence, scores)
        for spec, ratio in itertools.product(self._methods, self._options.ratios):
            yield (spec, ratio), plans[spec, ratio]


Plan = CompositionPlan | TokenMask | EditedPlan


def plan_of(method: Method, evidence: Evidence, scores: Sequence[Any]) -> Plan:
    """Returns the method's plan; a mask or an edited plan for methods that exist only for evaluation."""
    if isinstance(method, Unstructured):
        return method.mask(evidence, scores)
    return method.edited(evidence, scores) if isinstance(method, Variant) else method.plan(evidence, scores)


@contextlib.contextmanager
def compressed(llama: Llama, state: Any, plan: Plan) -> Iterator[Callable[[], None]]:
    """Loads the full cache of ``state`` and applies ``plan``; yields a function that restores this state."""

    def restore() -> None:
        llama.load_state(state)
        if isinstance(plan, CompositionPlan):
            llama.compose(plan)
        elif isinstance(plan, EditedPlan):
            llama.compose(plan.plan)
            llama.write_values(plan.values)

    restore()
    biases = plan.biases() if isinstance(plan, TokenMask) else plan.biases if isinstance(plan, EditedPlan) else []
    with llama.session.biased(biases) if len(biases) else contextlib.nullcontext():
        yield restore


def _is_any(sample: Sample) -> bool:
    return sample.metric == "string_match_part"


def _answer(text: str, sample: Sample) -> str:
    """Returns the part of ``text`` that exact match reads: the first line with a word, or all of a list."""
    lines = [line for line in text.splitlines() if any(map(str.isalnum, line))]
    return lines[0] if lines and (_is_any(sample) or len(sample.references) == 1) else text


def _label(attention: AttentionRequest | None, states: StateRequest | None) -> str:
    return str(states) if attention is None else attention.label


def _settings(model_path: Path, options: EvalOptions, methods: dict[str, list[Method]]) -> dict[str, Any]:
    """Returns the settings that decide the answers; without ``n_samples``, because a later run may add samples."""
    from ..measurements.calibration import model_sha256

    with open_vocabulary(model_path) as vocabulary:
        n_ctx_train = n_ctx_trained(vocabulary)
    if n_ctx_train and options.n_tokens > n_ctx_train:
        raise ConfigError(f"n_tokens={options.n_tokens}, but {model_path.name} was trained for at most {n_ctx_train}")
    settings = {**asdict(options), "texts": load_texts(options.texts).name, "methods": list(options.methods)}
    del settings["n_samples"]
    measured = {_measured(made[0]) for made in methods.values() if made} - {b""}
    digests = sorted(hashlib.sha256(data).hexdigest()[:16] for data in measured)
    return {
        "model": model_path.name, "model_sha256": model_sha256(model_path), **settings, "calibrations": digests
    }  # fmt: skip


def _measured(method: Method) -> bytes:
    """Returns the measurements of the model that decide which tokens ``method`` keeps, or nothing."""
    if isinstance(method, CompressKV) and method.calibration is not None:
        return method.calibration.to_json().encode()
    if isinstance(method, KVCompose) and method.surrogate is not None:
        return b"".join(weights.tobytes() for weights in method.surrogate.weights)
    return b""


def _environment(jobs: int, threads: int, options: EvalOptions) -> dict[str, Any]:
    from ..native.environment import system

    return {**system(), "jobs": jobs, "threads": threads, "n_samples": options.n_samples}


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def quick(options: EvalOptions) -> EvalOptions:
    """Returns options for a few samples of tasks that the smallest models can solve; takes minutes."""
    return replace(
        options, tasks=("niah_single_1", "niah_single_2", "passkey"), n_tokens=1024, n_samples=2,
        methods=suites.SUITES["quick"], ratios=(0.5, 0.75),
    )  # fmt: skip
