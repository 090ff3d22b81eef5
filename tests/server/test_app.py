"""llama-server's completions, on a tiny model of random weights."""

from __future__ import annotations

import json

import pytest
from support import tiny
from support.llamas import greedy
from support.serving import CONFIG, events, post

PROMPT = "The quick brown fox jumps over the lazy dog. "
TIMINGS = (
    "cache_n", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second", "predicted_n", "predicted_ms",
    "predicted_per_token_ms", "predicted_per_second",
)  # fmt: skip


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
    texts = [
        post(client, "/completion", prompt=PROMPT, n_predict=16, temperature=1.5, seed=s)["content"] for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert post(client, "/completion", prompt=PROMPT, n_predict=1)["generation_settings"]["seed"] != 0xFFFFFFFF
    for seed, used in ((1099511627783, 7), (-5, 2**32 - 5), (2**63 - 1, 2**32 - 2)):  # OpenAI's have 64 bits
        body = post(client, "/v1/completions", prompt=PROMPT, max_tokens=1, seed=seed, verbose=True)
        assert body["__verbose"]["generation_settings"]["seed"] == used


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
        ({"kv_compress": {"ratio": 0.5, "method": "unstructured"}}, "simulated"), ({"kv_compress": {"ratio": 0.9, "method": "compresskv"}}, "kvcompose learn"),
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


def test_a_head_is_a_get_without_its_body(start):
    client = start()
    for path in ("/health", "/v1/health", "/", "/v1/models", "/slots"):
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-type"] == get.headers["content-type"]
    assert client.head("/nothing").status_code == 404


def test_bad_json_and_unknown_routes_have_llama_servers_errors(start):
    client = start()
    assert client.post("/completion", content=b"{").json()["error"]["code"] == 400
    assert client.post("/completion", content=b"\xff\xfe").status_code == 400
    assert client.get("/nothing").json()["error"] == {
        "code": 404,
        "message": "File Not Found",
        "type": "not_found_error",
    }
    assert client.delete("/completion").status_code == 404
    for path in ("/v1/rerank", "/v1/embeddings", "/v1/audio/transcriptions", "/slots/0?action=save", "/props"):
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
    with client.stream(
        "POST", "/completion", json={"prompt": PROMPT, "grammar": f'root ::= "{ends}"', "n_predict": 30, "stream": True}
    ) as answer:
        raw = b"".join(answer.iter_bytes()).decode()
    assert not set("\u2028\u2029\x85") & set(raw)


def test_lines_that_are_not_indented_end_an_answer(start):
    client = start()
    options = {
        "prompt": PROMPT,
        "temperature": 0,
        "n_predict": 40,
        "grammar": 'root ::= "ab\\n  cd\\n\\n   ef\\n gh" [a-z]{20}',
    }
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
    for more in (
        ', "response_format": {"type": "\\ud800"}',
        ', "json_schema": {"const": "\\ud800"}',
        ', "grammar": "\\ud800"',
    ):
        assert client.post("/v1/chat/completions", content=body % more).status_code in (200, 400)
    assert (
        client.post("/completion", content='{"prompt": "\\ud800", "n_predict": 1, "stop": "\\udfff"}').status_code
        == 200
    )
    assert (
        client.post("/v1/chat/completions", content=body % ', "chat_template_kwargs": {"self": 1}').status_code == 200
    )


def test_a_grammar_and_a_schema_bind_the_answer(start):
    client = start()
    options = {"prompt": PROMPT, "n_predict": 60, "temperature": 1.0, "seed": 3}
    assert post(client, "/completion", **options, grammar='root ::= "a"{5,5}')["content"] == "aaaaa"
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]}
    assert 0 <= json.loads(post(client, "/completion", **options, json_schema=schema)["content"])["n"] <= 9


@pytest.mark.parametrize("after", [False, True])
def test_probabilities_come_with_the_tokens(start, after):
    client = start()
    options = {
        "prompt": PROMPT,
        "n_predict": 4,
        "temperature": 1.0,
        "n_probs": 3,
        "seed": 5,
        "post_sampling_probs": after,
    }
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
    sizes = [part["kv_bytes"] for part in progress]
    assert sizes == sorted(sizes)
    assert sizes[0] > 0
