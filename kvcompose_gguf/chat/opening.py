"""Opens a conversation: chooses the method and the size of the context, and loads the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ContextLengthError
from ..load import load_model
from ..methods import make_method
from ..models.resolve import resolve_model
from ..native.vocab_only import n_ctx_trained, open_vocabulary
from ..sessions import describe, session_path
from ..support.documents import Document
from .conversation import MIN_ROOM, Conversation
from .options import DEFAULT_RATIO, ChatOptions

#: size in tokens of the smallest context, for models that were trained for at least as many
MIN_CONTEXT = 32768


@contextlib.contextmanager
def open_conversation(options: ChatOptions, documents: Sequence[Document] = ()) -> Iterator[Conversation]:
    """A conversation that has room for ``documents``, which are not read yet, or for the session of ``options``.

    Raises:
        ContextLengthError: they do not fit; the model's weights were not read.
        KVComposeError: the model, the session or an option cannot be used.
    """
    method = make_method(options.method, **_method_options(options))
    model_path = resolve_model(options.model)
    n_ctx = _context_size(model_path, options, documents)
    seed: dict[str, Any] = {} if options.seed is None else {"seed": options.seed}
    llm = load_model(model_path, n_ctx, method, flash_attn=options.flash_attn, threads=options.threads, **seed)
    with contextlib.closing(llm):
        yield Conversation(
            llm,
            system=options.system or "",
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            repeat_penalty=options.repeat_penalty,
        )


def _method_options(options: ChatOptions) -> dict[str, Any]:
    """The budget and what else ``make_method`` is given."""
    out: dict[str, Any] = {} if options.scoring is None else {"scoring": options.scoring}
    if options.max_kv_bytes is not None:
        return {**out, "max_kv_bytes": options.max_kv_bytes}
    return {
        **out,
        "compression_ratio": DEFAULT_RATIO if options.compression_ratio is None else options.compression_ratio,
    }


def _context_size(model_path: Path, options: ChatOptions, documents: Sequence[Document]) -> int:
    """Cells for the conversation: what was asked for, or twice what is read and at least ``MIN_CONTEXT``.

    The cache has memory for what it holds only; a longer context than needed costs buffers for computing.
    """
    with open_vocabulary(model_path) as vocabulary:
        trained = n_ctx_trained(vocabulary) or MIN_CONTEXT
        counts = [
            len(vocabulary.tokenize(document.text.encode("utf-8", "replace"), False, True)) for document in documents
        ]
    if options.session is not None:
        counts.append(describe(session_path(options.session)).n_tokens)
    limit = options.ctx_size or trained
    if sum(counts) + MIN_ROOM > limit:
        names = ", ".join(document.name for document in documents) or f"session {options.session}"
        raise ContextLengthError(
            f"{names}: {sum(counts):,} tokens do not fit into the context of {limit:,} with {MIN_ROOM} for a question. "
            + _advice(options, trained, sum(counts))
        )
    return options.ctx_size or min(trained, max(MIN_CONTEXT, 2 * sum(counts)))


def _advice(options: ChatOptions, trained: int, n_tokens: int) -> str:
    if options.ctx_size is not None and n_tokens + MIN_ROOM <= trained:
        return f"Use a larger --ctx-size, the model was trained for {trained:,} tokens"
    return f"The model was trained for {trained:,} tokens: use a model with a longer context, or a shorter text"
