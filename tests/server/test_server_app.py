"""The routes, on a tiny model of random weights."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from support import tiny
from support.llamas import greedy
from support.serving import CONFIG, events, post

from kvcompose_gguf.server import infill

PROMPT = "The quick brown fox jumps over the lazy dog. "
TIMINGS = (
    "cache_n", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second", "predicted_n", "predicted_ms",
    "predicted_per_token_ms", "predicted_per_second",
)  # fmt: skip


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


def test_nothing_is_lost_of_a_stream_that_ends_before_a_stop_text(start):
    """What might have become a stop text comes when the answer is over, whatever ended it."""
    client = start()
    options = {"prompt": PROMPT, "temperature": 0, "n_predict": 12, "grammar": 'root ::= "ab" [x-z]{4} "##"'}
    whole = post(client, "/completion", **options, stop=["###"])
    assert whole["content"].endswith("##")
    chunks, _ = events(client, "/completion", **options, stop=["###"])
    assert "".join(chunk["content"] for chunk in chunks) == whole["content"]
    chunks, _ = events(client, "/v1/completions", **options, stop=["###"])
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["content"]


def test_an_event_is_one_line_for_every_client(start):
    """Some of them end a line where Unicode does."""
    client = start()
    ends = "a\u2028b\u2029c\x85d"
    chunks, _ = events(client, "/completion", prompt=PROMPT, grammar=f'root ::= "{ends}"', n_predict=30)
    assert "".join(chunk["content"] for chunk in chunks) == ends
    with client.stream("POST", "/completion", json={"prompt": PROMPT, "grammar": f'root ::= "{ends}"', "n_predict": 30, "stream": True}) as answer:
        raw = b"".join(answer.iter_bytes()).decode()
    assert not set("\u2028\u2029\x85") & set(raw)


def test_lines_that_are_not_indented_end_an_answer(start):
    client = start()
    options = {"prompt": PROMPT, "temperature": 0, "n_predict": 40, "grammar": 'root ::= "ab\\n  cd\\n\\n   ef\\n gh" [a-z]{20}'}
    body = post(client, "/completion", **options, n_indent=2)
    assert (body["content"], body["stop_type"]) == ("ab\n  cd\n\n   ef\n ", "limit")
    assert post(client, "/completion", **options, n_indent=1)["content"].startswith("ab\n  cd\n\n   ef\n gh")


def test_more_prompts_than_slots_and_queue_are_streamed_in_turn(start):
    client = start(n_queue=1)
    chunks, _ = events(client, "/completion", prompt=[PROMPT] * 7, n_predict=1)
    assert sorted(chunk["index"] for chunk in chunks if chunk["stop"]) == list(range(7))


@pytest.mark.parametrize("continued", [False, True])
def test_a_message_that_is_continued_is_told_with_its_beginning(start, continued):
    client = start(chat_template="chatml")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well then"}]
    options = {"messages": messages, "max_tokens": 4, "temperature": 0}
    if continued:
        options |= {"continue_final_message": True, "add_generation_prompt": False}
    whole = post(client, "/v1/chat/completions", **options)["choices"][0]["message"]["content"]
    assert whole.startswith("Well then")
    chunks, _ = events(client, "/v1/chat/completions", **options)
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    assert text == (whole.removeprefix("Well then") if continued else whole)
    assert post(client, "/apply-template", messages=messages)["prompt"].endswith("<|im_start|>assistant\nWell then")


def test_halves_of_characters_are_no_reason_to_fail(start):
    client = start(chat_template="chatml")
    body = '{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1%s}'
    assert client.post("/v1/chat/completions", content=body % "").status_code == 200
    for more in (', "response_format": {"type": "\\ud800"}', ', "json_schema": {"const": "\\ud800"}', ', "grammar": "\\ud800"'):
        assert client.post("/v1/chat/completions", content=body % more).status_code in (200, 400)
    assert client.post("/completion", content='{"prompt": "\\ud800", "n_predict": 1, "stop": "\\udfff"}').status_code == 200
    assert client.post("/v1/chat/completions", content=body % ', "chat_template_kwargs": {"self": 1}').status_code == 200


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
    first, *more = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert (first["index"], first["type"], first["function"]["name"]) == (0, "function", "weather")
    assert len(more) > 1
    assert json.loads("".join(one["function"]["arguments"] for one in (first, *more))) == {"city": "Rome"}
    assert not any(delta.get("content") for delta in deltas)
    assert post(start(), "/v1/chat/completions", 501, messages=options["messages"], tools=[tool])["error"]["message"]


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
