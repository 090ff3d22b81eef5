"""Slots, their compressed contexts and their files, on a tiny model of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.serving import CONFIG, METHOD, post

from kvcompose_gguf.methods import KNorm
from kvcompose_gguf.server.api.errors import ApiError
from kvcompose_gguf.server.routes.slots import slot_filename


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
    other = post(client, "/completion", **options, kv_compress={"method": "streaming-llm", "n_kept": 50})["timings"][
        "kv"
    ]
    assert other["n_kept"] == [50] * CONFIG.n_layer
    assert "kv" not in post(client, "/completion", **options, kv_compress=False)["timings"]
    short = {**options, "prompt": prompt[:60]}
    assert "kv" not in post(client, "/completion", **short)["timings"]
    slots = [slot for slot in client.get("/slots").json() if slot.get("kv_bytes")]
    assert slots


def test_a_slot_with_a_ceiling_stays_below_it_and_says_so(start):
    client = start(method=KNorm(n_kept=300, chunk=64, n_fresh=8, n_answer=32, min_tokens=64, keep_last=8))
    conversation = tiny.tokens(CONFIG, 600)
    options = {"n_predict": 60, "temperature": 0, "return_tokens": True, "id_slot": 0}
    for turn in range(4):
        body = post(client, "/completion", prompt=conversation, **options)
        # only what is new is read: the next turn's tokens, and the last one of the answer
        assert body["timings"]["prompt_n"] == (600 if not turn else 21)
        conversation = [*conversation, *body["tokens"], *tiny.tokens(CONFIG, 20, seed=turn)]
    slot = client.get("/slots").json()[0]
    assert 0 < slot["kv_bytes"] <= slot["kv_bytes_ceiling"] * 1.02
    assert slot["kv_bytes_ceiling"] == (300 + 64) * slot["kv_bytes_full"] // slot["n_prompt_tokens"]
    assert slot["kv_bytes_full"] > 2 * slot["kv_bytes_ceiling"]


def test_a_system_message_stays_in_every_head(start):
    client = start(chat_template="chatml", method=KNorm(compression_ratio=0.6, min_tokens=100, keep_last=8, n_sink=0))
    system, user = "be short " * 6, "what is a river " * 30
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    said = post(client, "/v1/chat/completions", messages=messages, max_tokens=4, temperature=0, id_slot=0)
    shares = client.get("/kv/slots/0").json()["shares"]
    n_system = len(post(client, "/tokenize", content=system)["tokens"])
    assert 20 < n_system < len(shares) / 5
    assert min(shares[:n_system]) == 1
    assert min(shares[n_system + 20 :]) < 1
    assert said["usage"]["prompt_tokens"] > len(shares)

    # a context that was compressed without it is continued all the same
    prompt = client.post("/apply-template", json={"messages": messages}).json()["prompt"]
    n_cached = post(client, "/completion", prompt=prompt, n_predict=2, id_slot=0)["timings"]["cache_n"]
    assert n_cached >= len(shares)


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


def test_a_document_has_a_name_that_later_prompts_can_use(start):
    client = start(method=METHOD)
    document = tiny.tokens(CONFIG, 300)
    name = post(client, "/kv/compress", prompt=document)["id"]
    by_name = post(client, "/completion", prompt=[5, 6, 7], kv_prefix=name, n_predict=4, temperature=0)
    whole = post(client, "/completion", prompt=[*document, 5, 6, 7], n_predict=4, temperature=0)
    assert (by_name["content"], by_name["timings"]["cache_n"]) == (whole["content"], 300)
    assert by_name["tokens_evaluated"] == 303
    assert post(client, "/kv/compress", prompt=document)["id"] == name
    assert post(client, "/completion", 404, prompt=[5], kv_prefix="kvp-0")["error"]["type"] == "not_found_error"
    # the token that begins a text is the document's
    text = post(client, "/completion", prompt="fox", kv_prefix=name, n_predict=1)
    assert text["tokens_evaluated"] == 300 + len(post(client, "/tokenize", content="fox")["tokens"])


def test_a_conversation_that_grows_is_compressed_again(start):
    client = start(method=METHOD)
    options = {"n_predict": 2, "temperature": 0, "id_slot": 0}
    tokens = tiny.tokens(CONFIG, 900)
    told = [post(client, "/completion", prompt=tokens[:n], **options)["timings"] for n in (208, 300, 408, 409, 900)]
    # 200 tokens are compressed, and continued until there are 200 more behind them
    assert [t["kv"]["n_tokens"] for t in told] == [200, 200, 200, 401, 892]
    assert [t["cache_n"] for t in told] == [0, 208, 300, 0, 0]


def test_a_document_stays_one_however_much_follows_it(start):
    client = start(method=METHOD)
    document = tiny.tokens(CONFIG, 200)
    name = post(client, "/kv/compress", prompt=document)["id"]
    long = post(client, "/completion", prompt=tiny.tokens(CONFIG, 400, seed=5), kv_prefix=name, n_predict=1)["timings"]
    assert (long["cache_n"], long["kv"]["n_tokens"]) == (200, 200)
    # nothing behind it: its last token's logits are not there any more
    alone = post(client, "/completion", prompt=document, n_predict=1)["timings"]
    assert alone["cache_n"] == 0


def test_a_prompt_goes_to_the_slot_that_has_it_as_it_is_to_be_compressed(start):
    client = start(method=METHOD)
    prompt, options = tiny.tokens(CONFIG, 308), {"n_predict": 1}
    for slot, ratio in enumerate((0.5, 0.75)):
        post(client, "/completion", prompt=prompt, id_slot=slot, kv_compress={"ratio": ratio}, **options)
    for slot, ratio in ((1, 0.75), (0, 0.5), (1, 0.75)):
        body = post(client, "/completion", prompt=prompt, kv_compress={"ratio": ratio}, **options)
        assert (body["id_slot"], body["timings"]["cache_n"]) == (slot, 307)


def test_what_a_slot_does_is_told(start):
    client = start(method=METHOD, n_parallel=1)
    post(client, "/completion", prompt=tiny.tokens(CONFIG, 40), n_predict=1)
    post(client, "/completion", prompt=tiny.tokens(CONFIG, 40), n_predict=3, top_k=7)
    (slot,) = client.get("/slots").json()
    assert (slot["params"]["top_k"], slot["params"]["n_predict"]) == (7, 3)
    assert "dry_sequence_breakers" not in slot["params"]
    assert slot["next_token"] == [{"has_next_token": False, "has_new_line": False, "n_remain": -1, "n_decoded": 0}]
    assert (slot["n_prompt_tokens"], slot["n_prompt_tokens_processed"], slot["n_prompt_tokens_cache"]) == (42, 0, 39)
    assert slot["id_task"] == 1


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


def test_a_file_of_a_slot_is_restored_under_a_budget_that_one_full_slot_would_break(start, tmp_path):
    client = start(slot_save_path=tmp_path, kv_budget=1024 * 2048)
    post(client, "/completion", prompt=tiny.tokens(CONFIG, 60), id_slot=0, n_predict=4, ignore_eos=True)
    post(client, "/slots/0?action=save", filename="one.bin")
    assert post(client, "/slots/1?action=restore", filename="one.bin")["n_restored"] == 63


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
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    damaged = {"empty": b"", "short": good[:200], "cut": good[:-5], "flipped": bytes(flipped), "longer": good + b"x"}
    for name, raw in damaged.items():
        (tmp_path / name).write_bytes(raw)
        error = post(client, "/slots/0?action=restore", 400, filename=name)["error"]
        assert error["message"].startswith("Unable to restore slot"), name
    assert post(client, "/slots/0?action=restore", 400, filename="none")["error"]["message"].startswith(
        "Unable to restore"
    )
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


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "a\\b", "a..b", " a", "a.", "a\n", "a" * 256, "c:x", "/etc/passwd"]
)
def test_names_of_slot_files_are_no_paths(name):
    assert slot_filename("slot-1.bin") == "slot-1.bin"
    with pytest.raises(ApiError, match="Invalid filename"):
        slot_filename(name)
