"""What a chat shows, on a terminal that is recorded and in a pipe."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from rich.console import Console

from kvcompose_gguf.chat import screen as screen_module
from kvcompose_gguf.chat.answers import Answer, Piece
from kvcompose_gguf.chat.conversation import Memory
from kvcompose_gguf.chat.screen import MarkdownStream, Screen, visible
from kvcompose_gguf.plan.report import KVReport
from kvcompose_gguf.support.progress import Progress

MEMORY = Memory(
    n_tokens=4102, n_context=4000, n_bytes=23_600_000, n_bytes_full=94_500_000, n_bytes_allocated=29_000_000
)


def answer(**fields: object) -> Answer:
    out = Answer("Which colour?", 4060, text="Blue.", n_tokens=42, first_seconds=0.1, seconds=1.0, end="finished")
    for name, value in fields.items():
        setattr(out, name, value)
    return out


def screens(terminal: bool) -> tuple[Screen, io.StringIO, io.StringIO]:
    """A screen of 60 columns, and what it writes to standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    consoles = [
        Console(
            file=file, force_terminal=terminal, width=60, height=20, color_system=None, highlight=False, _environ={}
        )
        for file in (out, err)
    ]
    return Screen(*consoles), out, err


def pieces(text: str) -> Iterator[Piece]:
    return (Piece(c) for c in text)


#
# what must not reach a terminal
#


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain äöü 世界 🙂\n\ttab", "plain äöü 世界 🙂\n\ttab"),
        ("\x1b[2Jgone", "␛[2Jgone"),
        ("\x1b]0;title\x07", "␛]0;title␇"),
        ("\x9b31mred", "\ufffd31mred"),  # C1: one character begins a sequence
        ("a\rb", "a␍b"),
        ("windows\r\nline", "windows\nline"),
        ("del\x7f nul\0", "del␡ nul␀"),
    ],
)
def test_control_characters_become_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


EVIL = "\x1b[2J\x1b]0;owned\x07 [click](https://evil.example/\x1b]8;;x) \x9b2K"


def test_nothing_that_the_model_writes_is_an_order_to_the_terminal() -> None:
    screen, out, err = screens(terminal=True)
    screen.answer(pieces(f"{EVIL}\n\n```\n{EVIL}\n```\n\n- {EVIL}"))
    screen.answer(iter([Piece(EVIL, is_thought=True), Piece(EVIL)]))
    screen.error(f"{EVIL} does not exist")
    screen.note(f"Read {EVIL}")
    text = out.getvalue() + err.getvalue()
    assert "␛[2J" in text
    # Live moves the cursor and clears its own lines: nothing else is a sequence, in particular no link and no title
    assert "\x1b]" not in text
    assert "\x1b[2J" not in text
    assert "\x07" not in text
    assert "\x9b" not in text


def test_nothing_that_the_model_writes_is_an_order_in_a_pipe() -> None:
    screen, out, err = screens(terminal=False)
    screen.answer(pieces(EVIL))
    assert "\x1b" not in out.getvalue() + err.getvalue()


#
# answers
#


def test_a_pipe_gets_the_answers_text_and_nothing_else() -> None:
    screen, out, err = screens(terminal=False)
    screen.answer(iter([Piece("Hm", is_thought=True), Piece("It is **blue**,\n"), Piece("- " + "long " * 40)]))
    screen.figures(answer(), MEMORY)
    assert out.getvalue() == "It is **blue**,\n- " + "long " * 40 + "\n"
    assert err.getvalue() == ""


