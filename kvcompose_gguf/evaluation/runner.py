"""`kvcompose eval`: the same samples for every method, ratio and type of cache; each is prefilled once."""

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
from ..methods import Method, make_method
from ..methods.base import check_positive
from ..methods.compresskv import CompressKV
from ..methods.kvcompose import KVCompose
from ..methods.unstructured import Unstructured
from ..plan import CompositionPlan, TokenMask
from ..queries import AttentionRequest, Evidence, Prefill, StateRequest
from ..run import n_ctx_trained, open_vocabulary, resolve_model
from . import metrics, suites
from .answering import Drafts, Reply, answer, answer_again
from .prompts import chat_frame, prompt_tokens
from .records import FULL, Answer, RunFolder, SampleCost
from .ruler import RULER_TASKS, TASKS, make_sample
from .samples import Sample
from .texts import load_texts
from .variants import EditedPlan, Variant

if TYPE_CHECKING:
    from ..llama import Llama

#: cache types whose rows can be weighed and written
PLAIN_TYPES = ("f32", "f16", "bf16")
#: cells beyond the context and its answer, for the queries of a scoring pass
N_SCORING = 1024


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What is evaluated.

    Attributes:
        tasks: names of ``ruler.TASKS``; ``passkey`` is apart from the means.
        n_tokens: of a whole sample, its longest answer included, a chat format not.
        n_samples: of each task.
        methods: texts for ``make_method``.
        ratios: fractions removed.
        types_kv: names of ggml types, for keys and values.
        question_seen: methods that look at the prompt's last tokens have the question among them; else it is hidden, as
            in the field's protocol. It changes nothing for methods that do not.
        chat: in the model's chat format, if it has one.
        n_depths: depths of the needles of ``passkey``.
        texts: where prose and questions come from, see ``load_texts``.
        seed: of the samples.
        max_tokens: longest answer; None: twice what the references need and 16, at most RULER's.
    Raises:
        ConfigError: an option out of its range.
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
        for name in ("tasks", "methods", "ratios", "types_kv"):  # each once
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        for name in ("n_tokens", "n_samples", "n_depths", "max_tokens"):
            check_positive(name, getattr(self, name))
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ConfigError(f"tasks={','.join(self.tasks)}: allowed are {', '.join(TASKS)}")
        wrong = [ratio for ratio in self.ratios if not 0 < ratio < 1]
        if wrong or (self.methods and not self.ratios):
            raise ConfigError(
                f"compression_ratio={wrong} are not in (0, 1), or there is none; 0, the full cache, is always there"
            )
        if not self.types_kv:
            raise ConfigError("types_kv is empty")
        for type_kv in self.types_kv:
            kv_type(type_kv)
        self.make_methods()

    def make_methods(self, model_path: Path | None = None) -> dict[str, list[Method]]:
        """One method a ratio for every text; with what they need to know about a model."""
        made = {}
        for spec in self.methods:
            for_ratio = [make_method(spec, compression_ratio=ratio, min_tokens=1) for ratio in self.ratios]
            first = for_ratio[0]
            quantized = [kv for kv in self.types_kv if kv.lower() not in PLAIN_TYPES]
            if quantized and first.simulated:
                raise ConfigError(f"method={spec!r} is simulated, which types_kv={','.join(quantized)} cannot be")
            if model_path is not None:
                first = first.for_model(model_path)
            made[spec] = [replace(first, compression_ratio=ratio) for ratio in self.ratios]
        return made


@dataclass(frozen=True)
class Job:
    """A sample to do, in a process that has the model."""

    task: str
    index: int
    type_kv: str


def kv_type(name: str) -> int:
    """The ggml type of a name such as ``"q8_0"``."""
    from gguf import GGMLQuantizationType

    try:
        return int(GGMLQuantizationType[name.upper()])
    except KeyError as error:
        raise ConfigError(f"types_kv={name!r} is no ggml type, e.g. f16 or q8_0") from error


def evaluate(
    model: str,
    options: EvalOptions,
    out: Path,
    *,
    jobs: int | None = None,
    threads: int = 1,
    console: Console | None = None,
) -> RunFolder:
    """Do what is left of the run in ``out``, or begin it.

    Args:
        jobs: processes that each load the model; None: one per core. llama.cpp's threads wait for each other at every
            step, so as many processes of one thread do more than one of as many threads.
        console: where progress is shown.
    Raises:
        ConfigError: ``out`` has a run of other settings.
    """
    model_path = resolve_model(model)
    jobs = jobs or psutil.cpu_count(logical=False) or 1
    methods = options.make_methods(model_path)  # a calibration that is missing is found before a folder is made
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
            raise StateError("a worker died, of too little memory perhaps; what is done is kept: run again") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker: Worker | None = None  # of a process of the pool


