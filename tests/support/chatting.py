"""Runs ``kvcompose chat`` in a process of its own, in which the test may decide what the model says and when.

    python -m support.chatting '{"model": "tiny.gguf", "files": ["rooms.txt"], "says": "Blue.", "held": "file"}'

``says``: the answer, a byte a token. ``held``: a file that is made when the model has said half of it; the model then
waits until the file is removed or Ctrl-C is pressed. Everything else is ``ChatOptions``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvcompose_gguf.chat.command import chat
from kvcompose_gguf.chat.interrupts import Interrupts
from kvcompose_gguf.chat.options import ChatOptions
from kvcompose_gguf.errors import KVComposeError


def speak(text: str, held: str | None) -> None:
    """Let every Llama say ``text``."""
    from kvcompose_gguf.llama import Llama

    pressed: list[bool] = []
    note = Interrupts._note

    def noted(self: Interrupts, *args: Any) -> None:
        pressed.append(True)
        note(self, *args)

    def generate(self: Llama, tokens: Any, **sampling: Any) -> Iterator[int]:
        raw = text.encode()
        for i, byte in enumerate(raw):
            if held is not None and i == len(raw) // 2:
                Path(held).touch()
                while Path(held).exists() and not pressed:
                    time.sleep(0.01)
            yield 3 + byte
        yield 2  # the end of the text

    Interrupts._note = noted  # type: ignore[method-assign]
    Llama.generate = generate  # type: ignore[method-assign, assignment]


def main() -> int:
    request = json.loads(sys.argv[1])
    says, held = request.pop("says", None), request.pop("held", None)
    if says is not None:
        speak(says, held)
    try:
        return chat(ChatOptions(**{name: tuple(v) if isinstance(v, list) else v for name, v in request.items()}))
    except KVComposeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
