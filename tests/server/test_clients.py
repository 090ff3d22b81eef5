"""Clients that people have, over a real socket, on a tiny model of random weights."""

from __future__ import annotations

import http.client
import json
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from support import tiny
from support.serving import TIMEOUT, cancelling, decodes, running, tiny_options, until

from kvcompose_gguf.server.api import streams
from kvcompose_gguf.server.options import ServeOptions

CONFIG = tiny.GQA
KEY = "sk-secret"
MESSAGES: Any = [{"role": "user", "content": "Hello, who are you?"}]


@pytest.fixture(scope="module")
def address(tiny_model) -> Iterator[str]:
    """Of a server with two slots, vectors and a key."""
    options = ServeOptions(
        model_path=tiny_model(CONFIG), n_ctx=2048, n_parallel=2, threads=1, n_batch=64, flash_attn=False, alias="tiny",
        api_keys=(KEY,), embeddings=128, pooling="mean",
    )  # fmt: skip
    with running(options) as address:
        yield address


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=TIMEOUT)


def curl(address: str, path: str, *options: str) -> Any:
    command = ["curl", "-s", f"{address}{path}", "-H", f"Authorization: Bearer {KEY}", *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_openai_package_lists_models_completes_and_chats(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    text = client.completions.create(model="tiny", prompt="Once", max_tokens=6, temperature=0)
    assert (text.choices[0].finish_reason, text.usage.completion_tokens) == ("length", 6)
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    assert chat.choices[0].message.role == "assistant"
    content = chat.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == chat.choices[0].message.content
    assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in content)


def test_the_openai_package_streams_the_same(client):
    options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert (chunks[0].choices[0].delta.role, chunks[-1].usage.completion_tokens) == ("assistant", 12)


def test_the_openai_package_gets_json(client):
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "paint", "schema": schema}},
    )  # fmt: skip
    assert json.loads(chat.choices[0].message.content)["colour"] in ("red", "blue")


def test_the_openai_package_gets_vectors(client):
    answer = client.embeddings.create(model="tiny", input=["one", "two"])
    assert [len(entry.embedding) for entry in answer.data] == [CONFIG.n_embd] * 2


def test_the_openai_package_understands_errors(client, address):
    with pytest.raises(openai.BadRequestError, match="exceeds the available context size"):
        client.completions.create(model="tiny", prompt=[5] * 2000)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=[{"role": "user"}])  # type: ignore[list-item]


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "at once"])
def test_a_client_that_goes_stops_its_work(address, stream):
    host, port = address.removeprefix("http://").split(":")
    with decodes() as held, cancelling() as cancelled:
        held.let(3)
        asking = http.client.HTTPConnection(host, int(port))
        body = {"prompt": "Once", "n_predict": 900, "ignore_eos": True, "stream": stream}
        asking.request("POST", "/completion", json.dumps(body), {"Authorization": f"Bearer {KEY}"})
        held.wait_held()
        (slot,) = busy(address)
        assert not cancelled.is_set()
        asking.close()
        assert cancelled.wait(TIMEOUT)  # the server has noticed, while a decode is held
        n_decodes = decoded(address)
        held.open()
        until(lambda: not busy(address))
        assert decoded(address) == n_decodes
    assert slot["next_token"][0]["n_remain"] > 0


def busy(address: str) -> list[Any]:
    return [slot for slot in json.loads(curl(address, "/slots")) if slot["is_processing"]]


def decoded(address: str) -> float:
    """Calls of llama_decode so far."""
    (line,) = [line for line in curl(address, "/metrics").splitlines() if line.startswith("llamacpp:n_decode_total ")]
    return float(line.split()[1])


def test_curl_without_headers_is_understood(address):
    body = json.loads(curl(address, "/completion", "-d", '{"prompt": "Once", "n_predict": 3}'))
    assert body["tokens_predicted"] == 3
    lines = curl(
        address, "/v1/chat/completions", "-N", "-d", json.dumps({"messages": MESSAGES, "max_tokens": 2, "stream": True})
    )
    assert lines.strip().endswith("data: [DONE]")


def test_a_short_answer_does_not_wait_for_a_long_prompt(client):
    """The short request is done while the long one is held in the middle of its prompt."""

    def ask(n_prompt: int, id_slot: int) -> None:
        client.completions.create(
            model="tiny", prompt=[7] * n_prompt, max_tokens=4, extra_body={"cache_prompt": False, "id_slot": id_slot}
        )

    with decodes("slot-0") as held:
        held.let(2)
        long = threading.Thread(target=ask, args=(960, 0))
        long.start()
        held.wait_held()
        ask(8, 1)
        assert (held.n_passed, long.is_alive()) == (2, True)
        held.open()
        long.join(TIMEOUT)
    assert not long.is_alive()
    assert held.n_passed == 15 + 3


def test_a_slot_that_works_says_what_it_does_until_the_stream_is_closed(client, address):
    with decodes() as held, cancelling() as cancelled:
        held.let(6)
        stream = client.completions.create(
            model="tiny", prompt="Once", max_tokens=800, stream=True, extra_body={"ignore_eos": True, "top_k": 9}
        )
        for _, _ in zip(range(5), stream, strict=False):
            pass
        held.wait_held()
        (slot,) = busy(address)
        stream.close()
        assert cancelled.wait(TIMEOUT)
        held.open()
        until(lambda: not busy(address))
    (step,) = slot["next_token"]
    assert step == {"has_next_token": True, "has_new_line": step["has_new_line"], "n_remain": 794, "n_decoded": 6}
    assert (slot["params"]["top_k"], slot["n_prompt_tokens_processed"] + slot["n_prompt_tokens_cache"] > 0) == (9, True)
    assert held.n_passed == 7


def test_langchains_chat_model(address):
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(base_url=f"{address}/v1", api_key=KEY, model="tiny", max_tokens=8, temperature=0)
    whole = model.invoke("Hello, who are you?")
    assert whole.usage_metadata["output_tokens"] == 8
    assert "".join(chunk.content for chunk in model.stream("Hello, who are you?")) == whole.content


@pytest.mark.parametrize("path", ["/completion", "/v1/completions", "/v1/chat/completions"])
def test_a_stream_shows_that_it_is_alive_while_a_prompt_is_read(tiny_model, monkeypatch, path):
    """Clients and proxies give up on silence. The prompt is read when the comments have come."""
    monkeypatch.setattr(streams, "ALIVE_SECONDS", 0.01)
    body = {"prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}], "n_predict": 2, "stream": True}
    options = tiny_options(tiny_model(CONFIG), n_parallel=1, chat_template="chatml")
    with running(options) as address, decodes() as held:
        held.let(0)
        with httpx.stream("POST", address + path, json=body, timeout=TIMEOUT) as answer:
            assert answer.status_code == 200
            lines = answer.iter_lines()
            assert [next(lines) for _ in range(6)] == [":", ""] * 3
            assert held.n_passed == 0
            held.open()
            rest = [line for line in lines if line and line != ":"]
    assert len(rest) >= 3
    assert all(line.startswith("data: ") for line in rest)
