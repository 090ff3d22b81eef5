"""Loading a model for a command (load.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny

from kvcompose_gguf import ConfigError, KVCompose, Llama, UnsupportedError
from kvcompose_gguf.load import load_model
from kvcompose_gguf.native.session import KVSession

TOKENS = tiny.tokens(tiny.GQA, 200)


def logits(model_path: Path, **options: Any) -> np.ndarray:
    llama = load_model(model_path, 512, threads=1, **options)
    try:
        return llama.eval_logits(TOKENS)
    finally:
        llama.close()


def test_a_model_with_fast_attention_decodes_as_one_that_compresses(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    switched: list[bool] = []
    switch = KVSession.set_fast_attention

    def note(self: KVSession, on: bool) -> None:
        switched.append(on)
        switch(self, on)

    monkeypatch.setattr(KVSession, "set_fast_attention", note)
    path = tiny_model(tiny.GQA)
    compressing = logits(path, method=KVCompose(compression_ratio=0.5, scoring="repeat"))
    np.testing.assert_array_equal(logits(path, fast_attention=True), compressing)
    assert switched == [True, True]
    plain = logits(path)
    assert switched == [True, True]
    assert np.abs(plain - compressing).max() < 1e-2


def test_fast_attention_needs_a_cache_that_can_be_compressed(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: KVSession, ctx: object) -> None:
        raise UnsupportedError("not this cache")

    closed: list[Llama] = []
    close = Llama.close

    def note_closed(self: Llama) -> None:
        closed.append(self)
        close(self)

    monkeypatch.setattr(Llama, "close", note_closed)
    monkeypatch.setattr(KVSession, "__init__", refuse)
    with pytest.raises(UnsupportedError, match="not this cache"):
        load_model(tiny_model(tiny.GQA), 512, fast_attention=True)
    assert closed


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    file = tmp_path / "text.gguf"
    file.write_text("text")
    with pytest.raises(ConfigError, match=r"text\.gguf cannot be used"):
        load_model(file, 512)
