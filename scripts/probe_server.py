#!/usr/bin/env python3
"""Prints the answers of a checkout's server to a list of requests, as one JSON object of names and values.

    PYTHONPATH=CHECKOUT python scripts/probe_server.py TINY_MODEL

Starts ``kvcompose serve`` four times, with different options. Times, ids and dates in the bodies are masked.
scripts/compare_checkouts.py runs this in two checkouts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
from record_bodies import mask, mask_body

Ask = tuple[str, str, dict[str, Any] | None]

TEXT = "The old keeper wrote 4711 into the book of the tower. " * 7
SHORT = {"n_predict": 8, "temperature": 0, "seed": 1}
CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello there"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
SCHEMA = {"type": "object", "properties": {"x": {"enum": ["one", "two"]}}, "required": ["x"]}
#: stands for the ``id`` of the answer before
LAST_ID = "LAST_ID"
COMPRESS = {"ratio": 0.5, "min_tokens": 64, "method": "kvcompose,scoring=repeat"}


def post(path: str, **body: Any) -> Ask:
    return "POST", path, body


def completion(**body: Any) -> Ask:
    return post("/completion", **({"prompt": "Hello"} | SHORT | body))


def chat(**body: Any) -> Ask:
    return post("/v1/chat/completions", **({"messages": CHAT, "max_tokens": 8, "temperature": 0, "seed": 1} | body))


#: in order, since slots and named documents remember earlier requests
REQUESTS: list[Ask] = [
    *(("GET", path, None) for path in (
        "/health", "/v1/health", "/props", "/models", "/v1/models", "/slots", "/kv/slots", "/kv/slots/0", "/metrics",
        "/lora-adapters", "/", "/openapi.json", "/nothing", "/docs",
    )),
    post("/tokenize", content="Hello, wörld"), post("/tokenize", content="Hello", with_pieces=True, add_special=True),
    post("/tokenize", content=["a", 5, "b"]), post("/tokenize"), post("/detokenize", tokens=[75, 104, 111]),
    post("/detokenize", tokens=["x"]), post("/apply-template", messages=CHAT), post("/apply-template", messages=[]),
    post("/v1/chat/completions/input_tokens", messages=CHAT),
    completion(), completion(prompt=[5, 6, 7]), completion(prompt=["One", "Two"]), completion(n_probs=3),
    completion(n_probs=2, post_sampling_probs=True, temperature=1.0), completion(stream=True),
    completion(stream=True, n_probs=2, timings_per_token=True), completion(stop=["e", "a"], n_predict=32),
    completion(temperature=1.3, top_k=5, n_predict=24), completion(temperature=0.9, mirostat=2, n_predict=16),
    completion(repeat_penalty=1.3, presence_penalty=0.2, n_predict=16), completion(logit_bias=[[75, 50.0]]),
    completion(grammar='root ::= "yes" | "no"'), completion(json_schema=SCHEMA, n_predict=24), completion(n=2),
    completion(return_tokens=True, response_fields=["content", "tokens", "generation_settings/n_predict"]),
    completion(prompt=TEXT, kv_compress=COMPRESS), completion(prompt=TEXT + "Who wrote?", kv_compress=COMPRESS),
    completion(prompt=TEXT + "Who wrote?", kv_compress=COMPRESS, stream=True, return_progress=True),
    completion(prompt=TEXT + "When?", kv_compress=False), completion(prompt=TEXT, kv_compress={"n_kept": 60}),
    completion(prompt=TEXT, kv_compress={"method": "snapkv", "max_kv_bytes": 100000}, id_slot=1),
    ("GET", "/slots", None), ("GET", "/kv/slots", None), ("GET", "/kv/slots/0", None), ("GET", "/kv/slots/1", None),
    post("/kv/compress", prompt=TEXT, kv_compress=COMPRESS), completion(prompt=TEXT + "Who?", kv_prefix=LAST_ID),
    post("/kv/compress", prompt=TEXT),
    post("/kv/compress"), completion(kv_prefix="nothing"),
    post("/v1/completions", prompt="Hello", max_tokens=8, temperature=0, seed=1),
    post("/v1/completions", prompt="Hi", echo=True, seed=1),
    post("/v1/completions", prompt="Hello", max_tokens=6, temperature=0, stream=True, logprobs=2, seed=1),
    chat(), chat(stream=True), chat(stream=True, stream_options={"include_usage": True}),
    chat(logprobs=True, top_logprobs=2),
    chat(tools=[TOOL]), chat(tools=[TOOL], tool_choice="required", max_tokens=32), chat(n=2), chat(n=9),
    chat(response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}}, max_tokens=24),
    chat(response_format={"type": "nothing"}), chat(messages=[]), chat(messages="x"), chat(messages=[{"role": "user"}]),
    chat(messages=[*CHAT, {"role": "assistant", "content": "Hel"}]), chat(reasoning_format="none"),
    chat(messages=[{"role": "user", "content": TEXT}], kv_compress=COMPRESS),
    chat(messages=[{"role": "user", "content": TEXT}, *CHAT[1:]], kv_compress=COMPRESS),
    chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]),
    post("/infill", input_prefix="def f(", input_suffix="return", **SHORT), post("/infill", input_prefix="x"),
    post("/embeddings", input="Hello"), post("/v1/embeddings", input=["a", "b"]), post("/embedding", content="x"),
    post("/slots/0?action=save", filename="a.bin"), post("/slots/1?action=restore", filename="a.bin"),
    post("/slots/1?action=restore", filename="../a.bin"), post("/slots/0?action=erase"),
    post("/slots/0?action=nothing"),
    post("/slots/9?action=erase"), post("/props"), post("/lora-adapters"), ("GET", "/slots", None),
    completion(prompt=""), completion(prompt=5), completion(prompt=[999999]), completion(prompt="x" * 3000),
    completion(temperature="hot"), completion(n_predict=-5), completion(grammar="root ::= ("),
    completion(json_schema=5),
    completion(kv_compress={"ratio": 2}), completion(kv_compress={"method": "nothing", "ratio": 0.5}),
    completion(kv_compress={"ratio": 0.5, "n_kept": 5}), completion(samplers=["nothing"]),
    completion(top_k=1, samplers="k"),
    ("DELETE", "/completion", None), ("OPTIONS", "/completion", None), post("/v1/messages"), post("/v1/responses"),
    post("/rerank"), ("GET", "/metrics", None),
]  # fmt: skip

CLOSED_REQUESTS: list[Ask] = [
    *(("GET", path, None) for path in ("/health", "/slots", "/metrics", "/", "/models", "/v1/models")),
    completion(), ("OPTIONS", "/completion", None), post("/slots/0?action=save", filename="a"),
]  # fmt: skip

PLAIN = "-c 2048 -np 2 -ctk f32 -ctv f32 -fa off --slot-save-path slots"
COMPRESSING = (
    "-c 2048 -np 2 --compression-ratio 0.6 --min-tokens 100 --kv-budget 1700kB --kv-save-idle 4MB "
    "--slot-save-path idle "
    "--embeddings 256 --pooling mean -v"
)
CLOSED = "-c 1024 --api-key secret --no-slots --no-metrics --no-ui --cors-origins http://a.example"

#: name -> options, requests and headers
SERVERS: dict[str, tuple[str, list[Ask], dict[str, str]]] = {
    "plain": (PLAIN, REQUESTS, {}),
    "compressing": (COMPRESSING, REQUESTS, {}),
    "closed": (CLOSED, CLOSED_REQUESTS, {"Origin": "http://a.example"}),
    "with a key": (CLOSED, CLOSED_REQUESTS, {"Authorization": "Bearer secret", "Origin": "http://b.example"}),
}

#: headers that say nothing about the answer
UNCOMPARED = {"date", "content-length", "etag", "last-modified"}


@contextlib.contextmanager
def serving(model: str, options: str) -> Iterator[str]:
    """Starts a server; yields its address."""
    shared = f"serve -m {model} --port 0 -t 1 -b 64 -a tiny"
    command = [sys.executable, "-m", "kvcompose_gguf", *shared.split(), *options.split()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        printed = []
        try:
            for line in server.stderr:
                printed.append(line)
                if found := re.search(r"http://[\d.]+:\d+", line):
                    yield found.group()
                    break
            else:
                raise SystemExit("".join([f"the server with {options} has ended\n", *printed]))
        finally:
            server.terminate()
            server.stderr.close()


def answers(address: str, asks: list[Ask], headers: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yields status, headers and masked body of each answer."""
    last_id = ""
    for method, path, body in asks:
        if body is not None and body.get("kv_prefix") == LAST_ID:
            body = body | {"kv_prefix": last_id}
        got = requests.request(method, address + path, json=body, headers=headers, timeout=300)
        if path == "/kv/compress" and got.ok:
            last_id = got.json()["id"]
        kept = {name: value for name, value in sorted(got.headers.items()) if name.lower() not in UNCOMPARED}
        yield {"status": got.status_code, "headers": mask(kept), "body": mask_body(got.content)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    model = parser.parse_args().model
    for folder in ("slots", "idle"):
        Path(folder).mkdir(exist_ok=True)
    out: dict[str, Any] = {}
    for name, (options, asks, headers) in SERVERS.items():
        with serving(model, options) as address:
            while requests.get(f"{address}/health", timeout=60).status_code == 503:
                time.sleep(0.1)
            for index, (ask, answer) in enumerate(zip(asks, answers(address, asks, headers), strict=True)):
                body = json.dumps(ask[2], ensure_ascii=False)
                out[f"{name} {index}: {ask[0]} {ask[1]} {body[:80]}"] = answer
    print(json.dumps(out))


if __name__ == "__main__":
    main()
