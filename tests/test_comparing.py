"""The comparison of checkouts masks what changes from run to run, and nothing else."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from compare_checkouts import Comparison
from probe_commands import plain
from record_bodies import Recorder, mask, mask_body


def test_times_dates_and_random_ids_are_masked() -> None:
    body = {
        "id": "chatcmpl-a8f3kk20ZZ", "created": 1764165600, "timings": {"prompt_ms": 3.25, "prompt_n": 7},
        "choices": [{"text": "call_me later", "url": "http://127.0.0.1:8080"}],
    }  # fmt: skip
    assert mask(body) == {
        "id": "chatcmpl-*", "created": "*", "timings": {"prompt_ms": "*", "prompt_n": 7},
        "choices": [{"text": "call_me later", "url": "*"}],
    }  # fmt: skip


def test_events_are_masked_line_by_line_and_other_texts_stay() -> None:
    body = b'data: {"created": 5, "n": 1}\n\ndata: {"content": "x"}\n\ndata: [DONE]\n\n'
    assert mask_body(body) == [{"data": {"created": "*", "n": 1}}, {"data": {"content": "x"}}, "data: [DONE]"]
    metrics = b"llamacpp:prompt_seconds_total 0.31\nx_created 1.7e+09\nllamacpp:tokens_predicted_total 12\n"
    assert mask_body(metrics) == [
        "llamacpp:prompt_seconds_total *",
        "x_created *",
        "llamacpp:tokens_predicted_total 12",
    ]


def test_times_in_outputs_are_masked_and_costs_only_in_evaluations() -> None:
    text = "read in 3.2 s\nseconds  0.31\n--top-p  0.95"
    assert plain(text, "MODEL") == ["read in *", "seconds 0.31", "--top-p 0.95"]
    assert plain(text, "MODEL", has_costs=True) == ["read in *", "seconds *", "--top-p *"]


async def answer(scope: Any, receive: Any, send: Any) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 201, "headers": [(b"Content-Type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"got ", "more_body": True})
    if body == b"leave":
        raise ConnectionResetError
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize(("asked", "told"), [(b"three", ["got three"]), (b"leave", "left")])
def test_an_answer_is_recorded_whole_or_as_left(tmp_path: Path, asked: bytes, told: Any) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": asked}

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        try:
            await Recorder(answer, tmp_path / "a.jsonl")(
                {"type": "http", "method": "POST", "path": "/x"}, receive, send
            )
        except ConnectionResetError:
            assert asked == b"leave"

    asyncio.run(run())
    (line,) = (tmp_path / "a.jsonl").read_text("utf-8").splitlines()
    body = [asked.decode()]
    assert json.loads(line) == {"asked": "POST /x", "body": body, "status": 201, "type": ["text/plain"], "answer": told}
    assert len(sent) == (2 if told == "left" else 3)


@pytest.mark.parametrize(
    ("before", "after", "n_different"),
    [({"a": [1.0]}, {"a": [1.0]}, 0), ({"a": [1.0]}, {"a": [1.0000001]}, 1), ({"a": 1}, {"b": 1}, 2), ({}, {}, 0)],
)
def test_every_difference_counts_and_nothing_compared_is_a_failure(before: Any, after: Any, n_different: int) -> None:
    comparison = Comparison()
    comparison.add("part", before, after)
    assert len(comparison.parts[0].different) == n_different
    assert comparison.end() == (0 if before and not n_different else 1)
