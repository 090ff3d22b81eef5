"""What a server tells of itself, on a tiny model of random weights."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import pytest
from fastapi.testclient import TestClient
from support import tiny
from support.serving import CONFIG, METHOD, TIMEOUT, Asking, decodes, post, tiny_options, until

from kvcompose_gguf import ConfigError
from kvcompose_gguf.server.app import create_app
from kvcompose_gguf.server.command import make_engine
from kvcompose_gguf.server.slots.engine import Engine

PROMPT = "The quick brown fox jumps over the lazy dog. "


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
    assert "http:" not in page.text  # nothing comes from elsewhere
    assert "https:" not in page.text
    without = start(ui=False)
    assert [without.get("/").status_code, without.post("/kv/markdown", json={}).status_code] == [404, 404]
    assert [set(slot) for slot in client.get("/slots").json()] == [{"id", "n_ctx", "speculative", "is_processing"}] * 2


def test_an_answer_is_rendered_without_html_of_its_own_and_without_anything_from_elsewhere(start):
    text = "**a** <b>b</b> ![c](http://evil/c.png) [d](javascript:e)\n\n| f |\n|---|\n| ~~g~~ |"
    html = post(start(), "/kv/markdown", text=text)["html"]
    for tag in ("<strong>a</strong>", "&lt;b&gt;b&lt;/b&gt;", "<th>f</th>", "<s>g</s>"):
        assert tag in html
    for tag in ("<img", "<b>", 'href="javascript'):
        assert tag not in html


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
    for name, field in (
        ("prompt_tokens", "prompt_n"),
        ("prompt_tokens_cached", "cache_n"),
        ("tokens_predicted", "predicted_n"),
    ):
        assert values[f"llamacpp:{name}_total"] == sum(body["timings"][field] for body in bodies)
        assert f"# TYPE llamacpp:{name}_total counter" in text
        assert f"# HELP llamacpp:{name}_total " in text
    assert values["llamacpp:n_decode_total"] > 0
    assert values["llamacpp:requests_processing"] == values["llamacpp:requests_deferred"] == 0
    assert values["kvcompose_removed_ratio_count"] == 1
    assert start(endpoint_metrics=False).get("/metrics").json()["error"]["type"] == "not_supported_error"


def test_vectors_are_counted_as_prompts(start):
    client = start(embeddings=64, pooling="mean")
    n_tokens = post(client, "/v1/embeddings", input=["one text", "another"])["usage"]["prompt_tokens"]
    values = dict(line.split() for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    assert (float(values["llamacpp:prompt_tokens_total"]), float(values["llamacpp:n_decode_total"])) == (n_tokens, 2)
    assert float(values["llamacpp:tokens_predicted_total"]) == 0


def test_keys_are_asked_for(start):
    client = start(api_keys=("secret",))
    assert client.get("/props").status_code == 401
    assert client.get("/health").status_code == 200
    assert client.get("/props", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_a_full_queue_says_when_to_come_again(start):
    client = start(n_parallel=1, n_queue=0)
    with decodes() as held:
        held.let(0)
        asking = Asking(client, "/completion", prompt=PROMPT, n_predict=3)
        held.wait_held()
        answer = client.post("/completion", json={"prompt": PROMPT, "n_predict": 1})
        held.open()
        asking.wait()
    assert (answer.status_code, answer.headers.get("Retry-After")) == (503, "1")
    assert answer.json()["error"]["type"] == "unavailable_error"
    assert asking.status == 200


def test_names_and_tags(start):
    client = start(alias="b, a", tags="chat,fim")
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["aliases"], model["tags"]) == ("a", ["a", "b"], ["chat", "fim"])


def test_there_are_no_adapters(start):
    client = start()
    assert client.get("/lora-adapters").json() == []
    assert client.post("/lora-adapters", json=[]).json() == {"success": True}
    assert client.post("/lora-adapters", json=[{"id": 0, "scale": 1}]).status_code == 400


def test_it_answers_while_the_model_is_loaded(tiny_model):
    go = threading.Event()
    options = tiny_options(tiny_model(CONFIG))

    def slow() -> Engine:
        assert go.wait(TIMEOUT)
        return make_engine(options)

    with TestClient(create_app(options, slow, lambda error: pytest.fail(str(error)))) as client:
        answer = client.get("/health")
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "Loading model")
        assert client.get("/").status_code == 200
        go.set()
        until(lambda: client.get("/health").status_code == 200)
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"


@pytest.mark.parametrize(("n_ctx", "n_slot"), [(8192, 2048), (2048, 1024)])
def test_a_slot_has_at_most_the_tokens_that_the_model_was_trained_for(tiny_model, caplog, n_ctx, n_slot):
    config = replace(CONFIG, n_ctx=2048)
    engine = make_engine(replace(tiny_options(tiny_model(config)), n_ctx=n_ctx, n_parallel=2))
    try:
        assert [slot.llama.n_ctx() for slot in engine.slots] == [n_slot] * 2
    finally:
        engine.close()
    assert ("the model was trained for 2048" in caplog.text) == (n_ctx == 8192)


def test_a_model_that_cannot_be_loaded_is_told(tiny_model):
    told: list[Exception] = []

    def broken() -> Engine:
        raise ConfigError("no such model")

    with TestClient(create_app(tiny_options(tiny_model(CONFIG)), broken, told.append)) as client:
        until(lambda: told)
        assert client.get("/health").status_code == 503
    assert str(told[0]) == "no such model"


@pytest.mark.parametrize("path", ["/completion", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_request_may_take_so_long(start, monkeypatch, path, stream):
    """The clock is the test's: it jumps while a decode is held."""
    client, late = start(n_parallel=1, timeout=3600), threading.Event()
    monkeypatch.setattr("kvcompose_gguf.server.slots.job.now", lambda: time.monotonic() + 7200 * late.is_set())
    with decodes() as held:
        held.let(3)
        asking = Asking(client, path, prompt=PROMPT, n_predict=50, ignore_eos=True, stream=stream)
        held.wait_held()
        late.set()
    error = json.loads(asking.wait()[-1])["error"]
    assert (asking.status, error["code"], error["type"]) == (200 if stream else 504, 504, "timeout_error")
    assert held.n_passed == 4
    assert post(client, "/completion", prompt=PROMPT, n_predict=1)["tokens_predicted"] == 1


def test_the_time_in_the_queue_counts(start, monkeypatch):
    client, late = start(n_parallel=1, timeout=3600), threading.Event()
    monkeypatch.setattr("kvcompose_gguf.server.slots.job.now", lambda: time.monotonic() + 7200 * late.is_set())
    with decodes() as held:
        held.let(0)
        first = Asking(client, "/completion", prompt=PROMPT, n_predict=50)
        held.wait_held()
        second = Asking(client, "/completion", prompt=PROMPT, n_predict=50)
        until(lambda: "llamacpp:requests_deferred 1.0" in client.get("/metrics").text)
        late.set()
        held.open()
        assert [json.loads(asking.wait()[-1])["error"]["code"] for asking in (first, second)] == [504, 504]
    assert "waited longer" in second.lines[-1]
