"""Copies in memory of what slots held, on tiny models: --cache-ram."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import any_arch, tiny
from support.arch_list import COMPRESSED
from support.serving import CONFIG, METHOD, in_process, post, tiny_options

from kvcompose_gguf import StateError
from kvcompose_gguf.native.decoder import Decoder

A, B, C = (tiny.tokens(CONFIG, 308, seed=seed) for seed in (1, 2, 3))
OPTIONS = {"n_predict": 4, "temperature": 0}
#: a copy of 311 tokens has 480,000 bytes
MIB = 1 << 20


@pytest.fixture
def options() -> dict[str, Any]:
    """One slot, so that whatever comes takes it from the one before."""
    return {"n_ctx": 1024, "n_parallel": 1, "cache_ram": 1}


@pytest.fixture(params=["windows", "recurrent"])
def layers_forget(request, tiny_model, tmp_path) -> Path:
    if request.param == "windows":
        return tiny_model(tiny.ARCHITECTURES["gemma3"])
    return any_arch.write(COMPRESSED["lfm2"], tmp_path / "lfm2.gguf")


def ask(client: Any, prompt: list[int], **more: Any) -> dict[str, Any]:
    return post(client, "/completion", prompt=prompt, **(OPTIONS | more))


def n_cached(client: Any, *prompts: list[int], **more: Any) -> list[int]:
    return [ask(client, prompt, **more)["timings"]["cache_n"] for prompt in prompts]


def n_bytes(client: Any) -> int:
    (line,) = [
        line for line in client.get("/metrics").text.splitlines() if line.startswith("kvcompose_prompt_cache_bytes ")
    ]
    return int(float(line.split()[1]))


@pytest.mark.parametrize("method", [None, METHOD], ids=["full", "compressed"])
def test_a_conversation_that_lost_its_slot_is_not_read_again(start, options, method):
    client = start(**options, method=method)
    first = ask(client, A)
    ask(client, B)
    again = ask(client, A)
    assert (again["timings"]["cache_n"], again["content"]) == (307, first["content"])
    assert again["timings"].get("kv") == first["timings"].get("kv")
    assert n_cached(client, [*B, 5, 6]) == [308]


def test_only_the_beginning_that_a_prompt_shares_is_used(start, options):
    client = start(**options)
    ask(client, A)
    ask(client, B)
    prompt = [*A[:200], *C[:50]]
    answer = ask(client, prompt)
    assert answer["timings"]["cache_n"] == 200
    assert answer["content"] == ask(client, prompt, cache_prompt=False)["content"]


def test_a_slot_that_has_more_of_the_prompt_keeps_it(start, options):
    client = start(**options)
    ask(client, A[:100])
    ask(client, B)
    longer = [*A[:100], *B[:20]]
    assert n_cached(client, longer, [*longer, 7]) == [100, 120]


def test_layers_that_forget_cannot_go_back_within_a_copy(options, layers_forget):
    """Windows have the newest tokens alone. So a copy is worth something only to a prompt that begins with all of it."""
    with in_process(tiny_options(layers_forget, **options | {"cache_ram": 9})) as client:
        ask(client, A, n_predict=1)
        ask(client, B, n_predict=1)
        assert n_cached(client, [*A[:200], 5], [*A, 5, 6]) == [0, 308]


def test_a_compressed_context_of_layers_that_forget_is_gone_back_to(options, layers_forget):
    with in_process(tiny_options(layers_forget, **options | {"cache_ram": 9}, method=METHOD)) as client:
        told = [ask(client, [*A, *question]) for question in ([5], [6, 7], [5])]
        ask(client, B)
        told.append(ask(client, [*A, 5]))
    assert [body["timings"]["cache_n"] for body in told] == [0, 301, 301, 301]
    assert told[0]["content"] == told[2]["content"] == told[3]["content"] != told[1]["content"]


def test_a_copy_that_goes_on_replaces_its_beginning(start, options):
    client = start(**options)
    ask(client, A)
    ask(client, B)
    before = n_bytes(client)
    assert n_cached(client, [*A, 5, 6, 7]) == [308]
    ask(client, C)
    assert n_bytes(client) < 2.2 * before  # those of A, with three tokens more, and of B


def test_the_least_recently_used_goes(start, options):
    """Two copies have room, beside what the slot holds."""
    client = start(**options)
    d = tiny.tokens(CONFIG, 308, seed=4)
    assert n_cached(client, A, B, C, A, B, d, C) == [0, 0, 0, 307, 307, 0, 0]
    assert 0 < n_bytes(client) < MIB
    assert n_cached(client, B, d) == [307, 307]


def test_what_is_larger_than_all_copies_may_be_is_not_copied(start, options):
    client = start(**options)
    big = tiny.tokens(CONFIG, 1000, seed=7)
    ask(client, big)
    ask(client, A)
    assert n_bytes(client) == 0
    assert n_cached(client, big) == [0]


def test_nothing_is_copied_without_room(start, options):
    client = start(**options | {"cache_ram": 0})
    assert n_cached(client, A, B, A) == [0, 0, 0]


def test_another_budget_reads_the_prompt_itself(start, options):
    client = start(**options | {"cache_ram": 3}, method=METHOD)
    half, quarter = {"ratio": 0.5}, {"ratio": 0.75}
    told = [ask(client, A, kv_compress=kind) for kind in (half, quarter, half, quarter, False)]
    assert [body["timings"]["cache_n"] for body in told] == [0, 0, 307, 307, 0]
    assert [body["content"] for body in told[2:4]] == [body["content"] for body in told[:2]]


def test_an_erased_slot_leaves_no_copy(start, options, tmp_path):
    client = start(**options, slot_save_path=tmp_path)
    for prompt in (A, B, A):
        ask(client, prompt)
    assert n_bytes(client) > 0
    client.post("/slots/0?action=erase")
    assert n_cached(client, A, B) == [0, 307]


def test_a_copy_that_llama_cpp_refuses_costs_a_prefill_and_nothing_else(start, options, monkeypatch):
    client = start(**options)
    first = ask(client, A)
    ask(client, B)

    def refuse(self: Decoder, state: Any) -> None:
        raise StateError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "load_state", refuse)
        again = ask(client, A)
    assert (again["timings"]["cache_n"], again["content"]) == (0, first["content"])
    assert n_cached(client, B, A) == [307, 307]
