#!/usr/bin/env python3
"""Offers llama-server's command line for llama.cpp's own server tests.

    LLAMA_SERVER_BIN_PATH=$PWD/scripts/llama_server_shim.py KVC_TEST_MODEL=smollm2 pytest unit/test_basic.py

Every test gets ``KVC_TEST_MODEL``, whichever model it asks for. The server is ``kvcompose serve``, or the llama-server
that ``KVC_TEST_SERVER`` names, so that one model can compare both. Options that we do not have are accepted and
ignored, so that a test of such an option fails on its own, and not because the server did not start.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

#: llama-server's options that name a model, and how many values each takes
MODEL_OPTIONS = {"--hf-repo": 1, "--hf-file": 1, "--model": 1, "--model-url": 1, "--offline": 0}

#: for embeddings if a test names no pooling: the models of those tests define their own
POOLING = "mean"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--temp", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=-1)
    parser.add_argument("--ctx-size", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--n-predict", type=int, default=-1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alias", default="")
    parser.add_argument("--tags", default="")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--pooling")
    parser.add_argument("--reasoning", default="auto")
    parser.add_argument("--reasoning-format", default="auto")
    parser.add_argument("--cors-origins", default="*")
    parser.add_argument("--slot-save-path", type=Path)
    parser.add_argument("--chat-template")
    parser.add_argument("--chat-template-file", type=Path)
    for name in ("--metrics", "--slots", "--no-slots", "--no-ui", "--verbose", "--embedding"):
        parser.add_argument(name, action="store_true")
    args, unknown = parser.parse_known_args()
    print("not ours:", unknown, flush=True)
    return args


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


def main() -> None:
    if program := os.environ.get("KVC_TEST_SERVER"):
        run_llama_server(program)
    from kvcompose_gguf.models.resolve import resolve_model
    from kvcompose_gguf.server.command import read_keys, serve
    from kvcompose_gguf.server.options import ServeOptions
    from kvcompose_gguf.server.slots.sampling import Sampling

    args = parse()
    template = args.chat_template_file.read_text("utf-8") if args.chat_template_file else args.chat_template
    sampling = Sampling(temperature=args.temp)
    options = ServeOptions(
        model_path=resolve_model(os.environ["KVC_TEST_MODEL"]),
        alias=args.alias,
        tags=args.tags,
        n_ctx=args.ctx_size,
        n_parallel=args.parallel,
        n_predict=args.n_predict,
        n_batch=args.batch_size,
        threads=args.threads,
        sampling=sampling if args.seed < 0 else replace(sampling, seed=args.seed),
        api_keys=read_keys(args.api_key, None),
        cors_origins=args.cors_origins,
        chat_template=template,
        reasoning=args.reasoning != "off",
        reasoning_format=args.reasoning_format,
        endpoint_metrics=args.metrics,
        endpoint_slots=args.slots and not args.no_slots,
        slot_save_path=args.slot_save_path,
        embeddings=args.batch_size if args.embedding else 0,
        pooling=args.pooling or POOLING,
        ui=not args.no_ui,
        verbose=args.verbose,
    )
    serve(options, args.host, args.port)


if __name__ == "__main__":
    main()
