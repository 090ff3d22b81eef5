"""Plans every method at every ratio from one reading of a context, and applies the results to its cache."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..compression import compress
from ..methods import Method
from ..plan.trial import Trial
from ..reading import first_part
from ..scoring.requests import AttentionRequest, StateRequest
from ..support.timing import timed

if TYPE_CHECKING:
    from ..llama import Llama


class Request(NamedTuple):
    """What a method asks for; methods with equal requests share their evidence."""

    attention: AttentionRequest | None
    states: StateRequest | None

    @classmethod
    def of(cls, method: Method) -> Request:
        """Returns the request of ``method``."""
        return cls(method.attention_request, method.state_request)

    @property
    def label(self) -> str:
        """Returns the request for reports; empty: nothing is asked for."""
        asked = self.attention or self.states
        return asked.label if asked else ""

    @property
    def scores_while_reading(self) -> bool:
        """Returns whether collecting it evaluates the whole context, so that it needs no prefill before."""
        return self.attention is not None and self.attention.queries.scores_while_reading


@dataclass(frozen=True, eq=False)
class Trials:
    """What all methods make of one context.

    Attributes:
        by_method: the trial of every (method, ratio), in order.
        prefill_seconds: wall time of reading the context.
        scoring_seconds: wall time of each request by its label, and of methods that request nothing by their names.
    """

    by_method: dict[tuple[str, float], Trial]
    prefill_seconds: float
    scoring_seconds: dict[str, float]


def make_trials(
    llama: Llama,
    methods: Mapping[str, Sequence[Method]],
    ratios: Sequence[float],
    context: list[int],
    suffix: Sequence[int] = (),
) -> Trials:
    """Reads ``context`` into an empty cache; collects each request, and scores each method, once.

    A method that composes the cache while it reads this context reads it once more for every ratio.

    Args:
        methods: for every name one method per ratio, which differ only in the ratio.
        suffix: tokens that follow the context in its prompt.
    """
    requests: dict[Request, list[str]] = {}
    trials: dict[tuple[str, float], Trial] = {}
    seconds: dict[str, float] = {}
    for spec, for_ratio in methods.items():
        if all(first_part(method, llama.kv_layers, len(context)) == len(context) for method in for_ratio):
            requests.setdefault(Request.of(for_ratio[0]), []).append(spec)
            continue
        for ratio, method in zip(ratios, for_ratio, strict=True):
            llama.reset()
            report = compress(llama.context, context, method)
            seconds[spec] = seconds.get(spec, 0.0) + report.score_seconds / len(ratios)
            trials[spec, ratio] = Trial(None, state=llama.save_state())
        llama.reset()
    in_order = sorted(requests, key=lambda request: not request.scores_while_reading)
    first_reads = bool(in_order) and in_order[0].scores_while_reading
    prefill_seconds = 0.0 if first_reads else timed(lambda: llama.prefill(context))[1]
    for request in in_order:
        specs = requests[request]
        evidence, elapsed = timed(partial(llama.observe, context, methods[specs[0]][0], suffix))
        if request.label:
            seconds[request.label] = elapsed
        for spec in specs:
            scores, elapsed = timed(partial(methods[spec][0].scores, evidence))
            if not request.label:  # scoring is the method's only cost
                seconds[spec] = elapsed
            for ratio, method in zip(ratios, methods[spec], strict=True):
                trials[spec, ratio] = method.trial(evidence, scores)
    by_method = {key: trials[key] for key in itertools.product(methods, ratios)}
    return Trials(by_method, prefill_seconds or next(iter(seconds.values())), seconds)


@contextlib.contextmanager
def compressed(llama: Llama, state: Any, trial: Trial) -> Iterator[Callable[[], None]]:
    """Loads the full cache of ``state`` and applies ``trial``; yields a function that restores this state."""

    def restore() -> None:
        llama.load_state(state if trial.state is None else trial.state)
        if trial.plan is not None:
            llama.compose(trial.plan)
        if len(trial.values):
            llama.write_values(trial.values)

    restore()
    with llama.session.biased(trial.biases) if len(trial.biases) else contextlib.nullcontext():
        yield restore
