"""Reimplements the 13 tasks of RULER's synthetic.yaml (arXiv 2404.06654), and adds one needle at a chosen depth.

Wording, counts and answer lengths follow NVIDIA/RULER c3f5e3b (scripts/synthetic.yaml, scripts/data/synthetic/). As in
kvpress's version of the data set, the question is not part of the context. The line break before the question belongs
to the question, and the space before the answer prefix belongs to the prefix. Differences from RULER:

* a haystack is filled to the target in steps of one unit (word, line, document), not of 25 or 500;
* all keys and values of a sample differ; the worked example of ``vt`` has 10 lines of noise at any length, and the
  worked example of ``cwe`` shares no word with the list;
* ``qa`` draws its questions at random instead of in file order, and with a short target it may leave out some of
  HotpotQA's ten paragraphs, but never those with the facts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from ..errors import ConfigError
from .documents import Documents
from .frequencies import CommonWords, FrequentWords
from .needles import Needles, VariableTracking
from .samples import Sample
from .task import Task
from .texts import Texts

TASKS: dict[str, Task] = {
    "niah_single_1": Needles(128, haystack="noise"),
    "niah_single_2": Needles(128),
    "niah_single_3": Needles(128, value="uuids"),
    "niah_multikey_1": Needles(128, n_keys=4),
    "niah_multikey_2": Needles(128, haystack="needle"),
    "niah_multikey_3": Needles(128, haystack="needle", key="uuids", value="uuids"),
    "niah_multivalue": Needles(128, n_values=4),
    "niah_multiquery": Needles(128, n_keys=4, n_queries=4),
    "vt": VariableTracking(30),
    "cwe": CommonWords(120),
    "fwe": FrequentWords(50),
    "qa_1": Documents(32, "string_match_part"),
    "qa_2": Documents(32, "string_match_part", n_hops=2),
    # not in RULER: niah_single_2 with a short answer, for heat maps of depth and length
    "passkey": Needles(32),
}
RULER_TASKS = tuple(TASKS)[:13]


def make_sample(
    task: str,
    n_tokens: int,
    index: int,
    seed: int,
    count_tokens: Callable[[str], int],
    texts: Texts,
    *,
    depth: float | None = None,
) -> Sample:
    """Returns sample ``index`` of a task, with the largest haystack that keeps it within ``n_tokens``.

    Keys, values and questions depend on task, seed and index, but not on the length.

    Args:
        task: a name in :data:`TASKS`.
        n_tokens: prompt and longest answer together, as RULER counts.
        index: number of the sample, from 0.
        count_tokens: returns the number of tokens of a text, including anything that the caller adds around it.
        depth: depth of the needle in [0, 1], for tasks with one needle; None draws it.

    Raises:
        ConfigError: the task does not exist, an argument is out of range, or ``n_tokens`` is too small for the task.
    """
    if task not in TASKS:
        raise ConfigError(f"task={task!r}; allowed: {', '.join(TASKS)}")
    if index < 0:
        raise ConfigError(f"index={index}; allowed: 0 or more")
    kind = TASKS[task]
    if depth is not None and not kind.takes_depth:
        able = ", ".join(name for name, other in TASKS.items() if other.takes_depth)
        raise ConfigError(f"depth={depth} with task={task!r}; allowed only with {able}")
    if depth is not None and not 0 <= depth <= 1:
        raise ConfigError(f"depth={depth}; allowed: 0 to 1")
    recipe = kind.recipe(f"{seed}/{task}/{index}", n_tokens, texts, depth)

    def size(n: int) -> int:
        draft = recipe.build(n)
        return count_tokens(draft.context + draft.question + draft.answer_prefix) + kind.max_tokens

    n, n_used = _largest(size, n_tokens, recipe.least, recipe.most)
    if n_used > n_tokens:
        raise ConfigError(f"n_tokens={n_tokens}, the least for sample {index} of task={task!r} is {n_used}")
    draft = recipe.build(n)
    return Sample(
        **vars(draft),
        task=task,
        index=index,
        max_tokens=kind.max_tokens,
        metric=kind.metric,
        n_tokens=n_used - kind.max_tokens,
    )


def _largest(size: Callable[[int], int], limit: int, least: int, most: int) -> tuple[int, int]:
    """Returns the largest n in [least, most] with ``size(n) <= limit`` and its size, or those of ``least``.

    ``size`` grows almost in proportion to n, so guessing along its slope needs half the calls of bisection.
    """
    low, low_size, high, guess = least, size(least), most + 1, min(least + 16, most)
    if low_size > limit:
        return low, low_size
    point, point_size = low, low_size  # slope: from ``low`` to here, the last size above the limit
    for n_calls in itertools.count(2):
        if high - low <= 1:
            break
        n = size(guess)
        if n <= limit:
            low, low_size = guess, n
        else:
            high = point = guess
            point_size = n
        slope = max(1e-3, (point_size - low_size) / (point - low))
        guess = low + int((limit - low_size) / slope) if n_calls < 9 else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
    return low, low_size
