"""Documents that were read once, and that conversations begin with, on a tiny model."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from support.pdfs import pdf
from support.serving import METHOD, events, post

TEXT = "The quick brown fox jumps over the lazy dog. " * 8
READ: dict[str, Any] = {"text": TEXT, "title": "fox"}
ASK: dict[str, Any] = {"max_tokens": 4, "temperature": 0}


def asked(name: str, question: str = "Who jumps?", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "kv_documents": [name], **ASK, **more}


def n_cached(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_document_is_read_once_and_any_chat_begins_with_it(start):
    client = start(chat_template="chatml", method=METHOD)
    told = post(client, "/kv/documents", **READ)
    assert (told["title"], told["kv"]["ratio"]) == ("fox", pytest.approx(0.5, abs=0.01))
    assert told["n_tokens"] > len(TEXT)
    assert [each["id"] for each in client.get("/kv/documents").json()["documents"]] == [told["id"]]
    assert client.get(f"/kv/documents/{told['id']}").json()["text"] == TEXT
    whole = {"messages": [{"role": "user", "content": f"{TEXT}\n\nWho jumps?"}], **ASK}
    expected = post(client, "/v1/chat/completions", **whole)["choices"][0]["message"]["content"]
    for id_slot in (0, 1):  # each slot gets a copy
        client.post(f"/slots/{id_slot}?action=erase")
        answer = post(client, "/v1/chat/completions", **asked(told["id"], id_slot=id_slot))
        assert answer["choices"][0]["message"]["content"] == expected
        assert n_cached(answer) >= told["n_tokens"]
    first = post(client, "/v1/messages", **asked(told["id"], "And why?"))
    assert first["usage"]["cache_read_input_tokens"] >= told["n_tokens"]


def test_other_texts_in_between_do_not_make_it_be_read_again(start):
    client = start(chat_template="chatml", method=METHOD)
    name, n = (post(client, "/kv/documents", **READ)[key] for key in ("id", "n_tokens"))
    for _ in range(3):
        for other in ("a", "b"):
            post(client, "/v1/chat/completions", messages=[{"role": "user", "content": other * 300}], **ASK)
        assert n_cached(post(client, "/v1/chat/completions", **asked(name))) >= n


def test_the_same_document_is_found_and_another_method_or_system_message_makes_another(start):
    client = start(chat_template="chatml", method=METHOD)
    name = post(client, "/kv/documents", **READ)["id"]
    assert post(client, "/kv/documents", **READ)["id"] == name
    system = post(client, "/kv/documents", **READ, system="Be brief.")
    ratio = post(client, "/kv/documents", **READ, kv_compress={"ratio": 0.75})
    assert len({name, system["id"], ratio["id"]}) == 3
    with_system = asked(system["id"])
    with_system["messages"].insert(0, {"role": "system", "content": "Be brief."})
    assert n_cached(post(client, "/v1/chat/completions", **with_system)) >= system["n_tokens"]
    answer = post(client, "/v1/chat/completions", **asked(ratio["id"]))  # continued as it was compressed
    assert n_cached(answer) >= ratio["n_tokens"]
    assert answer["timings"]["kv"]["ratio"] == pytest.approx(0.75, abs=0.01)


def test_progress_is_told_and_the_document_at_the_end(start):
    client = start(chat_template="chatml", method=METHOD)
    chunks, done = events(client, "/kv/documents", **READ)
    *steps, last = chunks
    assert not done
    assert last["title"] == "fox"
    assert {"total", "processed", "step", "kv_bytes"} <= set(steps[0]["prompt_progress"])
    assert any(step["prompt_progress"]["processed"] > 0 for step in steps)


def test_a_document_that_is_deleted_is_gone(start):
    client = start(chat_template="chatml", method=METHOD)
    name = post(client, "/kv/documents", **READ)["id"]
    assert client.delete(f"/kv/documents/{name}").json() == {"deleted": name}
    assert client.get("/kv/documents").json() == {"documents": []}
    for answer in (client.get(f"/kv/documents/{name}"), client.delete(f"/kv/documents/{name}")):
        assert answer.status_code == 404
    post(client, "/v1/chat/completions", 404, **asked(name))


def test_documents_are_there_again_after_a_restart_if_there_is_a_folder(start, tmp_path):
    client = start(chat_template="chatml", method=METHOD, slot_save_path=tmp_path)
    told = post(client, "/kv/documents", **READ)
    again = start(chat_template="chatml", method=METHOD, slot_save_path=tmp_path)
    assert again.get("/kv/documents").json()["documents"] == [told]
    assert n_cached(post(again, "/v1/chat/completions", **asked(told["id"]))) >= told["n_tokens"]
    assert [file.suffix for file in Path(tmp_path).rglob("*") if file.is_file()] == [".kvc"]


def test_several_documents_are_put_before_the_question(start):
    client = start(chat_template="chatml", method=METHOD)
    first = post(client, "/kv/documents", **READ)
    second = post(client, "/kv/documents", text="It was a dog. " * 3, title="dog")
    body = asked(first["id"])
    body["kv_documents"].append(second["id"])
    prompt = post(client, "/apply-template", messages=body["messages"], kv_documents=body["kv_documents"])["prompt"]
    assert f"{TEXT}\n\n{'It was a dog. ' * 3}\n\nWho jumps?" in prompt
    assert n_cached(post(client, "/v1/chat/completions", **body)) >= first["n_tokens"]


def test_a_document_may_be_all_that_is_said(start):
    client = start(chat_template="chatml", method=METHOD)
    name = post(client, "/kv/documents", **READ)["id"]
    for content in ("", [], [{"type": "text", "text": ""}]):
        post(client, "/v1/chat/completions", **asked(name) | {"messages": [{"role": "user", "content": content}]})
    alone = [{"role": "assistant", "content": "I"}]
    post(client, "/v1/chat/completions", 400, **asked(name) | {"messages": alone})


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"text": ""}, 400, "text and file: give one"), ({}, 400, "text and file: give one"),
        ({"text": "a", "file": {"file_data": ""}}, 400, "give one"), ({"file": {"file_data": "§"}}, 400, "not Base64"),
        ({"file": {"file_data": "data:text/plain,a"}}, 400, "without base64"), ({"file": {}}, 400, "file_data"),
        ({"file": {"filename": "a.bin", "file_data": "AAAA"}}, 400, "a.bin is a binary file"), ({"text": "a " * 3000}, 400, "exceeds the available context size"),
        ({"text": "a", "kv_compress": {"ratio": 2}}, 400, "ratio"),
    ],
)  # fmt: skip
def test_documents_that_cannot_be_are_refused(start, body, status, words):
    client = start(chat_template="chatml", method=METHOD)
    assert words in post(client, "/kv/documents", status, **body)["error"]["message"]
    assert client.get("/kv/documents").json() == {"documents": []}


@pytest.mark.parametrize("prefix", ["", "data:application/pdf;base64,"])
def test_a_file_is_read_as_its_kind_is(start, tmp_path, prefix):
    client = start(chat_template="chatml", method=METHOD)
    data = Path(pdf(tmp_path / "fox.pdf", TEXT)).read_bytes()
    file = {"filename": "fox.pdf", "file_data": prefix + base64.b64encode(data).decode()}
    told = post(client, "/kv/documents", file=file)
    assert told["title"] == "fox.pdf"
    text = client.get(f"/kv/documents/{told['id']}").json()["text"]
    assert text.split() == TEXT.split()
    page = base64.b64encode(b"<html><body><h1>Foxes</h1><script>jump()</script></body></html>").decode()
    told = post(client, "/kv/documents", file={"filename": "a.html", "file_data": page}, title="A page")
    assert (told["title"], client.get(f"/kv/documents/{told['id']}").json()["text"]) == ("A page", "# Foxes")


def test_a_full_shelf_says_so(start):
    client = start(chat_template="chatml", method=METHOD, documents_bytes=1000)
    assert "--kv-documents" in post(client, "/kv/documents", 400, **READ)["error"]["message"]


def test_a_server_without_a_budget_asks_for_one(start):
    assert "kv_compress" in post(start(chat_template="chatml"), "/kv/documents", 400, **READ)["error"]["message"]