@pytest.fixture(autouse=True, params=[0.0, 1e9], ids=["drawn-always", "drawn-at-the-end"])
def draw_seconds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a terminal is drawn, the same stays on it."""
    monkeypatch.setattr(screen_module, "_DRAW_SECONDS", request.param)


def final(text: str) -> str:
    """What stays on a terminal of 60 columns and 20 lines when a Markdown text has come letter by letter."""
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=20, color_system=None, _environ={})
    with MarkdownStream(console) as stream:
        for c in text:
            stream.add(c)
    assert isinstance(console.file, io.StringIO)
    return _screen_of(console.file.getvalue())


def _screen_of(data: str) -> str:
    """The lines of a terminal that understands what rich's Live does: cursor up, and clear a line."""
    lines, row = [""], 0
    i = 0
    while i < len(data):
        if data[i] == "\x1b":
            end = next(j for j in range(i + 2, len(data)) if data[j].isalpha())
            number, order = data[i + 2 : end], data[end]
            if order == "A":
                row -= int(number or 1)
            elif order == "K":
                lines[row] = ""
            i = end
        elif data[i] == "\n":
            row += 1
            lines += [""] * (row - len(lines) + 1)
        elif data[i] != "\r":
            lines[row] += data[i]
        i += 1
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def test_markdown_is_shown_as_if_it_had_come_at_once() -> None:
    text = "# Title\n\nOne *paragraph*.\n\n1. first\n2. second\n\n   more of it\n3. third\n\n```python\nx = 1\n\n\ny = 2\n```\n\nThe **end**."
    shown = final(text)
    assert "Title" in shown
    assert [line.strip() for line in shown.splitlines() if line.strip()][1:] == [
        "One paragraph.", "1 first", "2 second", "more of it", "3 third", "x = 1", "y = 2", "The end.",
    ]  # fmt: skip


def test_an_answer_longer_than_the_screen_is_whole_and_there_once() -> None:
    lines = [f"Line {i} of a long answer." for i in range(40)]
    shown = final("\n\n".join(lines))
    assert [line for line in shown.splitlines() if line] == lines


def test_a_single_block_longer_than_the_screen_is_whole_and_there_once() -> None:
    lines = [f"Line {i}." for i in range(40)]
    shown = final("```\n" + "\n".join(lines) + "\n```")
    assert [line.strip() for line in shown.splitlines() if line.strip()] == lines


def test_links_show_their_address_as_text() -> None:
    assert final("See [the page](https://example.org/a).") == "See the page (https://example.org/a)."


def test_thoughts_are_shown_before_the_answer() -> None:
    screen, out, _ = screens(terminal=True)
    screen.answer(iter([Piece("Hm, red?\nNo.", is_thought=True), Piece("Blue.")]))
    shown = _screen_of(out.getvalue())
    places = [shown.index(part) for part in ("Hm, red?", "No.", "Blue.")]
    assert places == sorted(places)


#
# figures
#


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "4,102 tokens · 23.6 MB instead of 94.5 MB · 41.0 tokens/s"),
        ({"n_tokens": 1, "seconds": 0.0}, "4,102 tokens · 23.6 MB instead of 94.5 MB"),
        ({"end": "stopped"}, "41.0 tokens/s · stopped"),
        ({"end": "max_tokens"}, "cut after 42 tokens (--max-tokens)"),
        ({"end": "context"}, "the context is full (/clear, or --ctx-size)"),
        ({"text": " ", "n_tokens": 0}, "the model gave no answer"),
    ],
)
def test_a_line_below_the_answer_has_its_figures(fields: dict[str, object], says: str) -> None:
    screen, _, err = screens(terminal=True)
    screen.figures(answer(**fields), MEMORY)
    assert says in " ".join(err.getvalue().split())


def test_memory_is_a_bar_for_every_layer_and_the_whole() -> None:
    report = KVReport(4000, np.array([1000, 500]), 94_500_000, 23_600_000, 100, 100, 1.0, 1.0, 0.1, 0.1, 4000, 256)
    screen, _, err = screens(terminal=True)
    screen.memory(MEMORY, report)
    text = " ".join(err.getvalue().split())
    assert "of 4000 tokens" in text
    assert "1000" in text
    assert "4,000 tokens are compressed, 102 later ones are kept in full" in text
    assert "23.6 MB instead of 94.5 MB" in text
    assert "29.0 MB allocated" in text


def test_progress_has_a_bar_for_each_step_with_speed() -> None:
    screen, _, err = screens(terminal=True)
    with screen.progress() as show:
        for step in ("reading", "scoring"):
            for n in (0, 1024, 2048):
                show(Progress(step, n, 2048, 12_500_000))  # type: ignore[arg-type]
    text = err.getvalue()
    for part in ("Reading", "Scoring", "2,048/2,048", "tokens/s", "cache 12.5 MB"):
        assert part in text


def test_work_without_progress_draws_nothing() -> None:
    screen, _, err = screens(terminal=True)
    with screen.progress():
        pass
    assert err.getvalue() == ""


def test_progress_in_a_pipe_is_silent() -> None:
    screen, out, err = screens(terminal=False)
    with screen.progress() as show:
        show(Progress("reading", 1, 2))
    assert out.getvalue() + err.getvalue() == ""
