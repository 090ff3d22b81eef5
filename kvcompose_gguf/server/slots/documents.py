"""Documents that were read and compressed once, and that any number of conversations begin with."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .saved import SlotFile, save
from .shelf import Shelf
from .slot_llama import SlotLlama


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document that conversations can begin with.

    Attributes:
        id: a hash of all that decides its context.
        title: a name for people.
        text: what it says.
        system: the system message before it; empty: there is none.
        kv_compress: how a request that names it is compressed; None: as the server does it.
        created: when it was read, seconds since 1970.
        kv: figures of its compression.
    """

    id: str
    title: str
    text: str
    system: str
    kv_compress: Mapping[str, Any] | None
    created: int
    kv: Mapping[str, Any]


def document_id(text: str, system: str, choice: str) -> str:
    """Returns the id of a document that a method compresses (``choice_of``)."""
    return "doc-" + hashlib.sha256(json.dumps([text, system, choice]).encode()).hexdigest()[:32]


class Documents(Shelf):
    """The documents of a server, each a session file with what is known of it.

    Args:
        folder: folder for the files; None: one of its own, which ``close`` deletes.
        max_bytes: maximum bytes of all files of this model.
        llama: as for ``Shelf``.
    """

    def __init__(self, folder: Path | None, max_bytes: int, llama: SlotLlama) -> None:
        self._own = Path(tempfile.mkdtemp(prefix="kvcompose-documents-")) if folder is None else None
        self._max_bytes = max_bytes
        super().__init__(folder or self._own, llama)  # type: ignore[arg-type]

    def close(self) -> None:
        """Delete the files, unless the user named their folder."""
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)

    def all(self) -> list[tuple[Document, SlotFile]]:
        """Returns the documents and their files, the latest first."""
        found = [(_document(entry), entry) for entry in self.entries() if "document" in entry.about]
        return sorted(found, key=lambda pair: pair[0].created, reverse=True)

    def get(self, name: str) -> Document | None:
        """Returns the document with this id. None: there is none."""
        return next((document for document, _ in self.all() if document.id == name), None)

    def add(self, llama: SlotLlama, document: Document) -> None:
        """Keep the compressed context of a slot as a document.

        Raises:
            ConfigError: there is no room for it.
            StateError: the file cannot be written.
        """
        file, room = self.file(document.id), self._max_bytes - self.n_bytes
        if llama.kv_bytes > room:
            raise ConfigError(
                f"the document takes {llama.kv_bytes} bytes, there is room for {max(0, room)}: delete others, or raise "
                "--kv-documents"
            )
        about = {"document": {**asdict(document), "created": document.created or int(time.time())}}
        self.make_folder()
        saved = save(llama, file, None, about)
        self.put(file, SlotFile(llama.held.context, llama.held.composed_by, True, saved.n_tokens, saved.n_bytes, about))

    def remove(self, name: str) -> bool:
        """Forget a document; returns whether there was one. Conversations that have begun with it go on."""
        if self.get(name) is None:
            return False
        self.drop(self.file(name))
        return True


def _document(entry: SlotFile) -> Document:
    return Document(**entry.about["document"])
