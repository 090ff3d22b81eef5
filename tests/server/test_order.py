"""What an answer that has come says about its slot. Gates hold the server's threads; nothing here depends on its speed."""

from __future__ import annotations

from typing import Any

import pytest
from support import tiny
from support.serving import CONFIG, METHOD, Asking, decodes, gate_before, n_busy, n_processing, post, until

from kvcompose_gguf import ConfigError
from kvcompose_gguf.server import waiting
from kvcompose_gguf.server.slots.generation import generate
from kvcompose_gguf.server.slots.slot import Slot

PROMPT = "The quick brown fox jumps over the lazy dog. "
CHAT = [{"role": "user", "content": "Hi"}]
#: looks at a held server, enough for its event loop to send whatever it has
LOOKS = 20

GENERATIONS = {
    "completion": ("/completion", {"prompt": PROMPT, "n_predict": 3}),
    "openai": ("/v1/completions", {"prompt": PROMPT, "max_tokens": 3}),
    "chat": ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 3}),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", GENERATIONS)
def test_no_answer_leaves_before_its_slot_is_idle(start, kind, stream):
    client, (path, body) = start(chat_template="chatml"), GENERATIONS[kind]
    with gate_before(Slot, "release") as release:
        release.let(0)
        asking = Asking(client, path, **body, stream=stream)
        release.wait_held()  # the last token is there, the slot is not yet
        for _ in range(LOOKS):
            assert (n_busy(client), n_processing(client), asking.n_ends()) == (1, 1, 0), asking.lines
        release.open()
        asking.wait()
    assert (asking.status, asking.busy_at_end) == (200, (0, 0))
    assert asking.n_ends() > 0


def test_the_next_request_finds_the_slot_of_the_answer(start):
    """On a server of several slots, however late the slot is released."""
    client, prompt = start(method=METHOD, n_parallel=3, n_ctx=3072), tiny.tokens(CONFIG, 308)
    post(client, "/completion", prompt=[5, 6, 7], n_predict=1, id_slot=0)
    with gate_before(Slot, "release") as release:
        release.let(0)
        asking = Asking(client, "/completion", prompt=prompt, n_predict=1, id_slot=1)
        release.wait_held()
        for _ in range(LOOKS):
            assert (n_busy(client), asking.n_ends()) == (1, 0), asking.lines
        release.open()
        asking.wait()
        again = post(client, "/completion", prompt=prompt, n_predict=1)
    assert (again["id_slot"], again["timings"]["cache_n"]) == (1, 307)


def test_each_of_several_streams_ends_when_its_own_slot_is_idle(start):
    client = start()
    with gate_before(Slot, "release") as release:
        release.let(1)
        asking = Asking(client, "/v1/completions", prompt=[PROMPT, PROMPT], max_tokens=3, stream=True)
        release.wait_held()
        for _ in range(LOOKS):
            assert n_busy(client) == 1
            assert asking.n_ends() <= 1, asking.lines
        release.open()
        lines = asking.wait()
    assert (asking.n_ends(), lines[-1], asking.busy_at_end) == (3, "[DONE]", (0, 0))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_error_leaves_when_all_slots_of_its_request_are_idle(start, monkeypatch, stream):
    client = start()

    with decodes() as held:

        def fails_beside_another(slot: Slot, what: Any, emit: Any) -> Any:
            if len(what.tokens) > 3:
                return generate(slot, what, emit)
            held.wait_held()
            raise ConfigError("made by the test")

        monkeypatch.setattr(waiting, "generate", fails_beside_another)
        held.let(0)
        asking = Asking(client, "/completion", prompt=[[5, 6, 7], tiny.tokens(CONFIG, 40)], n_predict=9, stream=stream)
        held.wait_held()
        until(lambda: n_busy(client) == 1)
        for _ in range(LOOKS):
            assert (n_busy(client), n_processing(client), asking.n_ends()) == (1, 1, 0), asking.lines
        held.open()
        lines = asking.wait()
    assert "made by the test" in lines[-1]
    assert asking.busy_at_end == (0, 0)


@pytest.mark.parametrize("path", ["/kv/compress", "/slots/0?action=save", "/slots/0?action=erase"])
def test_documents_and_actions_are_answered_when_their_slot_is_idle(start, tmp_path, path):
    client = start(method=METHOD, slot_save_path=tmp_path)
    with gate_before(Slot, "release") as release:
        release.let(0)
        asking = Asking(client, path, prompt=tiny.tokens(CONFIG, 300), filename="one.kvc")
        release.wait_held()
        for _ in range(LOOKS):
            assert (n_busy(client), asking.lines) == (1, [])
        release.open()
        asking.wait()
    assert (asking.status, asking.busy_at_end) == (200, (0, 0))
