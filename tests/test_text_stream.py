"""Text out of tokens: whole characters, and nothing of a stop text."""

from __future__ import annotations

import itertools
import random

import pytest

from kvcompose_gguf.support.text_stream import TextStream


def pieces(text: str, cuts: list[int]) -> list[bytes]:
    raw = text.encode()
    ends = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    return [raw[a:b] for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("seed", range(40))
def test_what_is_shown_is_the_text_before_the_first_stop_wherever_tokens_end(seed: int) -> None:
    rng = random.Random(seed)
    alphabet = ["a", "b", "é", "語", "🙂", "\n", "ab", "STOP", "STO"]
    text = "".join(rng.choice(alphabet) for _ in range(30))
    stops = ["STOP", "語🙂", "bab"][: rng.randrange(4)]
    stream, shown = TextStream(stops), ""
    for piece in pieces(text, [rng.randrange(90) for _ in range(25)]):
        shown += stream.add(piece)
        assert stream.text == shown
    shown += stream.end()
    found = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
    want = text[: min(found)[0]] if found else text
    assert shown == stream.text == want
    assert stream.stop == (min(found)[2] if found else None)


def test_what_may_be_a_stop_text_waits_and_comes_when_it_is_none() -> None:
    stream = TextStream(["</end>"])
    assert stream.add(b"Hello <") == "Hello "
    assert not stream.is_whole
    assert stream.add(b"/en") == ""
    assert stream.add(b"tity") == "</entity"
    assert stream.is_whole
    assert stream.add(b"</en") == ""
    assert stream.end() == "</en"


def test_a_character_that_is_not_whole_waits_and_is_replaced_at_the_end() -> None:
    stream = TextStream()
    assert stream.add("é".encode()[:1]) == ""
    assert not stream.is_whole
    assert stream.add("é".encode()[1:]) == "é"
    assert stream.add("🙂".encode()[:3]) == ""
    assert stream.end() == "\ufffd"


def test_nothing_comes_after_a_stop() -> None:
    stream = TextStream(["x", ""])
    assert stream.add(b"abxcd") == "ab"
    assert (stream.stop, stream.add(b"more"), stream.end(), stream.text) == ("x", "", "", "ab")
