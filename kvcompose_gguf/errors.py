"""The exceptions that this package raises on purpose."""

from __future__ import annotations


class KVComposeError(Exception):
    """The root class of the package's exceptions."""


class ConfigError(KVComposeError, ValueError):
    """An argument is out of range, or arguments contradict each other."""


class LibraryError(KVComposeError, ImportError):
    """The native library is missing, is not this package's own, or has another ABI."""


class UnsupportedError(KVComposeError):
    """Compression does not support this model, kind of cache or combination of features."""


class ContextLengthError(KVComposeError, ValueError):
    """The tokens do not fit into the cells of the context."""


class StateError(KVComposeError, RuntimeError):
    """The state does not allow the call, e.g. after ``close()``; or a saved state is damaged or does not fit."""


class NativeError(KVComposeError, RuntimeError):
    """The native library failed; the message says why."""


class DownloadError(KVComposeError):
    """A model could not be fetched, or its file is not the expected one."""
