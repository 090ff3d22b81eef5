"""Decide which thread may use a context: a lock, streams that keep their turn, and objects that end."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

from .errors import StateError

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

CLOSED = "this Llama is closed: make a new one"


class Access:
    """Who may use one llama.cpp context and its model now.

    Two locks, both re-entrant: the cache's is held during decodes, the model's only for short looks at the vocabulary,
    which are safe beside a decode. Whoever needs both takes the cache's first.
    """

    def __init__(self) -> None:
        self._cache, self._model = threading.RLock(), threading.RLock()
        self._depth = 0  # calls of the thread that holds the cache's lock
        self._stream: object | None = None  # a stream that has begun and not ended
        self._closed = False

    @contextlib.contextmanager
    def turn(self, changes: str = "") -> Iterator[None]:
        """Wait for the cache, and keep it until the end of the ``with``.

        Args:
            changes: name of a call that changes the cache; an open stream would go on from another cache.
        Raises:
            StateError: the Llama is closed, or the call changes the cache and a stream is open.
        """
        with self._cache:
            self._check_open()
            if changes and self._stream is not None and not self._depth:
                raise StateError(f"a stream of this Llama is open: exhaust or close() it before {changes}()")
            with self._inside():
                yield

    @contextlib.contextmanager
    def look(self) -> Iterator[None]:
        """Keep the model from being freed until the end of the ``with``.

        Raises:
            StateError: the Llama is closed.
        """
        with self._model:
            self._check_open()
            yield

    def stream(self, items: Generator[T, Any, Any]) -> Generator[T, Any, Any]:
        """Yield ``items``; each is computed in a turn, and other changes of the cache are refused until the last one.

        Raises:
            StateError: from ``next()``: the Llama is closed, or another stream is open.
        """
        me, sent = object(), None
        try:
            while True:
                with self._cache:
                    self._check_open()
                    if not self._depth:  # else the caller has the turn
                        if self._stream not in (None, me):
                            raise StateError("another stream of this Llama is open: exhaust or close() it first")
                        self._stream = me
                    with self._inside():
                        try:
                            item = items.send(sent)
                        except StopIteration as end:
                            return end.value
                sent = yield item
        finally:
            with self._cache:
                if self._stream is me:
                    self._stream = None
                if not self._closed:
                    with self._inside():
                        items.close()

    @contextlib.contextmanager
    def closing(self) -> Iterator[bool]:
        """Wait for running calls and refuse all later ones; yields whether this is the first time."""
        with self._cache, self._model:
            first, self._closed = not self._closed, True
            yield first

    def _check_open(self) -> None:
        if self._closed:
            raise StateError(CLOSED)

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1


def reads_model(method: F) -> F:
    """A method of an object with ``_access`` that looks at the model only; it does not wait for decodes."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._access.look():
            return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]


def reads_cache(method: F) -> F:
    """A method of an object with ``_access`` that waits for the calls of other threads."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._access.turn():
            return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]


def changes_cache(method: F) -> F:
    """A method of an object with ``_access`` that waits for other threads, and is refused while a stream is open."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._access.turn(method.__name__):
            return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]


def inherits(access: dict[Callable[[Any], Any], tuple[str, ...]]) -> Callable[[type[T]], type[T]]:
    """A class decorator that guards inherited methods: for each of the functions above, the names that it guards."""

    def decorate(cls: type[T]) -> type[T]:
        for guard, names in access.items():
            for name in names:
                setattr(cls, name, guard(getattr(cls, name)))
        return cls

    return decorate


def seal(what: object) -> None:
    """Make every public attribute of ``what`` raise StateError from now on; only ``close()`` still works.

    References to an object outlive it: a generator, another thread or a tokenizer may hold them, and llama.cpp ends
    the process when it gets freed memory.
    """
    what.__class__ = _sealed(type(what))  # type: ignore[arg-type]


@functools.cache
def _sealed(cls: type) -> type:
    def refuse(self: object, name: str) -> Any:
        if name.startswith("_") or name == "close":
            return object.__getattribute__(self, name)
        raise StateError(CLOSED)

    def nothing(self: object) -> None:
        """Nothing is left to free."""

    def describe(self: object) -> str:
        return f"<closed {cls.__name__}>"

    body = {"__getattribute__": refuse, "__del__": nothing, "close": nothing, "__repr__": describe}
    return type(cls.__name__, (cls,), body)