def _start_worker(model_path: Path, options: EvalOptions, threads: int) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Worker(model_path, options, threads)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next job, and hold the model, forever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(job: Job) -> tuple[SampleCost, list[Answer]]:
    assert _worker is not None
    return _worker.do(job)


class Worker:
    """A loaded model that does one sample after the other."""

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
        """Free the model."""
        if self._llama is not None:
            self._llama.close()
            self._llama = None

    def do(self, job: Job) -> tuple[SampleCost, list[Answer]]:
        """All answers to one sample."""
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
            from ..run import load_model

            self.close()
            n_ctx = 2 * self._options.n_tokens + N_SCORING  # an elastic cache: what is not used has no memory
            any_method = make_method("kvcompose", compression_ratio=0.5)  # brings the kernel that reads prompts
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
        """Requests for the attention of a prefill: the first of them brings the context into the cache."""
        asked = [(methods[0].attention_request, methods[0].state_request) for methods in self._methods.values()]
        return [request for request in asked if request[0] is not None and isinstance(request[0].queries, Prefill)]

    def _plans(
        self, llama: Llama, context: list[int], suffix: list[int], seconds: dict[str, float]
    ) -> Iterator[tuple[tuple[str, float], Plan]]:
        """Plans of all methods and ratios, in their order; equal requests are collected once, scores once a method."""
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
                if attention is None and states is None:  # all that it costs
                    seconds[spec] = elapsed
                for ratio, method in zip(self._options.ratios, self._methods[spec], strict=True):
                    plans[spec, ratio] = plan_of(method, evidence, scores)
        for spec, ratio in itertools.product(self._methods, self._options.ratios):
            yield (spec, ratio), plans[spec, ratio]


Plan = CompositionPlan | TokenMask | EditedPlan


def plan_of(method: Method, evidence: Evidence, scores: Sequence[Any]) -> Plan:
    """The method's plan; a mask or an edited plan from those that are only tried."""
    if isinstance(method, Unstructured):
        return method.mask(evidence, scores)
    return method.edited(evidence, scores) if isinstance(method, Variant) else method.plan(evidence, scores)


@contextlib.contextmanager
def compressed(llama: Llama, state: Any, plan: Plan) -> Iterator[Callable[[], None]]:
    """The full cache of ``state`` with ``plan`` applied; yields what brings it back to the end of the context."""

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
    """What counts where nothing else may be there: the first line that says something, or all of a list."""
    lines = [line for line in text.splitlines() if any(map(str.isalnum, line))]
    return lines[0] if lines and (_is_any(sample) or len(sample.references) == 1) else text


def _label(attention: AttentionRequest | None, states: StateRequest | None) -> str:
    if attention is None:
        return str(states)
    options = {k: v for k, v in asdict(attention.queries).items() if v not in ("", None, False)}
    texts = ", ".join(k if isinstance(v, (str, bool)) else f"{k}={v!r}" for k, v in options.items())
    return f"{type(attention.queries).__name__.lower()}({texts}) {attention.aggregation}"


def _settings(model_path: Path, options: EvalOptions, methods: dict[str, list[Method]]) -> dict[str, Any]:
    """What decides the answers; more samples may be added later."""
    from ..calibration import model_sha256

    with open_vocabulary(model_path) as vocabulary:
        n_ctx_train = n_ctx_trained(vocabulary)
    if n_ctx_train and options.n_tokens > n_ctx_train:
        raise ConfigError(f"n_tokens={options.n_tokens}, but {model_path.name} is for at most {n_ctx_train}")
    settings = {**asdict(options), "texts": load_texts(options.texts).name, "methods": list(options.methods)}
    del settings["n_samples"]
    measured = {_measured(made[0]) for made in methods.values() if made} - {b""}
    digests = sorted(hashlib.sha256(data).hexdigest()[:16] for data in measured)
    return {
        "model": model_path.name, "model_sha256": model_sha256(model_path), **settings, "calibrations": digests
    }  # fmt: skip


def _measured(method: Method) -> bytes:
    """What was measured of the model and decides what ``method`` keeps, or nothing."""
    if isinstance(method, CompressKV) and method.calibration is not None:
        return method.calibration.to_json().encode()
    if isinstance(method, KVCompose) and method.surrogate is not None:
        return b"".join(weights.tobytes() for weights in method.surrogate.weights)
    return b""


def _environment(jobs: int, threads: int, options: EvalOptions) -> dict[str, Any]:
    from ..environment import system

    return {**system(), "jobs": jobs, "threads": threads, "n_samples": options.n_samples}


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def quick(options: EvalOptions) -> EvalOptions:
    """A few samples of tasks that the smallest models can do: minutes, for a look and for tests."""
    return replace(
        options, tasks=("niah_single_1", "niah_single_2", "passkey"), n_tokens=1024, n_samples=2,
        methods=suites.SUITES["quick"], ratios=(0.5, 0.75),
    )  # fmt: skip
