#!/usr/bin/env python3
"""Offers llama-server's command line for llama.cpp's own server tests.

    LLAMA_SERVER_BIN_PATH=$PWD/scripts/llama_server_shim.py KVC_TEST_MODEL=smollm2 pytest unit/test_basic.py

Every test gets ``KVC_TEST_MODEL``, whichever model it asks for. The server is ``kvcompose serve``, or the llama-server
that ``KVC_TEST_SERVER`` names, so that one model can compare both. Options that we do not have are accepted and
ignored, so that a test of such an option fails on its own, and not because the server did not start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

#: llama-server's options that name a model, and how many values each takes
MODEL_OPTIONS = {"--hf-repo": 1, "--hf-file": 1, "--model": 1, "--model-url": 1, "--offline": 0}

#: for embeddings if a test names no pooling: the models of those tests define their own
POOLING = "mean"

#: what llama-server, or its tests, take for granted and ``kvcompose serve`` does not
DEFAULTS = (
    "--parallel", "4", "--threads", "2", "--timeout", "0", "--cors-origins", "*", "--pooling", POOLING, "--no-metrics",
    "--no-slots",
)  # fmt: skip


def run_llama_server(program: str) -> None:
    """Replaces this process by llama-server, with our model instead of the test's."""
    given, arguments, has_model = iter(sys.argv[1:]), [program], False
    for argument in given:
        if argument in MODEL_OPTIONS:
            has_model |= argument != "--offline"
            for _ in range(MODEL_OPTIONS[argument]):
                next(given)
        else:
            arguments.append(argument)
    if has_model:
        arguments += ["--model", os.environ["KVC_TEST_MODEL"]]
    if "--embedding" in arguments and "--pooling" not in arguments:
        arguments += ["--pooling", POOLING]
    os.execv(program, arguments)


def our_arguments(given: Sequence[str]) -> list[str]:
    """Returns the options that ``kvcompose serve`` has of llama-server's, after ``DEFAULTS``; prints the others."""
    from kvcompose_gguf.server.options import ServeOptions
    from kvcompose_gguf.support.arguments import arguments_of

    ours = {word: argument for argument in arguments_of(ServeOptions) for word in argument.spellings}
    batch = ours["--batch-size"]
    batch_size = str(batch.default)
    arguments, unknown, rest = list(DEFAULTS), [], iter(given)
    embeds = False
    for word in rest:
        if word in ("--embedding", "--embeddings"):  # without a number there: texts have to fit into a batch
            embeds = True
        elif word in batch.spellings:
            batch_size = next(rest)
        elif word in ours:
            arguments += [word] if ours[word].is_flag else [word, next(rest)]
        else:
            unknown.append(word)
    print("not ours:", unknown, flush=True)
    return [*arguments, "--batch-size", batch_size, *(["--embeddings", batch_size] if embeds else [])]


def main() -> None:
    if program := os.environ.get("KVC_TEST_SERVER"):
        run_llama_server(program)
    from kvcompose_gguf.cli.app import main as run_command

    sys.argv[1:] = ["serve", "--model", os.environ["KVC_TEST_MODEL"], *our_arguments(sys.argv[1:])]
    run_command()


if __name__ == "__main__":
    main()
