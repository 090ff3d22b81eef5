"""numba kernels. Each has a numpy twin with the same signature in reference.py, which specifies it.

The kernels release the GIL and run on one thread each; callers spread layers over a thread pool. We do not use numba's
own parallel loops: its workqueue layer ends the process when two Python threads enter it at the same time.
"""

from __future__ import annotations

import functools


@functools.cache
def warm_up() -> None:
    """Compiles every kernel, or loads it from numba's cache. Takes seconds the first time, so call it before timing."""
    import numpy as np

    from . import aggregate, compose, linear

    compose.gather_function()
    scores = aggregate.add_mean_across_heads(aggregate.aggregate_group(np.zeros((2, 2), np.float32), 1, "mean"))
    ranking = aggregate.rank_tokens(scores)
    aggregate.allocate_budget(aggregate.composite_scores(scores, ranking, "mean")[None], 1)
    aggregate.select_rows(ranking, 1)
    aggregate.pool_tokens(scores, 1, "mean")
    rows, weights, norms = (np.zeros(shape, np.float32) for shape in ((1, 1, 2), (1, 2), (1, 3)))
    linear.weigh_rows(rows, rows, rows, weights, weights, weights, weights, weights, norms, weights[:, :1])
