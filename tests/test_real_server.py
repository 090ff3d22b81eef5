"""``kvcompose serve`` as its own process on SmolLM2-135M-Instruct, asked by the clients that people have."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from support.serving import TIMEOUT, until

from kvcompose_gguf.tasks.texts import load_texts

pytestmark = pytest.mark.model

DOCS = Path(__file__).parent.parent / "docs" / "server.md"
KEY = "sk-secret"
# what a model of 135 million parameters in 4 bits knows
ITALY: Any = [{"role": "user", "content": "Name the capital city of Italy."}]


@pytest.fixture(scope="module")
def address(smollm2, tmp_path_factory) -> Iterator[str]:
    """Of a server with two slots of 4,096 tokens, that keeps a quarter of every prompt."""
    folder = tmp_path_factory.mktemp("slots")
    command = [
        sys.executable, "-m", "kvcompose_gguf", "serve", "-m", smollm2, "--compression-ratio", "0.75", "--port", "0", "-c", "8192",
        "-np", "2", "-t", "2", "--api-key", KEY, "--embeddings", "512", "--pooling", "mean", "--slot-save-path", str(folder),
        "--alias", "smollm2", "--temp", "0",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            first = process.stderr.readline()
            threading.Thread(target=process.stderr.read, daemon=True).start()
            found = re.search(r"http://127\.0\.0\.1:\d+", first)
            assert found, first
            until(lambda: httpx2.get(f"{found[0]}/health", timeout=TIMEOUT).status_code == 200)
            yield found[0]
        finally:  # else the end of the `with` waits for a server that nobody stops
            process.terminate()
            assert process.wait(TIMEOUT) in (0, -signal.SIGTERM)


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def document() -> str:
    """About 1,700 tokens, with one fact that nobody could guess."""
    sentences = load_texts("generated").prose(1300)
    sentences.insert(len(sentences) // 3, "One of the special magic numbers for quiet-harbor is: 4821973.")
    return " ".join(sentences)


def ask(document: str, question: str) -> list[Any]:
    return [{"role": "user", "content": f"{document}\n\n{question}"}]


def test_the_openai_package_chats_streams_and_completes(client):
    whole = client.chat.completions.create(model="smollm2", messages=ITALY, max_tokens=24)
    assert "Rome" in whole.choices[0].message.content
    assert whole.usage.completion_tokens <= 24
    stream = client.chat.completions.create(
        model="smollm2", messages=ITALY, max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
    completion = client.completions.create(model="smollm2", prompt="The capital of France is", max_tokens=4)
    assert "Paris" in completion.choices[0].text
    assert [model.id for model in client.models.list()] == ["smollm2"]


def test_the_openai_package_gets_json(client):
    schema = {
        "type": "object", "required": ["city", "country"],
        "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"type": "string", "maxLength": 20}},
    }  # fmt: skip
    answer = client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": "Which city is the capital of France? Answer as JSON."}],
        max_tokens=64, response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema}},
    )  # fmt: skip
    found = json.loads(answer.choices[0].message.content)
    assert set(found) == {"city", "country"}
    assert "Paris" in found["city"]


def test_the_openai_package_gets_vectors_that_tell_texts_apart(client):
    texts = ["The cat sat on the mat.", "A cat was sitting on a mat.", "Shares fell by nine per cent on Tuesday."]
    a, b, c = (item.embedding for item in client.embeddings.create(model="smollm2", input=texts).data)
    close, far = (sum(x * y for x, y in zip(a, other, strict=True)) for other in (b, c))
    assert close > far


def test_a_fact_of_a_long_document_is_found_in_a_quarter_of_its_cache(client, document):
    question = "What is the special magic number for quiet-harbor mentioned in the provided text?"
    answer = client.chat.completions.create(model="smollm2", messages=ask(document, question), max_tokens=32)
    assert "4821973" in answer.choices[0].message.content
    kv = answer.model_extra["timings"]["kv"]
    assert kv["ratio"] == pytest.approx(0.75, abs=0.01)
    assert kv["bytes"] < 0.26 * kv["bytes_full"]
    # the next question continues on what is there
    again = client.chat.completions.create(
        model="smollm2", messages=ask(document, "What is the special magic number for quiet-harbor?"), max_tokens=32
    )
    assert again.usage.prompt_tokens_details.cached_tokens >= kv["n_tokens"] - 1
    assert "4821973" in again.choices[0].message.content


def test_the_server_goes_on_when_a_client_has_gone(client, address):
    """That its work ends before its next decode is in test_server_clients.py, where decodes can be held."""
    stream = client.chat.completions.create(
        model="smollm2", messages=ITALY, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    until(lambda: not any(slot["is_processing"] for slot in slots(address)))
    answer = client.chat.completions.create(model="smollm2", messages=ITALY, max_tokens=24)
    assert "Rome" in answer.choices[0].message.content


def slots(address: str) -> list[Any]:
    return list(httpx2.get(f"{address}/slots", headers={"Authorization": f"Bearer {KEY}"}, timeout=TIMEOUT).json())


def test_langchains_chat_model(address):
    from langchain_openai import ChatOpenAI

    options: dict[str, Any] = {"api_key": KEY, "model": "smollm2", "max_tokens": 24, "temperature": 0}
    chat = ChatOpenAI(base_url=f"{address}/v1", **options)
    whole = chat.invoke(ITALY[0]["content"]).content
    assert "Rome" in whole
    assert "".join(str(chunk.content) for chunk in chat.stream(ITALY[0]["content"])) == whole


def recipes() -> list[str]:
    return [
        line.strip() for line in DOCS.read_text("utf-8").splitlines() if re.match(r"    (curl |jq .*\| curl )", line)
    ]


@pytest.mark.parametrize("recipe", recipes())
def test_the_recipes_of_the_documentation(address, recipe, tmp_path, document):
    if recipe.startswith("jq ") and shutil.which("jq") is None:
        pytest.skip("no jq")
    (tmp_path / "report.txt").write_text(document, "utf-8")
    command = recipe.replace("localhost:8080", address).replace(
        "curl ", f"curl -sS --fail -H 'Authorization: Bearer {KEY}' ", 1
    )
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout
    assert '"error": {' not in done.stdout
