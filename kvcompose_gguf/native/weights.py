"""Lets several contexts use one copy of a model's weights."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from . import library

_borrowing = threading.local()


@contextlib.contextmanager
def shared_weights(model: Any | None) -> Iterator[None]:
    """Makes bindings' ``Llama`` objects that this thread creates in the ``with`` block use the weights of ``model``.

    Closing them does not free the weights.

    Args:
        model: the bindings' ``LlamaModel`` that owns the weights; None: every object loads its own.
    """
    if model is None:
        yield
        return
    _install()
    _borrowing.model = model
    try:
        yield
    finally:
        _borrowing.model = None


def _install() -> None:
    """Puts a choice between loading and borrowing where the bindings look for the class, once per process."""
    internals = library.load()._internals
    load = internals.LlamaModel
    if getattr(load, "borrows", False):
        return

    class Weights(load):  # type: ignore[misc, valid-type]
        borrows = True

        def __init__(self, **kwargs: Any) -> None:
            owner = getattr(_borrowing, "model", None)
            if owner is None:
                super().__init__(**kwargs)
            else:
                self.__dict__.update(owner.__dict__)
                self._exit_stack = contextlib.ExitStack()  # close() frees nothing

    internals.LlamaModel = Weights
