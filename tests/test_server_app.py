"""The routes, on a tiny model of random weights."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import greedy
from fastapi.testclient import TestClient

from kvcompose_gguf import KVCompose
from kvcompose_gguf.server import infill
from kvcompose_gguf.server.app import create_app, slot_filename
from kvcompose_gguf.server.command import make_engine
from kvcompose_gguf.server.errors import ApiError
from kvcompose_gguf.server.options import ServeOptions

CONFIG = tiny.GQA
METHOD = KVCompose(compression_ratio=0.5, scoring="repeat", min_tokens=100, keep_last=8)
PROMPT = "The quick brown fox jumps over the lazy dog. "
TIMINGS = (
    "cache_n", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second", "predicted_n", "predicted_ms",
    "predicted_per_token_ms", "predicted_per_second",
)  # fmt: skip


@pytest.fixture
def start(tiny_model) -> Iterator[Callable[..., TestClient]]:
    """Starts a server on the tiny model."""
    running: list[TestClient] = []

    def start(**options: Any) -> TestClient:
        defaults: dict[str, Any] = {
            "model_path": tiny_model(CONFIG), "n_ctx": 2048, "n_parallel": 2, "threads": 1, "n_batch": 64, "type_k": 0,
            "type_v": 0, "flash_attn": False, "alias": "tiny",
        }  # fmt: skip
        made = ServeOptions(**(defaults | options))
        client = TestClient(create_app(made, lambda: make_engine(made)), raise_server_exceptions=False)
        client.__enter__()
        running.append(client)
        return client

    yield start
    for client in running:
        client.__exit__(None, None, None)


def post(client: TestClient, path: str, status: int = 200, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def events(client: TestClient, path: str, **body: Any) -> tuple[list[Any], bool]:
    """The chunks of a streamed answer, and whether it ended with [DONE]."""
    with client.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    done = lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[: len(lines) - done]], done


#
# llama-server's completions
#


def test_a_greedy_completion_is_the_models(start, make_llama):
    client = start()
    prompt = tiny.tokens(CONFIG, 40)
    body = post(client, "/completion", prompt=prompt, n_predict=12, temperature=0, return_tokens=True)
    assert body["tokens"] == greedy(make_llama(CONFIG, n_threads=1, n_threads_batch=1, n_batch=64), prompt, 12)
    assert (body["stop"], body["stop_type"], body["truncated"], body["model"]) == (True, "limit", False, "tiny")
    assert (body["tokens_evaluated"], body["tokens_predicted"], body["tokens_cached"]) == (40, 12, 51)
    assert set(TIMINGS) <= set(body["timings"])
    assert (body["timings"]["prompt_n"], body["timings"]["predicted_n"]) == (40, 12)
    again = post(client, "/completion", prompt=prompt, n_predict=12, temperature=0, return_tokens=True)
    assert again["tokens"] == body["tokens"]
    assert (again["timings"]["cache_n"], again["timings"]["prompt_n"]) == (39, 1)
    anew = post(client, "/completion", prompt=prompt, n_predict=12, temperature=0, cache_prompt=False)
    assert (anew["timings"]["cache_n"], anew["content"], anew["tokens"]) == (0, body["content"], [])


def test_a_streamed_completion_says_the_same_token_by_token(start):
    client = start()
    options = {"prompt": PROMPT, "n_predict": 20, "seed": 7, "temperature": 1.0}
    whole = post(client, "/completion", **options, return_tokens=True)
    chunks, done = events(client, "/completion", **options)
    assert not done
    *parts, last = chunks
    assert [part["tokens"][0] for part in parts] == whole["tokens"]
    assert "".join(part["content"] for part in parts) == whole["content"]
    assert [part["tokens_predicted"] for part in parts] == list(range(1, 21))
    assert not any(part["stop"] for part in parts)
    assert (last["stop"], last["content"], last["tokens"], last["stop_type"]) == (True, "", [], "limit")
    assert last["generation_settings"]["seed"] == 7


def test_seeds_decide(start):
    client = start()
    texts = [post(client, "/completion", prompt=PROMPT, n_predict=16, temperature=1.5, seed=s)["content"] for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert post(client, "/completion", prompt=PROMPT, n_predict=1)["generation_settings"]["seed"] != 0xFFFFFFFF


def test_several_prompts_have_several_answers_in_their_order(start):
    client = start()
    tokens = client.post("/tokenize", json={"content": PROMPT, "add_special": True}).json()["tokens"]
    options = {"n_predict": 5, "temperature": 0}
    alone = post(client, "/completion", prompt=PROMPT, **options)["content"]
    both = post(client, "/completion", prompt=[tokens, PROMPT, [*tokens[:3], PROMPT]], **options)
    assert [body["index"] for body in both] == [0, 1, 2]
    assert [body["content"] for body in both[:2]] == [alone, alone]
    assert post(client, "/completion", prompt=[{"prompt_string": PROMPT}], **options)["content"] == alone
    assert isinstance(post(client, "/completion", prompt=[5, 6, "and", 7], **options), dict)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "must not be empty"), ([[]], "elements must be"), ({"text": "x"}, "prompt"), (3, "prompt"), ([[5, 10**6]], "invalid tokens"),
        ([5, -1], "invalid tokens"), ({"prompt_string": "x", "multimodal_data": ["eA=="]}, "does not support multimodal"),
        ([True], "elements must be"), (None, "prompt"), ([["x", 1.5]], "elements must be"),
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_refused(start, prompt, words):
    error = post(start(), "/completion", 400, prompt=prompt)["error"]
    assert (error["code"], error["type"]) == (400, "invalid_request_error")
    assert words in error["message"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_predict": -2}, "n_predict"), ({"repeat_last_n": -1}, "repeat_last_n"), ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"grammar": "root ::= ("}, "grammar"), ({"json_schema": 3}, "JSON schema"), ({"json_schema": {"type": 3}}, "JSON schema"),
        ({"seed": "x"}, "seed"), ({"stop": [3]}, "stop"), ({"n": 3}, "between 1 <= value <= 2"), ({"id_slot": 9}, "there are 2 slots"),
        ({"kv_compress": {"ratio": 1.5}}, "ratio"), ({"kv_compress": {"method": "os:system"}}, "is none of"),
        ({"kv_compress": {"ratio": 0.5, "n_kept": 3}}, "exactly one"), ({"kv_compress": {"budget": 3}}, "budget"),
        ({"kv_compress": True}, "without a budget"), ({"kv_compress": {}}, "exactly one"),
        ({"kv_compress": {"ratio": 0.5, "method": "unstructured"}}, "simulated"), ({"kv_compress": {"ratio": 0.9, "method": "compresskv"}}, "calibrat"),
        ({"temperature": float("nan")}, ""), ({"presence_penalty": 1e999}, ""), ({"dry_sequence_breakers": []}, "dry_sequence_breakers"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(start, options, words):
    client = start()
    answer = client.post("/completion", content=json.dumps({"prompt": PROMPT, "n_predict": 2, **options}))
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]
    assert post(client, "/completion", prompt=PROMPT, n_predict=1)["tokens_predicted"] == 1


def test_bad_json_and_unknown_routes_have_llama_servers_errors(start):
    client = start()
    assert client.post("/completion", content=b"{").json()["error"]["code"] == 400
    assert client.post("/completion", content=b"\xff\xfe").status_code == 400
    assert client.get("/nothing").json()["error"] == {"code": 404, "message": "File Not Found", "type": "not_found_error"}
    assert client.delete("/completion").status_code == 404
    for path in ("/v1/rerank", "/v1/embeddings", "/v1/messages", "/slots/0?action=save", "/props"):
        assert client.post(path, json={"input": "x"}).json()["error"]["type"] == "not_supported_error"


def test_a_prompt_that_does_not_fit_is_told_with_its_numbers(start):
    client = start()
    error = post(client, "/completion", 400, prompt=tiny.tokens(CONFIG, 1024))["error"]
    assert error["type"] == "exceed_context_size_error"
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (1024, 1024)
    streamed = client.post("/v1/completions", json={"prompt": tiny.tokens(CONFIG, 1024), "stream": True})
    assert (streamed.status_code, streamed.json()["error"]["n_ctx"]) == (400, 1024)
    body = post(client, "/completion", prompt=tiny.tokens(CONFIG, 1020), temperature=0, ignore_eos=True)
    assert (body["tokens_predicted"], body["truncated"], body["stop_type"]) == (4, True, "limit")


def test_stop_texts_end_an_answer_before_them(start):
    client = start()
    options = {"prompt": PROMPT, "n_predict": 30, "temperature": 0}
    text = post(client, "/completion", **options)["content"]
    stop = text[9:12]
    body = post(client, "/completion", **options, stop=["never", stop])
    assert body["content"] == text[: text.index(stop)]
    assert (body["stop_type"], body["stopping_word"]) == ("word", stop)
    chunks, _ = events(client, "/completion", **options, stop=stop)
    assert "".join(chunk["content"] for chunk in chunks) == body["content"]


def test_a_grammar_and_a_schema_bind_the_answer(start):
    client = start()
    options = {"prompt": PROMPT, "n_predict": 60, "temperature": 1.0, "seed": 3}
    assert post(client, "/completion", **options, grammar='root ::= "a"{5,5}')["content"] == "aaaaa"
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]}
    assert 0 <= json.loads(post(client, "/completion", **options, json_schema=schema)["content"])["n"] <= 9


@pytest.mark.parametrize("after", [False, True])
def test_probabilities_come_with_the_tokens(start, after):
    client = start()
    options = {"prompt": PROMPT, "n_predict": 4, "temperature": 1.0, "n_probs": 3, "seed": 5, "post_sampling_probs": after}
    body = post(client, "/completion", **options)
    value, best = ("prob", "top_probs") if after else ("logprob", "top_logprobs")
    assert len(body["completion_probabilities"]) == 4
    for entry in body["completion_probabilities"]:
        values = [other[value] for other in entry[best]]
        assert 0 < len(values) <= 3
        assert values == sorted(values, reverse=True)
        assert entry["bytes"] == list(bytes(entry["bytes"]))
        assert 0 < entry[value] <= 1 if after else entry[value] <= 0
    assert "".join(entry["token"] for entry in body["completion_probabilities"]) == body["content"]
    chunks, _ = events(client, "/completion", **options)
    parts = [chunk["completion_probabilities"] for chunk in chunks[:-1]]
    assert [len(part) for part in parts] == [1] * 4
    assert [part[0]["id"] for part in parts] == [entry["id"] for entry in body["completion_probabilities"]]


def test_a_bias_forbids_and_forces_tokens(start):
    client = start()
    options = {"prompt": PROMPT, "n_predict": 10, "temperature": 1.0, "return_tokens": True}
    forced = post(client, "/completion", **options, logit_bias=[[65, 100.0]])
    assert forced["tokens"] == [65] * 10
    for bias in ([[65, 100.0], [65, False]], {"65": -1000}):
        assert 65 not in post(client, "/completion", **options, logit_bias=bias)["tokens"]
    ignoring = post(client, "/completion", **options, ignore_eos=True)["generation_settings"]["logit_bias"]
    assert ignoring
    assert all(entry["bias"] is None for entry in ignoring)


def test_only_the_fields_that_were_asked_for_come(start):
    body = post(
        start(), "/completion", prompt=PROMPT, n_predict=3, response_fields=["content", "generation_settings/n_predict", "x/y"]
    )  # fmt: skip
    assert set(body) == {"content", "generation_settings/n_predict"}
    assert body["generation_settings/n_predict"] == 3


def test_the_prompts_progress_is_told(start):
    chunks, _ = events(start(), "/completion", prompt=tiny.tokens(CONFIG, 200), n_predict=2, return_progress=True)
    progress = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    assert [part["processed"] for part in progress] == [0, 64, 128, 192, 200]
    assert {(part["total"], part["cache"]) for part in progress} == {(200, 0)}


#
# OpenAI's
#


def test_openais_completions(start):
    client = start()
    options = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    body = post(client, "/v1/completions", **options, logprobs=2)
    assert (body["object"], body["model"], body["id"][:9]) == ("text_completion", "tiny", "chatcmpl-")
    assert body["choices"][0]["finish_reason"] == "length"
    assert len(body["choices"][0]["logprobs"]["content"]) == 6
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] == usage["prompt_tokens"] + 6
    chunks, done = events(client, "/v1/completions", **options)
    assert done
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == body["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 6 + ["length"]
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_several_choices_differ_by_their_seeds(start):
    body = post(start(), "/v1/completions", prompt=PROMPT, n=2, max_tokens=12, temperature=1.5, seed=4)
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["choices"][0]["text"] != body["choices"][1]["text"]


def test_a_chat(start):
    client = start()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    options = {"messages": messages, "max_tokens": 8, "temperature": 0}
    prompt = post(client, "/apply-template", messages=messages)["prompt"]
    assert prompt == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    body = post(client, "/v1/chat/completions", **options)
    message = body["choices"][0]["message"]
    assert message == {"role": "assistant", "content": post(client, "/completion", prompt=prompt, n_predict=8, temperature=0)["content"]}
    assert body["object"] == "chat.completion"
    chunks, done = events(client, "/v1/chat/completions", **options, stream_options={"include_usage": True})
    assert done
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks[:-1]) == message["content"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 8)
    assert "timings" in chunks[-1]
    counted = post(client, "/v1/chat/completions/input_tokens", messages=messages)
    assert counted["input_tokens"] == body["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    "messages",
    [
        None, "text", [123], [{}], [{"role": 123}], [{"role": "system", "content": 123}], [{"role": "user", "content": "x"}, {}],
        [{"role": "user", "content": [{"type": "sound"}]}], [{"role": "assistant"}], [{"role": "user", "content": None}],
        [{"role": r, "content": "x"} for r in ("user", "assistant", "assistant")],
        [{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}],
    ],
    ids=str,
)  # fmt: skip
def test_what_are_no_messages_is_refused(start, messages):
    assert post(start(), "/v1/chat/completions", 400, messages=messages)["error"]["message"]


def test_images_are_not_supported(start):
    part = {"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}
    error = post(start(), "/v1/chat/completions", 500, messages=[{"role": "user", "content": [part]}])["error"]
    assert "image input is not supported" in error["message"]


@pytest.mark.parametrize(
    ("response_format", "check"),
    [
        ({"type": "json_object", "schema": {"const": "42"}}, lambda text: text == '"42"'),
        ({"type": "json_schema", "json_schema": {"schema": {"const": "foo"}}}, lambda text: text == '"foo"'),
        ({"type": "text"}, lambda text: True),
    ],
)
def test_response_formats(start, response_format, check):
    messages = [{"role": "user", "content": "Hi"}]
    body = post(start(), "/v1/chat/completions", messages=messages, response_format=response_format, max_tokens=20)
    assert check(body["choices"][0]["message"]["content"])


TOOLS_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_tool_that_has_to_be_called_is(start):
    client = start(chat_template=TOOLS_TEMPLATE)
    parameters = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    options = {
        "messages": [{"role": "user", "content": "Hi"}], "tools": [tool], "tool_choice": "required", "max_tokens": 80,
        "temperature": 1.0, "seed": 1,
    }  # fmt: skip
    choice = post(client, "/v1/chat/completions", **options)["choices"][0]
    call = choice["message"]["tool_calls"][0]
    assert (choice["finish_reason"], call["function"]["name"]) == ("tool_calls", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    chunks, _ = events(client, "/v1/chat/completions", **options)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    (calls,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert (calls[0]["index"], calls[0]["type"], calls[0]["function"]) == (0, "function", call["function"])
    assert not any(delta.get("content") for delta in deltas)
    assert post(start(), "/v1/chat/completions", 501, messages=options["messages"], tools=[tool])["error"]["message"]


#
# compression
#


def test_prompts_are_compressed_as_the_server_or_the_request_says(start):
    client = start(method=METHOD)
    prompt = tiny.tokens(CONFIG, 308)
    options = {"prompt": prompt, "n_predict": 4, "temperature": 0}
    kv = post(client, "/completion", **options)["timings"]["kv"]
    assert (kv["n_tokens"], sum(kv["n_kept"])) == (300, 300 * CONFIG.n_layer // 2)
    assert kv["bytes"] == kv["bytes_full"] / 2
    again = post(client, "/completion", **options)["timings"]
    assert (again["cache_n"], again["kv"]["n_kept"]) == (307, kv["n_kept"])
    tighter = post(client, "/completion", **options, kv_compress={"ratio": 0.75})["timings"]["kv"]
    assert sum(tighter["n_kept"]) == 300 * CONFIG.n_layer // 4
    other = post(client, "/completion", **options, kv_compress={"method": "streaming-llm", "n_kept": 50})["timings"]["kv"]
    assert other["n_kept"] == [50] * CONFIG.n_layer
    assert "kv" not in post(client, "/completion", **options, kv_compress=False)["timings"]
    short = {**options, "prompt": prompt[:60]}
    assert "kv" not in post(client, "/completion", **short)["timings"]
    slots = [slot for slot in client.get("/slots").json() if slot.get("kv_bytes")]
    assert slots


def test_what_is_kept_of_a_context_is_told(start):
    client = start(method=METHOD)
    assert client.get("/kv/slots/0").json() == {"id": 0, "pieces": [], "shares": []}
    prompt = tiny.tokens(CONFIG, 308)
    kv = post(client, "/completion", prompt=prompt, n_predict=2, id_slot=1)["timings"]["kv"]
    assert [slot["id"] for slot in client.get("/kv/slots").json()] == [1, 0]
    told = client.get("/kv/slots/1").json()
    assert (len(told["pieces"]), len(told["shares"])) == (300, 300)
    assert "".join(told["pieces"]) == post(client, "/detokenize", tokens=prompt[:300])["content"]
    # a layer's heads keep as many tokens each
    assert sum(told["shares"]) == pytest.approx(sum(kv["n_kept"]) / CONFIG.n_layer, rel=1e-3)
    assert 0 <= min(told["shares"]) < max(told["shares"]) <= 1
    assert client.get("/kv/slots/2").status_code == 400


def test_a_document_is_compressed_once_and_continued(start):
    client = start(method=METHOD)
    document = tiny.tokens(CONFIG, 300)
    told = post(client, "/kv/compress", prompt=document)
    assert (told["n_tokens"], told["kv"]["n_tokens"]) == (300, 300)
    body = post(client, "/completion", prompt=[*document, 5, 6, 7], n_predict=2, temperature=0)
    assert (body["id_slot"], body["timings"]["cache_n"], body["timings"]["prompt_n"]) == (told["id_slot"], 300, 3)
    assert body["timings"]["kv"] == told["kv"]
    assert post(start(), "/kv/compress", 400, prompt="x")["error"]["message"].startswith("kv_compress")


#
# vectors and holes
#


def test_vectors_of_texts(start):
    client = start(embeddings=128, pooling="mean")
    one = post(client, "/v1/embeddings", input=PROMPT)
    assert (one["object"], one["model"], one["data"][0]["index"]) == ("list", "tiny", 0)
    vector = np.array(one["data"][0]["embedding"])
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    tokens = client.post("/tokenize", json={"content": PROMPT, "add_special": True}).json()["tokens"]
    assert one["usage"] == {"prompt_tokens": len(tokens), "total_tokens": len(tokens)}
    several = post(client, "/v1/embeddings", input=[tokens, PROMPT, "other", {"content": [{"type": "text", "text": PROMPT}]}])
    got = [np.array(entry["embedding"]) for entry in several["data"]]
    for same in (got[0], got[1], got[3]):
        np.testing.assert_allclose(same, vector, atol=1e-5)
    assert np.abs(got[2] - vector).max() > 0.01
    packed = post(client, "/v1/embeddings", input=PROMPT, encoding_format="base64")["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), "<f4"), vector, atol=1e-6)
    raw = np.array(post(client, "/embedding", content=PROMPT, embd_normalize=-1)[0]["embedding"][0])
    np.testing.assert_allclose(raw / np.linalg.norm(raw), vector, atol=1e-5)
    largest = np.array(post(client, "/embedding", content=PROMPT, embd_normalize=0)[0]["embedding"][0])
    assert np.abs(largest).max() == pytest.approx(32760, rel=1e-5)
    # a completion beside it has its own cache
    assert post(client, "/completion", prompt=PROMPT, n_predict=2)["tokens_predicted"] == 2


def test_a_vector_for_every_token(start):
    client = start(embeddings=128, pooling="none")
    (entry,) = post(client, "/embeddings", input="some text")
    n = len(client.post("/tokenize", json={"content": "some text", "add_special": True}).json()["tokens"])
    assert np.shape(entry["embedding"]) == (n, CONFIG.n_embd)
    assert "Pooling type 'none'" in post(client, "/v1/embeddings", 400, input="x")["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "must be provided"), ({"input": []}, 400, "must not be empty"), ({"input": ""}, 400, "cannot be empty"),
        ({"input": "x", "encoding_format": "hex"}, 400, "encoding_format"), ({"input": [5] * 129}, 500, "too large to process"),
        ({"input": [{"content": 3}]}, 400, "must be an array"), ({"input": {"x": 1}}, 400, "elements must be"),
    ],
)  # fmt: skip
def test_what_has_no_vector_is_refused(start, body, status, words):
    assert words in post(start(embeddings=128, pooling="last"), "/v1/embeddings", status, **body)["error"]["message"]


def test_a_hole_is_filled_from_both_sides(start, monkeypatch):
    client = start()
    body = {"input_prefix": "def f(", "input_suffix": "return x", "n_predict": 3, "temperature": 0}
    assert "prefix token is missing" in post(client, "/infill", 501, **body)["error"]["message"]
    ids = {"pre": 40, "suf": 41, "mid": 42, "rep": None, "sep": 43}
    monkeypatch.setattr(infill, "_token", lambda llama, name: ids[name])

    def tokens(text: str) -> list[int]:
        return client.post("/tokenize", json={"content": text, "parse_special": False}).json()["tokens"]

    extra = [{"filename": "a.py", "text": "import b"}]
    want = [
        43, *tokens("a.py\n"), *tokens("import b"), 43, *tokens("filename\n"), 1, 40, *tokens("def f("), *tokens("x"),
        41, *tokens("return x"), 42,
    ]  # fmt: skip
    got = post(client, "/infill", **body, prompt="x", input_extra=extra)
    same = post(client, "/completion", prompt=want, n_predict=3, temperature=0)
    assert (got["prompt"], got["content"]) == (same["prompt"], same["content"])
    for wrong in ([{}], [{"filename": "ok"}], [{"filename": 3, "text": "abc"}], [3]):
        post(client, "/infill", 400, **body, input_extra=wrong)


#
# saved slots
#


@pytest.mark.parametrize("method", [None, METHOD], ids=["full", "compressed"])
def test_a_slot_is_saved_and_restored_elsewhere(start, tmp_path, method):
    client = start(method=method, slot_save_path=tmp_path)
    prompt, other = tiny.tokens(CONFIG, 308), tiny.tokens(CONFIG, 40, seed=9)
    options = {"n_predict": 4, "temperature": 0}
    first = post(client, "/completion", prompt=prompt, id_slot=1, **options)
    saved = post(client, "/slots/1?action=save", filename="one.bin")
    assert (saved["id_slot"], saved["n_saved"], saved["n_written"]) == (1, 311, (tmp_path / "one.bin").stat().st_size)
    post(client, "/completion", prompt=other, id_slot=1, **options)
    read = post(client, "/slots/0?action=restore", filename="one.bin")
    assert (read["n_restored"], read["n_read"]) == (311, saved["n_written"])
    again = post(client, "/completion", prompt=prompt, id_slot=0, **options)
    assert (again["content"], again["timings"]["cache_n"]) == (first["content"], 307)
    if method is not None:  # the context is the same one, compressed and not read again
        assert saved["n_written"] < 0.7 * full_size(start, tmp_path, prompt)
    assert client.post("/slots/0?action=erase").json() == {"id_slot": 0, "n_erased": 311}
    assert post(client, "/completion", prompt=prompt, id_slot=0, **options)["timings"]["cache_n"] == 0


def test_slots_are_saved_and_erased_under_a_budget_as_well(start, tmp_path):
    client = start(slot_save_path=tmp_path, kv_budget=2 * 1024 * 2048)
    post(client, "/completion", prompt=tiny.tokens(CONFIG, 900), id_slot=0, n_predict=4)
    assert post(client, "/slots/0?action=save", filename="one.bin")["n_saved"] == 903
    assert client.post("/slots/0?action=erase").json()["n_erased"] == 903


def full_size(start: Any, folder: Path, prompt: list[int]) -> int:
    client = start(slot_save_path=folder)
    post(client, "/completion", prompt=prompt, id_slot=0, n_predict=4, temperature=0)
    return post(client, "/slots/0?action=save", filename="full.bin")["n_written"]


def test_files_that_are_no_slots_are_refused_and_the_slot_keeps_what_it_has(start, tmp_path):
    client = start(slot_save_path=tmp_path)
    prompt = tiny.tokens(CONFIG, 60)
    post(client, "/completion", prompt=prompt, id_slot=0, n_predict=2)
    post(client, "/slots/0?action=save", filename="good.bin")
    good = (tmp_path / "good.bin").read_bytes()
    damaged = {
        "empty": b"", "short": good[:200], "cut": good[:-5], "flipped": good[:-50] + b"x" + good[-49:], "magic": b"x" + good[1:],
        "count": good[:8] + b"\xff\xff\xff\x7f" + good[12:], "tokens": good[:20] + b"\xff\xff\xff\x7f" + good[24:],
    }  # fmt: skip
    for name, raw in damaged.items():
        (tmp_path / name).write_bytes(raw)
        error = post(client, "/slots/0?action=restore", 400, filename=name)["error"]
        assert error["message"].startswith("Unable to restore slot"), name
    assert post(client, "/slots/0?action=restore", 400, filename="none")["error"]["message"].startswith("Unable to restore")
    assert post(client, "/completion", prompt=prompt, id_slot=0, n_predict=1)["timings"]["cache_n"] == 59


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/slots/x?action=save", {"filename": "a"}, "Invalid slot ID"), ("/slots/0?action=dance", {"filename": "a"}, "Invalid action"),
        ("/slots/0?action=save", {"filename": "../a"}, "Invalid filename"), ("/slots/0?action=restore", {}, "Invalid filename"),
        ("/slots/0?action=save", {"filename": 3}, "Invalid filename"), ("/slots/0?action=save", [], "Invalid filename"),
    ],
)  # fmt: skip
def test_slot_actions_that_make_no_sense_are_refused(start, tmp_path, path, body, words):
    answer = start(slot_save_path=tmp_path).post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, words)
    assert list(tmp_path.iterdir()) == []
    assert start().post(path, json=body).status_code == 501


#
# the server
#


def test_what_is_told_about_the_server(start):
    client = start(method=METHOD)
    assert client.get("/health").json() == client.get("/v1/health").json() == {"status": "ok"}
    props = client.get("/props").json()
    assert props["model_path"].endswith(".gguf")
    assert (props["total_slots"], props["default_generation_settings"]["n_ctx"]) == (2, 1024)
    assert props["default_generation_settings"]["params"]["top_k"] == 40
    assert "compression_ratio=0.5" in props["kv_compress"]
    models = client.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["tiny"]
    page = client.get("/")
    assert "<!doctype html>" in page.text
    for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript")):
        assert client.get(f"/{name}").headers["content-type"].startswith(kind)
        assert name in page.text
    assert "http" not in page.text  # nothing comes from elsewhere
    assert start(ui=False).get("/").status_code == 404
    assert [set(slot) for slot in client.get("/slots").json()] == [{"id", "n_ctx", "speculative", "is_processing"}] * 2


def test_tokens_and_texts(start):
    client = start()
    text = "Héllo 🙂 world"
    tokens = post(client, "/tokenize", content=text)["tokens"]
    # the tiny vocabulary's texts show their spaces
    assert post(client, "/detokenize", tokens=tokens)["content"].replace("▁", " ").strip() == text
    pieces = post(client, "/tokenize", content=text, with_pieces=True)["tokens"]
    assert [piece["id"] for piece in pieces] == tokens
    raw = b"".join(bytes(p["piece"]) if isinstance(p["piece"], list) else p["piece"].encode() for p in pieces)
    assert raw.decode().replace("▁", " ").strip() == text
    assert post(client, "/tokenize", content=[5, "a", 7])["tokens"][0] == 5
    assert post(client, "/tokenize")["tokens"] == []
    assert post(client, "/detokenize", 400, tokens=[-1])["error"]["message"] == "Prompt contains invalid tokens"


def test_metrics_are_the_sums_of_the_answers(start):
    client = start(method=METHOD)
    bodies = [post(client, "/completion", prompt=tiny.tokens(CONFIG, n), n_predict=4) for n in (20, 20, 308)]
    text = client.get("/metrics").text
    values = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line and line[0] != "#"}
    for name, field in (("prompt_tokens", "prompt_n"), ("prompt_tokens_cached", "cache_n"), ("tokens_predicted", "predicted_n")):
        assert values[f"llamacpp:{name}_total"] == sum(body["timings"][field] for body in bodies)
        assert f"# TYPE llamacpp:{name}_total counter" in text
        assert f"# HELP llamacpp:{name}_total " in text
    assert values["llamacpp:n_decode_total"] > 0
    assert values["llamacpp:requests_processing"] == values["llamacpp:requests_deferred"] == 0
    assert values["kvcompose_removed_ratio_count"] == 1
    assert start(endpoint_metrics=False).get("/metrics").json()["error"]["type"] == "not_supported_error"


def test_keys_are_asked_for(start):
    client = start(api_keys=("secret",))
    assert client.get("/props").status_code == 401
    assert client.get("/health").status_code == 200
    assert client.get("/props", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_a_full_queue_says_when_to_come_again(start):
    client = start(n_parallel=1, n_queue=0)
    started = threading.Event()

    def run() -> None:
        with client.stream("POST", "/completion", json={"prompt": PROMPT, "ignore_eos": True, "stream": True}) as answer:
            for _ in answer.iter_lines():
                started.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(30)
    answer = client.post("/completion", json={"prompt": PROMPT, "n_predict": 1})
    thread.join()
    assert (answer.status_code, answer.headers.get("Retry-After")) == (503, "1")
    assert answer.json()["error"]["type"] == "unavailable_error"


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a\\b", "a..b", " a", "a.", "a\n", "a" * 256, "c:x", "/etc/passwd"])
def test_names_of_slot_files_are_no_paths(name):
    assert slot_filename("slot-1.bin") == "slot-1.bin"
    with pytest.raises(ApiError, match="Invalid filename"):
        slot_filename(name)
