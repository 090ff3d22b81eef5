"""Compressed contexts on disk, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.serving import CONFIG, METHOD, post

A, B = tiny.tokens(CONFIG, 308, seed=1), tiny.tokens(CONFIG, 308, seed=2)
OPTIONS = {"n_predict": 4, "temperature": 0}
MANY = 1 << 30


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """One slot, so that whatever comes takes it from the one before."""
    return {
        "method": METHOD,
        "n_ctx": 1024,
        "n_parallel": 1,
        "slot_save_path": tmp_path,
        "idle_bytes": MANY,
        "cache_ram": 0,
    }


def files(folder: Path) -> list[Path]:
    return sorted((folder / "idle").glob("*/*.kvc"))


def test_a_context_comes_back_when_its_prompt_does(start, options, tmp_path):
    client = start(**options)
    first = post(client, "/completion", prompt=A, **OPTIONS)
    assert files(tmp_path) == []
    post(client, "/completion", prompt=B, **OPTIONS)
    assert len(files(tmp_path)) == 1
    shares = np.array(client.get("/kv/slots/0").json()["shares"])
    again = post(client, "/completion", prompt=A, **OPTIONS)
    assert again["content"] == first["content"]
    assert (again["timings"]["cache_n"], again["timings"]["prompt_n"]) == (307, 1)
    # what it is told of is the context that came back
    assert again["timings"]["kv"] == first["timings"]["kv"]
    assert again["timings"]["kv"]["n_kept"] != []
    assert not np.array_equal(client.get("/kv/slots/0").json()["shares"], shares)
    assert len(files(tmp_path)) == 2


def test_a_server_that_starts_again_knows_them(start, options, tmp_path):
    client = start(**options)
    first = post(client, "/completion", prompt=A, **OPTIONS)
    client.__exit__(None, None, None)
    (file,) = files(tmp_path)
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    again = post(start(**options), "/completion", prompt=A, **OPTIONS)
    assert (again["content"], again["timings"]["cache_n"]) == (first["content"], 307)


def test_another_budget_reads_the_prompt_itself(start, options):
    client = start(**options)
    post(client, "/completion", prompt=A, **OPTIONS)
    post(client, "/completion", prompt=B, **OPTIONS)
    assert post(client, "/completion", prompt=A, kv_compress={"ratio": 0.75}, **OPTIONS)["timings"]["cache_n"] == 0
    assert post(client, "/completion", prompt=A, kv_compress=False, **OPTIONS)["timings"]["cache_n"] == 0


def test_budgets_in_turn_have_a_file_each(start, options, tmp_path):
    client = start(**options)
    told = [
        post(client, "/completion", prompt=A, kv_compress={"ratio": ratio}, **OPTIONS)
        for ratio in (0.5, 0.75, 0.5, 0.75)
    ]
    assert [body["timings"]["cache_n"] for body in told] == [0, 0, 307, 307]
    assert [body["content"] for body in told[2:]] == [body["content"] for body in told[:2]]
    assert len(files(tmp_path)) == 2


def test_a_prompt_that_must_be_read_anew_leaves_the_slots_context_on_disk(start, options, tmp_path):
    client = start(**options)
    post(client, "/completion", prompt=A, **OPTIONS)
    assert post(client, "/completion", prompt=A, cache_prompt=False, **OPTIONS)["timings"]["cache_n"] == 0
    assert len(files(tmp_path)) == 1


def test_a_context_that_would_be_outgrown_is_not_brought_back(start, options):
    client = start(**options)
    tokens = tiny.tokens(CONFIG, 900, seed=1)
    post(client, "/completion", prompt=tokens[:208], **OPTIONS)
    post(client, "/completion", prompt=B, **OPTIONS)
    grown = post(client, "/completion", prompt=tokens, **OPTIONS)["timings"]
    assert (grown["cache_n"], grown["kv"]["n_tokens"]) == (0, 892)


def test_a_context_larger_than_all_files_may_be_is_not_written(start, options, tmp_path):
    client = start(**options | {"idle_bytes": 1000})
    for prompt in (A, B, A):
        post(client, "/completion", prompt=prompt, **OPTIONS)
    assert files(tmp_path) == []


def test_fewer_bytes_than_before_leave_the_newest(start, options, tmp_path):
    client = start(**options)
    for prompt in (A, B, A):
        post(client, "/completion", prompt=prompt, **OPTIONS)
    sizes = [file.stat().st_size for file in files(tmp_path)]
    assert len(sizes) == 2
    start(**options | {"idle_bytes": max(sizes)})
    assert len(files(tmp_path)) == 1


def test_damaged_files_cost_a_prefill_and_nothing_else(start, options, tmp_path):
    client = start(**options)
    first = post(client, "/completion", prompt=A, **OPTIONS)
    post(client, "/completion", prompt=B, **OPTIONS)
    (file,) = files(tmp_path)
    file.write_bytes(file.read_bytes()[:-9])
    again = post(client, "/completion", prompt=A, **OPTIONS)
    assert (again["content"], again["timings"]["cache_n"]) == (first["content"], 0)
    assert file not in files(tmp_path)


def test_the_oldest_goes_when_there_are_too_many_bytes(start, options, tmp_path):
    client = start(**options)
    post(client, "/completion", prompt=A, **OPTIONS)
    post(client, "/completion", prompt=B, **OPTIONS)
    (one,) = files(tmp_path)
    client = start(**options | {"idle_bytes": one.stat().st_size * 3 // 2})
    for prompt in (A, B, A, B):
        post(client, "/completion", prompt=prompt, **OPTIONS)
        assert len(files(tmp_path)) == 1


def test_nothing_is_written_unless_it_is_asked_for(start, options, tmp_path):
    client = start(**options | {"idle_bytes": 0})
    for prompt in (A, B, A):
        assert post(client, "/completion", prompt=prompt, **OPTIONS)["timings"]["cache_n"] == 0
    assert list(tmp_path.iterdir()) == []


def test_a_slot_that_makes_room_for_others_keeps_its_context_on_disk(start, options, tmp_path):
    client = start(**options | {"n_parallel": 2, "n_ctx": 2048, "kv_budget": 3_350_000})
    first = post(client, "/completion", prompt=A, id_slot=0, **OPTIONS)
    post(client, "/completion", prompt=tiny.tokens(CONFIG, 900), id_slot=1, kv_compress=False, **OPTIONS)
    assert client.get("/slots").json()[0]["n_prompt_tokens"] == 0
    again = post(client, "/completion", prompt=A, **OPTIONS)
    assert (again["content"], again["timings"]["cache_n"]) == (first["content"], 307)
