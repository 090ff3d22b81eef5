"""Controls which thread may use a context: locks, streams that block changes, and closed objects."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

from .errors import StateError

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

CLOSED = "this Llama is closed: create a new one"


class Access:
    """Controls access to one llama.cpp context and its model.

    There are two re-entrant locks. A decode holds the cache's lock. A short look at the vocabulary holds the model's
    lock, and is safe during a decode. Code that needs both locks takes the cache's first.
    """

    def __init__(self) -> None:
        self._cache, self._model = threading.RLock(), threading.RLock()
        self._depth = 0  # nested calls of the thread that holds the cache's lock
        self._stream: object | None = None  # the stream that has begun and not ended, if any
        self._closed = False

    @contextlib.contextmanager
    def turn(self, changes: str = "") -> Iterator[None]:
        """Waits for the cache, and holds it until the ``with`` block ends.

        Args:
            changes: name of the call if it changes the cache. An open stream forbids it: the stream would continue
                from a different cache.
        Raises:
            StateError: the Llama is closed, or the call changes the cache while a stream is open.
        """
        with self._cache:
            self._check_open()
            if changes and self._stream is not None and not self._depth:
                raise StateError(f"a stream of this Llama is open: exhaust or close() it before {changes}()")
            with self._inside():
                yield

    @contextlib.contextmanager
    def look(self) -> Iterator[None]:
        """Keeps the model in memory until the ``with`` block ends.

        Raises:
            StateError: the Llama is closed.
        """
        with self._model:
            self._check_open()
            yield

    def stream(self, items: Generator[T, Any, Any]) -> Generator[T, Any, Any]:
        """Yields ``items``, each computed in its own turn; refuses other changes of the cache until the last item.

        Raises:
            StateError: from ``next()``: the Llama is closed, or another stream is open.
        """
        me, sent = object(), None
        try:
            while True:
                with self._cache:
                    self._check_open()
                    if not self._depth:  # otherwise the caller holds the turn
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
            # without the lock: the garbage collector may be here, in a thread that holds the model's lock
            if self._stream is me:
                self._stream = None
            items.close()

    @contextlib.contextmanager
    def closing(self) -> Iterator[bool]:
        """Waits for running calls and refuses all later ones; yields whether this is the first call of ``closing``."""
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


def _guard(turn: Callable[[Access, str], contextlib.AbstractContextManager[None]]) -> Callable[[F], F]:
    """Returns a decorator for methods of an object with ``access``: the method runs inside of ``turn``."""

    def decorate(method: F) -> F:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with turn(self.access, method.__name__):
                return method(self, *args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


#: the method reads only the model; it does not wait for decodes
reads_model = _guard(lambda access, name: access.look())
#: the method waits for the calls of other threads
reads_cache = _guard(lambda access, name: access.turn())
#: the method waits for the calls of other threads, and is refused while a stream is open
changes_cache = _guard(lambda access, name: access.turn(name))


def inherits(access: dict[Callable[[Any], Any], tuple[str, ...]]) -> Callable[[type[T]], type[T]]:
    """Returns a class decorator that guards inherited methods; ``access`` maps each guard above to method names."""

    def decorate(cls: type[T]) -> type[T]:
        for guard, names in access.items():
            for name in names:
                setattr(cls, name, guard(getattr(cls, name)))
        return cls

    return decorate


def seal(what: object) -> None:
    """Makes every public attribute of ``what`` raise StateError from now on; only ``close()`` still works.

    A generator, another thread or a tokenizer may still hold the object, and llama.cpp ends the process when it gets
    freed memory.
    """
    what.__class__ = _sealed(type(what))  # type: ignore[arg-type]


@functools.cache
def _sealed(cls: type) -> type:
    def refuse(self: object, name: str) -> Any:
        if name.startswith("_") or name == "close":
            return object.__getattribute__(self, name)
        raise StateError(CLOSED)

    def nothing(self: object) -> None:
        """Does nothing: everything is freed already."""

    def describe(self: object) -> str:
        return f"<closed {cls.__name__}>"

    body = {"__getattribute__": refuse, "__del__": nothing, "close": nothing, "__repr__": describe}
    return type(cls.__name__, (cls,), body)
