"""Checks that llama.cpp's log never enters Python in the middle of a native call, and what it shows."""

from __future__ import annotations

import logging
import sys
from types import FrameType
from typing import Any

import pytest
from support import tiny

from kvcompose_gguf import NativeError
from kvcompose_gguf.native.log import native_level

TOKENS = tiny.tokens(tiny.GQA, 40)


def test_no_message_enters_python(make_llama, capfd):
    # Ctrl-C that is noticed in a callback of the bindings is printed and lost: what is read or compressed goes on
    entered = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        entered.add(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        llama = make_llama(verbose=True)
        llama.eval(TOKENS)
    finally:
        sys.setprofile(None)
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    assert "eval" in entered
    assert "llama_log_callback" not in entered
    assert "llama_kv_cache" in capfd.readouterr().err  # there were messages


def test_a_quiet_model_shows_errors_but_no_warnings(make_llama, capfd):
    llama = make_llama(verbose=False)
    assert capfd.readouterr().err == ""
    with pytest.raises(NativeError):
        llama.context.prefill([10**6])
    assert "invalid token" in capfd.readouterr().err


def test_the_loggers_level_decides(make_llama, capfd):
    logger = logging.getLogger("llama-cpp-python")
    make_llama(verbose=False)
    logger.setLevel("DEBUG")
    try:
        make_llama().context.prefill(TOKENS)
        make_llama(verbose=True)
    finally:
        logger.setLevel(logging.ERROR)
    assert "llama_context" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("level", "native"),
    [
        (logging.NOTSET, 1),
        (logging.DEBUG, 1),
        (15, 2),
        (logging.INFO, 2),
        (logging.WARNING, 3),
        (logging.ERROR, 4),
        (logging.CRITICAL, 5),
    ],
)
def test_levels_are_those_of_logging(level, native):
    assert native_level(level) == native
