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


def test_a_quiet_model_shows_errors_as_far_as_the_loggers_level_wants(make_llama, capfd):
    llama, logger = make_llama(verbose=False), logging.getLogger("llama-cpp-python")
    shown = {}
    try:
        for level in (logger.level, "CRITICAL", "WARNING"):
            logger.setLevel(level)
            with pytest.raises(NativeError):
                llama.context.prefill([10**6])
            shown[level] = "invalid token" in capfd.readouterr().err
    finally:
        logger.setLevel(logging.ERROR)
    assert shown == {logging.ERROR: True, "CRITICAL": False, "WARNING": True}


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
