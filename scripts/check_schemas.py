#!/usr/bin/env python3
"""Are a model's answers to 200 JSON schemas what the schemas say?

    python scripts/check_schemas.py MODEL [--n-tokens 200]

Regime: one chat for each schema of tests/support/schemas.py, by the server's own route, at temperature 0.8. "Cut" means
that the answer had no end after so many tokens; it is not judged. Needs the package `jsonschema`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.schemas import SCHEMAS

from kvcompose_gguf.models.resolve import resolve_model
from kvcompose_gguf.server.app import create_app
from kvcompose_gguf.server.command import make_engine
from kvcompose_gguf.server.options import ServeOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a fetched model's name or a .gguf file")
    parser.add_argument("--n-tokens", type=int, default=200)
    args = parser.parse_args()

    options = ServeOptions(model_path=resolve_model(args.model), n_ctx=2048, n_parallel=1)
    found = {"valid": 0, "cut": 0, "invalid": 0}
    with TestClient(create_app(options, lambda: make_engine(options))) as client:
        for seed, schema in enumerate(SCHEMAS):
            body = {
                "messages": [{"role": "user", "content": f"Answer in JSON, briefly. Schema: {json.dumps(schema)}"}],
                "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
                "max_tokens": args.n_tokens, "temperature": 0.8, "seed": seed,
            }  # fmt: skip
            choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
            text = choice["message"]["content"]
            try:
                is_valid = Draft202012Validator(schema).is_valid(json.loads(text))
                kind = "valid" if is_valid else "invalid"
            except ValueError:
                kind = "cut" if choice["finish_reason"] == "length" else "invalid"
            found[kind] += 1
            if kind == "invalid":
                print(json.dumps({"schema": schema, "answer": text}))
    print(f"{len(SCHEMAS)} schemas: {found['valid']} valid, {found['cut']} cut, {found['invalid']} invalid")


if __name__ == "__main__":
    main()
