"""Fixtures: needles, with the answers that a model seems to give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.needles import NEEDLES

from kvcompose_gguf.learning import trials
from kvcompose_gguf.tasks.answering import Reply


@pytest.fixture
def spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "NEEDLES", NEEDLES)


@pytest.fixture
def forced(spelled: None, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Makes the model seem to give these answers in turn; by default the right one."""
    texts = [f" X: {NEEDLES[0][1]}.".encode()]

    def answer(llama: Any, question: list[int], max_tokens: int, *, one_line: bool) -> Reply:
        text = texts[0]
        texts.append(texts.pop(0))
        assert one_line
        assert len(llama.eval_logits(question)) == 1
        choices = llama.tokenize(text, add_bos=False)
        return Reply(choices, np.zeros((0, 0), np.float32), text.decode())

    monkeypatch.setattr(trials, "answer", answer)
    return texts
