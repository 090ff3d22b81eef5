"""Compresses a prompt (prefill -> scores -> plan -> compose), or continues from one that is compressed already."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from .context import Context
from .errors import ContextLengthError
from .methods.base import Method, choice_of
from .native.rows import ContextRows
from .plan import seam
from .plan.report import KVReport
from .scoring.collect import Attention
from .scoring.evidence import Evidence
from .scoring.requests import AttentionRequest, StateRequest
from .support.timing import timed


def attend(
    context: Context,
    tokens: Sequence[int],
    request: AttentionRequest | None,
    suffix: Sequence[int] = (),
    max_bytes: int = 64 << 20,
) -> Attention:
    """Prefills ``tokens`` and returns the attention that ``request`` asks for, if any (``AttentionRequest.collect``).

    Args:
        suffix: tokens that follow the context in its prompt.
        max_bytes: limit of the working memory, not counting the scores.
    """
    if request is None:
        n_prefilled, seconds = timed(lambda: context.prefill(tokens))
        return Attention([], n_prefilled, seconds, 0.0, 0)
    try:
        return request.collect(context, tokens, suffix, context.vocabulary.tokens, max_bytes)
    finally:
        context.forget_logits()  # the last logits belong to another decode


def observe(context: Context, tokens: Sequence[int], method: Method, suffix: Sequence[int] = ()) -> Evidence:
    """Prefills ``tokens`` and returns the evidence that ``method.plan`` needs; the cache stays full.

    Args:
        suffix: tokens that follow the context in its prompt.
    Raises:
        ContextLengthError: the tokens do not fit, or leave no cell for the queries on top of them.
    """
    method = method.informed()
    attention = attend(context, tokens, method.attention_request, suffix, method.max_score_bytes)
    return _evidence(context, tokens, attention, method.state_request)


def compress(context: Context, tokens: Sequence[int], method: Method, suffix: Sequence[int] = ()) -> KVReport:
    """Prefills and compresses ``tokens``; a context below ``method.min_tokens`` stays full.

    Returns:
        The figures, also kept as ``context.report``.
    Raises:
        ContextLengthError: the tokens and at least one more do not fit.
    """
    n_tokens, session = len(tokens), context.session
    if n_tokens >= context.n_ctx:
        raise ContextLengthError(f"{n_tokens} tokens and one more do not fit into n_ctx={context.n_ctx}: raise n_ctx")

    compressing, choice = n_tokens >= method.min_tokens, choice_of(method)
    method = method.informed()
    request = method.attention_request if compressing else None
    attention = attend(context, tokens, request, suffix, method.max_score_bytes)
    kv_bytes_before = session.state().n_bytes
    n_kept = np.full(len(session.layers), n_tokens)
    forced = (0, 0)
    state_seconds = taught_seconds = score_seconds = plan_seconds = compose_seconds = 0.0
    if compressing:
        evidence, state_seconds = timed(lambda: _evidence(context, tokens, attention, method.state_request))
        method, taught_seconds = timed(partial(method.taught_by, evidence))
        scores, score_seconds = timed(partial(method.scores, evidence))
        plan, plan_seconds = timed(lambda: method.plan(evidence, scores))
        _, compose_seconds = timed(lambda: context.compose(plan, choice, method.n_room))
        n_kept, forced = plan.n_kept, method.forced(session.layers, n_tokens)

    context.report = KVReport(
        n_tokens=n_tokens,
        n_kept=n_kept,
        n_sink=forced[0],
        n_recent=forced[1],
        kv_bytes_full=n_tokens * sum(layer.n_bytes_row for layer in session.layers),
        kv_bytes_kept=int(sum(n * layer.n_bytes_row for n, layer in zip(n_kept, session.layers, strict=True))),
        kv_bytes_before=kv_bytes_before,
        kv_bytes=session.state().n_bytes,
        prefill_seconds=attention.prefill_seconds,
        score_seconds=attention.score_seconds + state_seconds + taught_seconds + score_seconds,
        plan_seconds=plan_seconds,
        compose_seconds=compose_seconds,
        n_prefilled=attention.n_prefilled,
        scoring_chunk=attention.chunk,
        scoring=method.note,
    )
    return context.report


def prepare(context: Context, tokens: Sequence[int], method: Method | None) -> None:
    """Makes the cache hold the compressed beginning of a prompt, from which a generation continues.

    A context that ``method`` has compressed is continued if the prompt begins with it. Otherwise the prompt's beginning
    is compressed, if it is long enough.
    """
    composed = context.composed
    if composed is not None:
        n_context = context.n_context
        # sampling needs the last token's logits, so at least one token must be left to evaluate
        continues = len(tokens) > n_context and tuple(tokens[:n_context]) == composed.tokens
        if continues and composed.choice == choice_of(method):
            n_same = seam.common_prefix(context.tokens, tokens)
            if composed.partial is not None and n_same < context.n_tokens:
                context.rewind(n_same)
            return
        context.reset()
    if context.has_images:
        return  # part of the prompt is not text, so its tokens cannot be evaluated again
    context.report = None
    if method is None:
        return
    n_context = len(tokens) - max(1, method.keep_last)
    if n_context >= method.min_tokens:
        compress(context, tokens[:n_context], method, tokens[n_context:])


def _evidence(context: Context, tokens: Sequence[int], attention: Attention, states: StateRequest | None) -> Evidence:
    queries = [] if states is None else states.collect(context, tokens)
    rows, layers = ContextRows(context.session, len(tokens)), context.session.layers
    return Evidence(len(tokens), layers, attention.layers, attention.n_window, rows, queries, attention.repeated)
