"""Fixtures: conversations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support import tiny
from support.chat_templates import CHATML
from support.conversations import METHOD, byte_tokens

from kvcompose_gguf import KVCompose
from kvcompose_gguf.chat.conversation import Conversation


@pytest.fixture
def talk(make_llama: Any) -> Callable[..., Conversation]:
    """Makes a conversation on a tiny model; ``template``: its chat template, or None."""

    def make(
        config: tiny.TinyConfig = tiny.GQA,
        template: str | None = CHATML,
        method: KVCompose = METHOD,
        n_ctx: int = 4096,
        **options: Any,
    ) -> Conversation:
        llm = make_llama(config, method, n_ctx=n_ctx, n_threads=1, n_threads_batch=1)
        llm.tokenize = lambda raw, add_bos, special: byte_tokens(raw, add_bos)
        llm.is_end = lambda token: False  # so that answers have a length
        if template is not None:
            llm.metadata["tokenizer.chat_template"] = template
        return Conversation(llm, **{"max_tokens": 8, **options})

    return make
