"""Embeddings and infill, on a tiny model of random weights."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from support.serving import CONFIG, post

from kvcompose_gguf.server.api import infill

PROMPT = "The quick brown fox jumps over the lazy dog. "


def test_vectors_of_texts(start):
    client = start(embeddings=128, pooling="mean")
    one = post(client, "/v1/embeddings", input=PROMPT)
    assert (one["object"], one["model"], one["data"][0]["index"]) == ("list", "tiny", 0)
    vector = np.array(one["data"][0]["embedding"])
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    tokens = client.post("/tokenize", json={"content": PROMPT, "add_special": True}).json()["tokens"]
    assert one["usage"] == {"prompt_tokens": len(tokens), "total_tokens": len(tokens)}
    several = post(
        client, "/v1/embeddings", input=[tokens, PROMPT, "other", {"content": [{"type": "text", "text": PROMPT}]}]
    )
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
    assert post(client, "/completion", prompt=PROMPT, n_predict=2, temperature=0)["tokens_predicted"] == 2


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
    monkeypatch.setattr(infill, "infill_token", lambda model, name: ids[name])

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
    wrong: Any
    for wrong in ([{}], [{"filename": "ok"}], [{"filename": 3, "text": "abc"}], [3]):
        post(client, "/infill", 400, **body, input_extra=wrong)
