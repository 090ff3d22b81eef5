"""A conversation: what is read, compressed, continued, kept and saved. Seeded tiny models, no terminal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import tiny

from kvcompose_gguf import KVCompose
from kvcompose_gguf.chat.conversation import Answer, Conversation
from kvcompose_gguf.chat.documents import Document
from kvcompose_gguf.errors import ConfigError, ContextLengthError, StateError
from kvcompose_gguf.models.templates import CHATML
from kvcompose_gguf.support.progress import Progress

METHOD = KVCompose(compression_ratio=0.5, min_tokens=64, keep_last=8)
GEMMA = tiny.ARCHITECTURES["gemma3"]  # sliding windows of 64
TEXT = " ".join(f"Room {i} of the tower is painted in colour {i * 37 % 101}." for i in range(12))
DOCUMENT = Document("tower.txt", TEXT, "text")
OTHER = Document("cellar.md", TEXT.replace("tower", "cellar"), "text")


def byte_tokens(raw: bytes, add_bos: bool = True) -> list[int]:
    """A token a byte. The tiny vocabulary has no token for a space, so that llama.cpp's tokens have another text."""
    return [1] * add_bos + [3 + byte for byte in raw]


class Counted:
    """Counts the tokens that a Llama evaluates."""

    def __init__(self, llm: Any) -> None:
        self.n = 0
        evaluate = llm.eval

        def count(tokens: Any) -> None:
            self.n += len(tokens)
            evaluate(tokens)

        llm.eval = count

    def during(self, work: Callable[[], Any]) -> int:
        """Tokens that ``work`` evaluates."""
        before = self.n
        work()
        return self.n - before


@pytest.fixture
def talk(make_llama: Any) -> Callable[..., Conversation]:
    """Makes a conversation on a tiny model; ``template``: its chat template, or None."""

    def make(
        config: tiny.TinyConfig = tiny.GQA,
        template: str | None = CHATML,
        method: KVCompose = METHOD,
        n_ctx: int = 4096,
        **options: Any,
    ) -> Conversation:
        llm = make_llama(config, method, n_ctx=n_ctx, n_threads=1, n_threads_batch=1)
        llm.tokenize = lambda raw, add_bos, special: byte_tokens(raw, add_bos)
        llm.is_end = lambda token: False  # so that answers have a length
        if template is not None:
            llm.metadata["tokenizer.chat_template"] = template
        return Conversation(llm, **{"max_tokens": 8, **options})

    return make


def ask(conversation: Conversation, question: str, n_pieces: int | None = None, **options: Any) -> Answer:
    """The answer, or its first pieces."""
    answer, pieces = conversation.ask(question, **options)
    for _ in itertools.islice(pieces, n_pieces):
        pass
    pieces.close()
    return answer


def prompt_of(conversation: Conversation) -> bytes:
    """The text in the cache."""
    return b"".join(conversation.llm.piece(token) for token in conversation.llm.eval_tokens)


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
    llm = make_llama(tiny.GQA, METHOD, n_ctx=4096, n_threads=1, n_threads_batch=1)
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
    conversation = talk(max_tokens=99)
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
    template = "{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}\n" + CHATML
    conversation = talk(template=template)
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
    llm = make_llama(tiny.GQA, METHOD, n_ctx=4096, n_threads=1, n_threads_batch=1)
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
