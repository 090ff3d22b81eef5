"""llama.cpp's log: printed by the library itself, as far as the bindings' logger wants it.

The bindings print it from a Python callback, which llama.cpp calls in the middle of a decode. Ctrl-C that is raised in
there is lost: ctypes prints the KeyboardInterrupt and goes on. The bindings also take llama.cpp's levels for others, so
that ``verbose=False`` hides errors and shows warnings (llama_cpp/_logger.py).
"""

from __future__ import annotations

import logging
from types import ModuleType

from . import bindings

# the enum ggml_log_level of each level of `logging`
_NATIVE_LEVELS = {logging.DEBUG: 1, logging.INFO: 2, logging.WARNING: 3, logging.ERROR: 4}
_SILENT = 5

#: the bindings' logger
LOGGER = "llama-cpp-python"


def show_warnings(llama_cpp: ModuleType) -> None:
    """Lets the library print warnings and errors only, until ``print_natively``."""
    bindings.declare(llama_cpp.llama_cpp._lib).llama_kvc_log(native_level(logging.WARNING))


def print_natively(llama_cpp: ModuleType) -> None:
    """Replaces the bindings' log callback by the library's own, which follows the level of the bindings' logger.

    ``Llama(verbose=...)`` and ``logging.getLogger("llama-cpp-python").setLevel(...)`` keep their meaning.
    """
    lib = bindings.declare(llama_cpp.llama_cpp._lib)

    class _Logger(logging.Logger):
        def setLevel(self, level: int | str) -> None:
            super().setLevel(level)
            lib.llama_kvc_log(native_level(self.level))

    logger = logging.getLogger(LOGGER)
    logger.__class__ = _Logger
    logger.setLevel(logger.level)


def native_level(level: int) -> int:
    """Returns the lowest level of llama.cpp, 1 (debug) to 4 (error), that a logger of this level shows; 5: none."""
    return min((native for shown, native in _NATIVE_LEVELS.items() if shown >= level), default=_SILENT)
