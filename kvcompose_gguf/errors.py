"""Every exception that this package raises on purpose."""

from __future__ import annotations


class KVComposeError(Exception):
    """Root of the package's exceptions."""


class ConfigError(KVComposeError, ValueError):
    """An option is out of its range, or options contradict each other."""


class LibraryError(KVComposeError, ImportError):
    """The native library is missing, is not ours, or has another ABI."""


class UnsupportedError(KVComposeError):
    """This model, kind of cache or combination of features cannot be compressed."""


class ContextLengthError(KVComposeError, ValueError):
    """More tokens than the context has cells for."""


class StateError(KVComposeError, RuntimeError):
    """The cache is in a state in which the call makes no sense, e.g. saving a compressed cache."""


class NativeError(KVComposeError, RuntimeError):
    """The native library failed; the message is its own."""


class DownloadError(KVComposeError):
    """A model could not be fetched, or is not the file it should be."""
