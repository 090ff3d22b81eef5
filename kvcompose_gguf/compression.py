"""Compresses a prompt (prefill -> scores -> plan -> compose), or continues from one that is compressed already.

A prompt that is longer than its budget and a chunk goes this way in parts: it is composed again and again while it is
read, if the method can score a token as soon as it is read.
"""

from __future__ import annotations

from collections.abc import Sequence

from .context import Context
from .errors import ContextLengthError
from .methods.base import Method
from .methods.continuing import choice_of, has_grown
from .plan import seam
from .plan.report import KVReport
from .reading import Reading, attend, check_ceiling, evidence_of, first_part
from .scoring.evidence import Evidence


def observe(context: Context, tokens: Sequence[int], method: Method, suffix: Sequence[int] = ()) -> Evidence:
    """Prefills ``tokens`` and returns the evidence that ``method.plan`` needs; the cache stays full.

    Args:
        suffix: tokens that follow the context in its prompt.
    Raises:
        ContextLengthError: the tokens do not fit, or leave no cell for the queries on top of them.
    """
    method = method.informed()
    attention = attend(context, tokens, method.attention_request, suffix, method.max_score_bytes)
    return evidence_of(context, tokens, attention, method.state_request)


def compress(context: Context, tokens: Sequence[int], method: Method, suffix: Sequence[int] = ()) -> KVReport:
    """Prefills and compresses ``tokens``; a context below ``method.min_tokens`` stays full.

    A method that reads in parts never has more rows in the cache than its budget and a chunk: it reads as many tokens
    as fit, and from there on composes the cache before each chunk. What a method that ``streams`` has compressed
    already is not read again if the tokens begin with it.

    Returns:
        The figures, also kept as ``context.report``.
    Raises:
        ContextLengthError: the tokens and at least one more do not fit, or would take more than ``max_kv_bytes`` while
            they are read.
    """
    n_tokens = len(tokens)
    if n_tokens >= context.n_ctx:
        raise ContextLengthError(f"{n_tokens} tokens and one more do not fit into n_ctx={context.n_ctx}: raise n_ctx")
    check_ceiling(method, context.session.layers, n_tokens)
    reading = Reading(context, method, n_tokens)
    if n_tokens < method.min_tokens:
        reading.prefill(tokens)
    else:
        if not reading.resume(tokens):
            n_first = first_part(reading.method, context.session.layers, n_tokens)
            reading.begin(tokens[:n_first], tokens[n_first:] or suffix)
        reading.go_on(tokens)
        reading.compose(method.chunk_for(context.session.layers, n_tokens) if method.has_ceiling else method.n_room)
    context.report = reading.report()
    return context.report


def prepare(context: Context, tokens: Sequence[int], method: Method | None, again: bool = True) -> None:
    """Makes the cache hold the compressed beginning of a prompt, from which a generation continues.

    A context that ``method`` has compressed is continued if the prompt begins with it. Otherwise the prompt's beginning
    is compressed, if it is long enough.

    Args:
        again: compress a context again if it ``has_grown``, and the method can do so without reading it again.
    Raises:
        ContextLengthError: the beginning would take more than ``max_kv_bytes`` while it is read.
    """
    composed = context.composed
    n_begin = 0 if method is None else len(tokens) - max(1, method.keep_last)
    if composed is not None:
        n_context = context.n_context
        # sampling needs the last token's logits, so at least one token must be left to evaluate
        continues = len(tokens) > n_context and composed.begins(tokens)
        if continues and composed.choice == choice_of(method):
            if again and method is not None and method.streams and has_grown(len(tokens), n_context, method):
                compress(context, tokens[:n_begin], method, tokens[n_begin:])
                return
            n_same = seam.common_prefix(context.tokens, tokens)
            if composed.partial is not None and n_same < context.n_tokens:
                context.rewind(n_same)
            return
        if method is not None and n_begin >= method.min_tokens:
            check_ceiling(method, context.session.layers, n_begin)  # before what is there is lost
        context.reset()
    if context.has_images:
        return  # part of the prompt is not text, so its tokens cannot be evaluated again
    context.report = None
    if method is not None and n_begin >= method.min_tokens:
        compress(context, tokens[:n_begin], method, tokens[n_begin:])
