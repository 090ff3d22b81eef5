"""Runs samples with a loaded model: reads each once, and answers from the cache of every method and ratio."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..load import load_model
from ..methods import Method
from ..support.timing import timed
from ..tasks.answering import Drafts, answer, answer_again
from ..tasks.prompts import chat_frame, prompt_tokens, sample_for
from ..tasks.samples import Sample
from ..tasks.texts import load_texts
from .grading import Grader
from .options import EvalOptions, kv_types
from .records import Answer, SampleCost
from .trials import compressed, make_trials

if TYPE_CHECKING:
    from ..llama import Llama

#: cells beyond the context and its answer, for the queries of a scoring pass
N_SCORING = 1024


@dataclass(frozen=True)
class SampleJob:
    """A sample to run in a process that has loaded the model."""

    task: str
    index: int
    type_kv: str


class SampleWorker:
    """A loaded model that runs samples one after the other."""

    def __init__(self, model_path: Path, options: EvalOptions, threads: int, methods: dict[str, list[Method]]) -> None:
        self._model_path = model_path
        self._options = options
        self._threads = threads
        self._texts = load_texts(options.texts)
        self._llama: Llama | None = None
        self._type_kv = ""
        self._frame = ("", "")
        self._methods = methods

    def close(self) -> None:
        """Frees the model."""
        if self._llama is not None:
            self._llama.close()
            self._llama = None

    def do(self, job: SampleJob) -> tuple[SampleCost, list[Answer]]:
        """Runs one sample; returns its cost and all its answers."""
        start = time.perf_counter()
        llama = self._load(job.type_kv)
        sample = self._sample(llama, job)
        context, question = prompt_tokens(llama, sample, self._frame)
        max_tokens = self._max_tokens(llama, sample)

        llama.reset()
        seen = question if self._options.question_seen else []
        trials = make_trials(llama, self._methods, self._options.ratios, context, seen)
        state = llama.save_state()
        full, seconds = timed(lambda: answer(llama, question, max_tokens))
        grader = Grader(sample, job.type_kv, llama.kv_layers, len(context), full)
        answers, drafts = [grader.of_full(seconds)], Drafts()
        for (spec, ratio), trial in trials.by_method.items():
            begin = time.perf_counter()
            with compressed(llama, state, trial) as restore:
                reply = answer_again(llama, question, max_tokens, full, restore, drafts)
            drafts.add(reply.choices)
            answers.append(grader.of_trial(spec, ratio, trial, reply, time.perf_counter() - begin))
        return SampleCost(
            sample.task, sample.index, job.type_kv, len(context), trials.prefill_seconds, trials.scoring_seconds,
            time.perf_counter() - start,
        ), answers  # fmt: skip

    def _load(self, type_kv: str) -> Llama:
        if self._llama is None or self._type_kv != type_kv:
            self.close()
            n_ctx = 2 * self._options.n_tokens + N_SCORING  # the cache is elastic: unused cells take no memory
            of_keys, of_values = kv_types(type_kv)
            self._llama = load_model(
                self._model_path, n_ctx, fast_attention=True, threads=self._threads, type_k=of_keys, type_v=of_values
            )
            self._type_kv = type_kv
            self._frame = chat_frame(self._llama) if self._options.chat else ("", "")
        return self._llama

    def _sample(self, llama: Llama, job: SampleJob) -> Sample:
        options = self._options
        depth = (job.index % options.n_depths) / max(1, options.n_depths - 1) if job.task == "passkey" else None
        return sample_for(llama, job.task, options.n_tokens, job.index, options.seed, self._texts, depth)

    def _max_tokens(self, llama: Llama, sample: Sample) -> int:
        if self._options.max_tokens is not None:
            return self._options.max_tokens
        counts = [len(llama.tokenize(f" {text}, ".encode(), add_bos=False)) for text in sample.references]
        return min(sample.max_tokens, 16 + 2 * (max(counts) if sample.any_of else sum(counts)))
