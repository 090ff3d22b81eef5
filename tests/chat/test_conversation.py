"""A conversation: what is read, compressed, kept and saved. Seeded tiny models, no terminal."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.chat_templates import CHATML
from support.conversations import DOCUMENT, GEMMA, METHOD, OTHER, TEXT, Counted, ask, byte_tokens, prompt_of
from support.llamas import ONE_THREAD

from kvcompose_gguf.chat.conversation import Conversation
from kvcompose_gguf.errors import ConfigError, ContextLengthError, StateError
from kvcompose_gguf.support.progress import Progress

#
# reading and asking
#


@pytest.mark.parametrize("template", [CHATML, None], ids=["template", "plain"])
@pytest.mark.parametrize("config", [tiny.GQA, GEMMA], ids=["full", "sliding-window"])
def test_the_document_is_read_once_and_every_answer_continues_it(
    talk: Callable[..., Conversation], config: tiny.TinyConfig, template: str | None
) -> None:
    conversation = talk(config, template)
    llm = conversation.llm
    conversation.read([DOCUMENT])
    n_context = llm.n_context
    assert n_context == llm.n_tokens > len(TEXT)
    context = list(llm.eval_tokens)
    counted = Counted(llm)
    for question in ("Which colour has room 3?", "And room 7?", "And room 9?"):
        n_before, n_all = counted.n, llm.n_tokens
        answer = ask(conversation, question)
        assert list(llm.eval_tokens)[:n_context] == context
        # the question, its frame, and the answer; nothing of what was there
        assert counted.n - n_before == llm.n_tokens - n_all
        assert llm.n_tokens == answer.n_prompt + answer.n_tokens - 1
    assert [turn.question for turn in conversation.turns] == ["Which colour has room 3?", "And room 7?", "And room 9?"]
    assert conversation.turns[0].context.endswith(TEXT)
    assert llm.n_context == n_context


def test_answers_are_those_of_the_prompt_on_the_compressed_document(
    talk: Callable[..., Conversation], make_llama: Any
) -> None:
    conversation = talk(repeat_penalty=1.0)
    conversation.read([DOCUMENT])
    llm = make_llama(tiny.GQA, METHOD, n_ctx=4096, **ONE_THREAD)
    llm.compress(list(conversation.llm.eval_tokens))
    written = ask(conversation, "Which colour?")
    prompt = f"<|im_start|>user\nDocument tower.txt:\n\n{TEXT}\n\nWhich colour?<|im_end|>\n<|im_start|>assistant\n"
    tokens = byte_tokens(prompt.encode())
    expected = b"".join(map(llm.piece, itertools.islice(llm.generate(tokens, temp=0.0), 8)))
    assert written.n_prompt == len(tokens)
    assert written.text == expected.decode("utf-8", "replace")


def test_a_model_without_a_template_gets_questions_and_answers_as_text(talk: Callable[..., Conversation]) -> None:
    conversation = talk(template=None, system="Be brief.")
    conversation.read([DOCUMENT])
    first = ask(conversation, "Which colour?")
    ask(conversation, "Why?")
    text = prompt_of(conversation).decode("utf-8", "replace")
    start = f"Be brief.\n\nDocument tower.txt:\n\n{TEXT}\n\nQuestion: Which colour?\nAnswer:"
    assert text.startswith(start)
    assert text[len(start) :].startswith(f"{first.text}\n\nQuestion: Why?\nAnswer:")


def test_a_conversation_without_documents_is_compressed_when_it_is_long_enough(
    talk: Callable[..., Conversation],
) -> None:
    conversation = talk()
    ask(conversation, "Hi")
    assert conversation.report is None
    ask(conversation, "Now it has more than the fewest tokens that are compressed.")
    assert conversation.report is not None
    context = conversation.llm.tokenize(prompt_of(conversation).split(b"Now it has")[0], add_bos=True, special=True)
    assert conversation.llm.n_context == len(context)


def test_a_long_text_in_a_question_is_compressed_up_to_its_end(talk: Callable[..., Conversation]) -> None:
    conversation = talk()
    answer = ask(conversation, f"{TEXT} Which colour?")
    assert conversation.llm.n_context == answer.n_prompt - METHOD.keep_last


def test_progress_is_told_while_documents_are_read(talk: Callable[..., Conversation]) -> None:
    seen: list[Progress] = []
    talk().read([DOCUMENT], seen.append)
    assert {progress.step for progress in seen} == {"reading", "scoring"}
    assert seen[0].n_done == 0
    assert seen[-1].n_done == seen[-1].n_total


def test_the_memory_is_what_the_cache_holds(talk: Callable[..., Conversation]) -> None:
    conversation = talk()
    conversation.read([DOCUMENT])
    memory, report = conversation.memory, conversation.report
    assert report is not None
    assert (memory.n_bytes, memory.n_bytes_full) == (report.kv_bytes_kept, report.kv_bytes_full)
    ask(conversation, "Which colour?")
    row = report.kv_bytes_full // report.n_tokens
    later = conversation.memory
    n_new = later.n_tokens - memory.n_tokens
    assert n_new > 8
    assert later.n_bytes - memory.n_bytes == later.n_bytes_full - memory.n_bytes_full == n_new * row
    assert later.n_bytes_allocated == conversation.llm.kv_bytes


#
# changing the context
#


def test_a_document_that_is_added_later_is_compressed_with_all_before_it(talk: Callable[..., Conversation]) -> None:
    conversation = talk()
    conversation.read([DOCUMENT])
    first = ask(conversation, "Which colour?")
    conversation.read([OTHER])
    llm = conversation.llm
    assert llm.n_context == llm.n_tokens > 2 * len(TEXT)
    counted = Counted(llm)
    assert counted.during(lambda: ask(conversation, "And in the cellar?")) < 100
    text = prompt_of(conversation).decode("utf-8", "replace")
    places = [text.index(part) for part in (TEXT, "Which colour?", OTHER.text, "And in the cellar?")]
    assert places == sorted(places)
    assert conversation.turns[0].answer == first.text
    assert conversation.documents == ["tower.txt", "cellar.md"]


def test_another_ratio_reads_everything_again(talk: Callable[..., Conversation]) -> None:
    conversation = talk()
    conversation.read([DOCUMENT])
    ask(conversation, "Which colour?")
    conversation.compress(0.9)
    report = conversation.report
    assert report is not None
    assert report.compression_ratio == pytest.approx(0.9, abs=0.01)
    assert report.n_tokens == conversation.llm.n_tokens > len(TEXT) + len("Which colour?")
    counted = Counted(conversation.llm)
    assert counted.during(lambda: ask(conversation, "Why?")) < 100


def test_a_ratio_out_of_range_changes_nothing(talk: Callable[..., Conversation]) -> None:
    conversation = talk()
    conversation.read([DOCUMENT])
    before = conversation.memory, conversation.method
    with pytest.raises(ConfigError, match=r"compression_ratio=1\.5"):
        conversation.compress(1.5)
    assert (conversation.memory, conversation.method) == before


@pytest.mark.parametrize("config", [tiny.GQA, GEMMA], ids=["full", "sliding-window"])
def test_clear_forgets_what_was_said_and_keeps_the_document(
    talk: Callable[..., Conversation], config: tiny.TinyConfig
) -> None:
    conversation = talk(config)
    conversation.read([DOCUMENT])
    first = ask(conversation, "Which colour?")
    ask(conversation, "Why?")
    conversation.clear()
    assert conversation.turns == []
    counted = Counted(conversation.llm)
    assert counted.during(lambda: ask(conversation, "Which colour?")) < 100
    assert conversation.turns[0].answer == first.text


def test_a_conversation_that_has_grown_is_compressed_again(talk: Callable[..., Conversation]) -> None:
    conversation = talk(max_tokens=60)
    conversation.read([DOCUMENT])
    contexts = [conversation.llm.n_context]
    seen: list[Progress] = []
    for i in range(12):
        ask(conversation, f"Question {i}?", on_progress=seen.append)
        contexts.append(conversation.llm.n_context)
        # never more in full than is compressed, beside the last answer and its question
        assert conversation.llm.n_tokens - conversation.llm.n_context <= conversation.llm.n_context + 160
    assert len(set(contexts)) == 2
    assert contexts[-1] > 2 * contexts[0]
    assert seen
    assert len(conversation.turns) == 12
    text = prompt_of(conversation).decode("utf-8", "replace")
    for turn in conversation.turns[:-1]:  # the last token of the last answer is not in the cache yet
        assert f"{turn.question}<|im_end|>\n<|im_start|>assistant\n{turn.answer}" in text


#
# room
#


def test_a_document_longer_than_the_context_is_refused_before_it_is_read(talk: Callable[..., Conversation]) -> None:
    conversation = talk(n_ctx=512)
    counted = Counted(conversation.llm)
    with pytest.raises(
        ContextLengthError, match=r"tower\.txt: .* would have 5\d\d tokens .* holds 512 .*--ctx-size 4096"
    ):
        conversation.read([DOCUMENT])
    assert counted.n == conversation.llm.n_tokens == 0
    assert conversation.documents == []
    assert ask(conversation, "Anything?").text


def test_a_full_context_says_so_and_loses_nothing(talk: Callable[..., Conversation]) -> None:
    conversation = talk(n_ctx=1024, max_tokens=100)
    conversation.read([DOCUMENT])

    def ask_on() -> None:
        for i in range(20):
            ask(conversation, f"Question {i}?")

    with pytest.raises(ContextLengthError, match=r"would have [\d,]+ tokens with this .* holds 1,024 .* /clear"):
        ask_on()
    turns = list(conversation.turns)
    assert len(turns) > 1
    with pytest.raises(ContextLengthError):
        ask(conversation, "Again?")
    assert conversation.turns == turns
    conversation.clear()
    assert ask(conversation, "Again?").n_tokens > 1


def test_an_answer_ends_where_the_context_does(talk: Callable[..., Conversation]) -> None:
    conversation = talk(n_ctx=768, max_tokens=10_000)
    conversation.read([DOCUMENT])
    answer = ask(conversation, "Go on for ever?")
    assert answer.end == "context"
    assert answer.n_prompt + answer.n_tokens == 768
    assert conversation.turns[0].answer == answer.text


def test_an_empty_question_is_refused(talk: Callable[..., Conversation]) -> None:
    with pytest.raises(ConfigError, match="question is empty"):
        talk().ask("  \n")


def test_a_llama_without_a_method_is_refused(make_llama: Any) -> None:
    with pytest.raises(ConfigError, match="no kv_compressor"):
        Conversation(make_llama())


def test_what_a_template_refuses_is_an_error_of_ours(talk: Callable[..., Conversation]) -> None:
    conversation = talk(template="{{ raise_exception('no system please') }}")
    with pytest.raises(ConfigError, match=r"chat template refuses .*no system please"):
        ask(conversation, "Why?")


#
# sessions
#


@pytest.mark.parametrize("config", [tiny.GQA, GEMMA], ids=["full", "sliding-window"])
def test_a_saved_conversation_goes_on_in_another_process(
    talk: Callable[..., Conversation], config: tiny.TinyConfig, tmp_path: Path
) -> None:
    conversation = talk(config, system="Be brief.")
    conversation.read([DOCUMENT])
    ask(conversation, "Which colour?")
    conversation.save(tmp_path / "tower.kvc")
    expected = ask(conversation, "Why?").text

    other = talk(config)
    other.load(tmp_path / "tower.kvc")
    assert other.documents == ["tower.txt"]
    assert other.turns == conversation.turns[:1]
    counted = Counted(other.llm)
    assert counted.during(lambda: ask(other, "Why?")) < 100
    assert other.turns == conversation.turns
    assert other.turns[-1].answer == expected
    assert prompt_of(other) == prompt_of(conversation)


def test_a_document_that_waits_for_its_question_is_saved_too(talk: Callable[..., Conversation], tmp_path: Path) -> None:
    conversation = talk()
    conversation.read([DOCUMENT])
    conversation.save(tmp_path / "tower.kvc")
    expected = ask(conversation, "Which colour?").text
    other = talk()
    other.load(tmp_path / "tower.kvc")
    assert ask(other, "Which colour?").text == expected


def test_a_conversation_reads_the_same_on_another_day(talk: Callable[..., Conversation], tmp_path: Path) -> None:
    template = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}\n" + CHATML
    conversation = talk(template=template, began=datetime(2020, 5, 17, tzinfo=timezone.utc))
    conversation.read([DOCUMENT])
    conversation.save(tmp_path / "tower.kvc")
    other = talk(template=template)
    other.load(tmp_path / "tower.kvc")
    counted = Counted(other.llm)
    assert counted.during(lambda: ask(other, "Which colour?")) < 100


@pytest.mark.parametrize("template", [CHATML, None], ids=["template", "plain"])
def test_a_context_that_was_saved_without_a_chat_is_a_document(
    talk: Callable[..., Conversation], make_llama: Any, tmp_path: Path, template: str | None
) -> None:
    llm = make_llama(tiny.GQA, METHOD, n_ctx=4096, **ONE_THREAD)
    llm.compress(byte_tokens(TEXT.encode()))
    llm.save_session(tmp_path / "tower.kvc")
    conversation = talk(template=template)
    conversation.load(tmp_path / "tower.kvc")
    counted = Counted(conversation.llm)
    assert counted.during(lambda: ask(conversation, "Which colour?")) < 100
    assert prompt_of(conversation).startswith(f"{TEXT}\n\nQuestion: Which colour?\nAnswer:".encode())
    assert conversation.documents == ["tower.kvc"]


def test_a_session_of_another_version_changes_nothing(talk: Callable[..., Conversation], tmp_path: Path) -> None:
    conversation = talk()
    conversation.read([DOCUMENT])
    conversation.llm.save_session(tmp_path / "new.kvc", {"chat": {"version": 99}})
    ask(conversation, "Which colour?")
    before = conversation.turns, conversation.memory
    with pytest.raises(StateError, match="is a chat of version 99, this is version 1"):
        conversation.load(tmp_path / "new.kvc")
    assert (conversation.turns, conversation.memory) == before
    with pytest.raises(StateError, match=r"nowhere\.kvc"):
        conversation.load(tmp_path / "nowhere.kvc")
    assert (conversation.turns, conversation.memory) == before
