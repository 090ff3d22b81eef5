"""Answers of a conversation: stopped, empty, with thoughts; shown as whole characters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import tiny
from support.chat_templates import THINKING
from support.conversations import DOCUMENT, GEMMA, OTHER, TEXT, Counted, ask, byte_tokens, prompt_of

from kvcompose_gguf.chat.conversation import Conversation
from kvcompose_gguf.support.progress import Progress

#
# stopping
#


def test_an_answer_that_is_stopped_stays_as_far_as_it_was_said(talk: Callable[..., Conversation]) -> None:
    conversation = talk(max_tokens=100)
    conversation.read([DOCUMENT])
    answer = ask(conversation, "Which colour?", n_pieces=3)
    assert answer.end == "stopped"
    assert 3 <= answer.n_tokens < 20
    assert conversation.turns[0].answer == answer.text
    counted = Counted(conversation.llm)
    assert counted.during(lambda: ask(conversation, "Why?", n_pieces=1)) < 80
    assert f"{answer.text}<|im_end|>" in prompt_of(conversation).decode("utf-8", "replace")


def test_a_question_that_is_stopped_before_a_word_was_said_was_never_asked(talk: Callable[..., Conversation]) -> None:
    conversation = talk()
    conversation.read([DOCUMENT])
    ask(conversation, "Which colour?", n_pieces=0)
    assert conversation.turns == []
    ask(conversation, "Why?")
    text = prompt_of(conversation)
    assert b"Which colour?" not in text
    assert TEXT.encode() in text


@pytest.mark.parametrize("step", ["reading", "scoring"])
@pytest.mark.parametrize("config", [tiny.GQA, GEMMA], ids=["full", "sliding-window"])
def test_reading_that_is_stopped_leaves_the_conversation_as_it_was(
    talk: Callable[..., Conversation], config: tiny.TinyConfig, step: str
) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == step and progress.n_done:
            raise KeyboardInterrupt

    conversation, other = talk(config), talk(config)
    for each in (conversation, other):
        each.read([DOCUMENT])
        ask(each, "Which colour?")
    with pytest.raises(KeyboardInterrupt):
        conversation.read([OTHER], stop)
    assert conversation.documents == ["tower.txt"]
    seen: list[Progress] = []
    ask(conversation, "Why?", on_progress=seen.append)
    assert seen, "the cache lost the document: it has to be read again before the answer"
    other.compress(0.5)  # the same point of the conversation
    ask(other, "Why?")
    assert conversation.turns == other.turns


#
# what the model writes
#


def says(conversation: Conversation, monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    """The model says exactly this; a byte is a token."""

    def generate(prompt: Any, **sampling: Any) -> Iterator[int]:
        yield from byte_tokens(raw, add_bos=False)

    monkeypatch.setattr(conversation.llm, "generate", generate)


def test_an_answer_may_be_empty(talk: Callable[..., Conversation], monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = talk()
    monkeypatch.setattr(conversation.llm, "is_end", lambda token: True)
    answer = ask(conversation, "Anything?")
    assert (answer.text, answer.n_tokens, answer.end) == ("", 0, "finished")
    assert [turn.question for turn in conversation.turns] == ["Anything?"]


def test_the_next_question_ends_an_answer_of_a_model_without_a_template(
    talk: Callable[..., Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = talk(template=None, max_tokens=99)
    says(conversation, monkeypatch, b" Blue.\nQuestion: And now?")
    answer = ask(conversation, "Which colour?")
    assert (answer.text, answer.end) == (" Blue.", "finished")
    assert conversation.turns[0].answer == " Blue."


def test_thoughts_are_no_part_of_the_answer(talk: Callable[..., Conversation], monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = talk(template=THINKING, max_tokens=99)
    says(conversation, monkeypatch, b"<think>Hm, red?</think>\n\nBlue.")
    answer, pieces = conversation.ask("Which colour?")
    shown = list(pieces)
    assert "".join(piece.text for piece in shown if piece.is_thought) == answer.thoughts == "Hm, red?"
    assert "".join(piece.text for piece in shown if not piece.is_thought) == answer.text == "Blue."
    assert conversation.turns[0].answer == "Blue."


def test_characters_are_shown_when_they_are_whole(
    talk: Callable[..., Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = talk(max_tokens=99)
    says(conversation, monkeypatch, "zwölf €".encode())
    _, pieces = conversation.ask("How many?")
    assert [piece.text for piece in pieces] == ["z", "w", "ö", "l", "f", " ", "€"]
