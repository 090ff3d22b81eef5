"""OpenAI's routes, on a tiny model of random weights."""

from __future__ import annotations

import json

import pytest
from support.chat_templates import CALL, HERMES
from support.serving import events, post, saying

PROMPT = "The quick brown fox jumps over the lazy dog. "
CHAT = [{"role": "user", "content": "Hi"}]


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


@pytest.mark.parametrize(("field", "value"), [("echo", True), ("suffix", " the end."), ("best_of", 2)])
def test_what_is_not_done_is_refused_as_llama_server_does(start, field, value):
    client = start()
    error = post(client, "/v1/completions", 400, prompt=PROMPT, max_tokens=1, **{field: value})["error"]
    assert field in error["message"]
    post(client, "/v1/completions", prompt=PROMPT, max_tokens=1, **{field: None if value is not True else False})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("functions", [{"name": "f"}], "use tools"), ("function_call", "auto", "use tool_choice"), ("lora", [{"id": 0}], "no LoRA"),
        ("audio", {"voice": "a"}, "writes text"), ("modalities", ["text", "audio"], "writes text"), ("grammar_lazy", True, "tools"),
        ("web_search_options", {"a": 1}, "does not search"), ("grammar_triggers", [{"type": 1, "value": "a"}], "tools"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/completion"])
def test_no_field_that_would_change_an_answer_is_dropped_without_a_word(start, path, field, value, words):
    body = {"messages": CHAT, "prompt": PROMPT, "max_tokens": 1}
    client = start(chat_template="chatml")
    error = post(client, path, 400, **body, **{field: value})["error"]
    assert field in error["message"] or field == "modalities"
    assert words in error["message"]
    empty = {list: [], bool: False, str: "", dict: {}}[type(value)]
    post(client, path, **body, **{field: empty})


def test_several_choices_differ_by_their_seeds(start):
    body = post(start(), "/v1/completions", prompt=PROMPT, n=2, max_tokens=12, temperature=1.5, seed=4)
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["choices"][0]["text"] != body["choices"][1]["text"]


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_what_several_choices_use_is_the_sum_and_is_told_once(start, route):
    client, wanted = start(), {"prompt": PROMPT} if route == "/v1/completions" else {"messages": CHAT}
    options = {**wanted, "n": 2, "max_tokens": 5, "temperature": 0}
    usage = post(client, route, **options)["usage"]
    alone = post(client, route, **{**options, "n": 1})["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (alone["prompt_tokens"], 10)
    assert usage["total_tokens"] == usage["prompt_tokens"] + 10
    chunks, _ = events(client, route, **options, stream_options={"include_usage": True})
    told = [chunk["usage"] for chunk in chunks if "usage" in chunk]
    assert [(each["prompt_tokens"], each["completion_tokens"]) for each in told] == [(alone["prompt_tokens"], 10)]
    assert "usage" in chunks[-1]


def test_every_token_of_a_streamed_chat_has_its_probability(start):
    """Tokens whose text is held back, here until a stop text is ruled out, are told with the next text."""
    client, options = start(), {"messages": CHAT, "max_tokens": 24, "temperature": 0, "logprobs": True}
    whole = post(client, "/v1/chat/completions", **options)["choices"][0]
    said = whole["message"]["content"]
    assert "pu9" in said
    assert "pk9" in said
    for stop in (["pu?", "pk9??"], ["pk9"]):
        wanted = post(client, "/v1/chat/completions", **options, stop=stop)["choices"][0]["logprobs"]["content"]
        chunks, _ = events(client, "/v1/chat/completions", **options, stop=stop)
        parts = [chunk["choices"][0].get("logprobs") for chunk in chunks]
        told = [entry for part in parts if part for entry in part["content"]]
        assert [entry["id"] for entry in told] == [entry["id"] for entry in wanted]
        assert [entry["logprob"] for entry in told] == pytest.approx([entry["logprob"] for entry in wanted], abs=1e-3)


def test_a_chat(start):
    client = start()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    options = {"messages": messages, "max_tokens": 8, "temperature": 0}
    prompt = post(client, "/apply-template", messages=messages)["prompt"]
    assert prompt == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    body = post(client, "/v1/chat/completions", **options)
    message = body["choices"][0]["message"]
    assert message == {
        "role": "assistant",
        "content": post(client, "/completion", prompt=prompt, n_predict=8, temperature=0)["content"],
    }
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
        None, "text", [], [123], [{}], [{"role": 123}], [{"role": "system", "content": 123}], [{"role": "user", "content": "x"}, {}],
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
    error = post(start(), "/v1/chat/completions", 501, messages=[{"role": "user", "content": [part]}])["error"]
    assert "image input is not supported" in error["message"]


@pytest.mark.parametrize(
    ("response_format", "check"),
    [
        ({"type": "json_object", "schema": {"const": "42"}}, lambda text: json.loads(text) == "42"),
        ({"type": "json_schema", "json_schema": {"schema": {"const": "foo"}}}, lambda text: json.loads(text) == "foo"),
        ({"type": "text"}, lambda text: True),
    ],
)
def test_response_formats(start, response_format, check):
    messages = [{"role": "user", "content": "Hi"}]
    body = post(start(), "/v1/chat/completions", messages=messages, response_format=response_format, max_tokens=20)
    assert check(body["choices"][0]["message"]["content"])


WEATHER = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}


@pytest.mark.parametrize("choice", ["required", "auto", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_is_called(start, choice):
    client = start(chat_template=HERMES)
    tool = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
    options = {
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [tool],
        "tool_choice": choice,
        "max_tokens": 120,
    }
    with saying(f"Let me see. {CALL}"):
        answer = post(client, "/v1/chat/completions", **options)["choices"][0]
        chunks, _ = events(client, "/v1/chat/completions", **options)
    call = answer["message"]["tool_calls"][0]
    assert (answer["finish_reason"], call["function"]["name"]) == ("tool_calls", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    assert answer["message"]["content"].strip() == "Let me see."
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    first, *more = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert (first["index"], first["type"], first["function"]["name"]) == (0, "function", "weather")
    assert len(more) > 1
    assert json.loads("".join(one["function"]["arguments"] for one in (first, *more))) == {"city": "Rome"}
    assert "".join(delta.get("content") or "" for delta in deltas).strip() == "Let me see."
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_arguments_follow_the_tools_schema_from_the_calls_first_token_on(start):
    """The model would say another city; its grammar lets it say only one."""
    client = start(chat_template=HERMES)
    tool = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
    with saying(CALL.replace("Rome", "Oslo")):
        error = post(
            client, "/v1/chat/completions", 400, messages=[{"role": "user", "content": "Hi"}], tools=[tool], tool_choice="required"
        )["error"]  # fmt: skip
    assert "grammar" in error["message"]


def test_tools_need_a_template_that_shows_them(start):
    tool = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
    error = post(
        start(chat_template="chatml"),
        "/v1/chat/completions",
        501,
        messages=[{"role": "user", "content": "Hi"}],
        tools=[tool],
    )["error"]
    assert "does not use them" in error["message"]
