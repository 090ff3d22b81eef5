"""The texts that `kvcompose learn` reads."""

from __future__ import annotations

import random
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest
from support import tiny
from support.llamas import ONE_THREAD

from kvcompose_gguf import ConfigError, Llama
from kvcompose_gguf.learning import passages
from kvcompose_gguf.learning.passages import passage
from kvcompose_gguf.tasks.texts import load_texts


def text_of(llama: Llama, tokens: Sequence[int]) -> str:
    """Returns the text of a tiny model's tokens, which are bytes; the last character may be cut."""
    return b"".join(map(llama.piece, tokens)).decode(errors="ignore").replace("▁", " ")


def test_passages_are_of_all_kinds_and_as_long_as_they_should_be(make_llama):
    topics = pytest.importorskip("pydoc_data.topics")
    llama = make_llama(**ONE_THREAD)
    made = [passage(llama, number, 400) for number in range(8)]
    assert sorted(text.kind for text in made[:7]) == sorted(passages.KINDS)
    assert made[7].kind == made[0].kind
    assert [len(text.tokens) for text in made] == [100, 200, 400, 100, 200, 400, 100, 200]
    assert [len(passage(llama, number, 100).tokens) for number in range(3)] == [64, 64, 100]
    texts = {text.kind: text_of(llama, text.tokens[1:]).strip() for text in made[:7]}
    assert texts["documentation"] in "\n\n".join(text for _, text in sorted(topics.topics.items()))
    assert texts["prose"] in " ".join(load_texts("generated").sentences)
    modules = Path(sysconfig.get_path("stdlib")).glob("*.py")
    assert any(texts["code"] in file.read_text("utf-8") for file in modules)


def test_a_passage_depends_on_its_number_alone(make_llama):
    first, second = make_llama(**ONE_THREAD), make_llama(**ONE_THREAD)
    made = [passage(first, number, 300) for number in range(7)]
    second.eval(tiny.tokens(tiny.GQA, 50))
    random.seed(5)
    assert [passage(second, number, 300) for number in reversed(range(7))] == made[::-1]
    others = [passage(first, number + 21, 300) for number in range(7)]  # the same kinds and lengths
    for text, other in zip(made, others, strict=True):
        assert (text.kind, len(text.tokens)) == (other.kind, len(other.tokens))
        assert text.tokens != other.tokens


def test_passages_begin_with_bos_if_the_models_prompts_do(make_llama):
    with_bos = make_llama(**ONE_THREAD)
    without = make_llama(kv_overrides={"tokenizer.ggml.add_bos_token": False}, **ONE_THREAD)
    assert (with_bos.adds_bos, without.adds_bos) == (True, False)
    for number in range(7):
        text, bare = passage(with_bos, number, 256), passage(without, number, 256)
        assert text.tokens[0] == with_bos.token_bos()
        assert bare.tokens[0] != with_bos.token_bos()
        assert len(text.tokens) == len(bare.tokens)
        if text.kind != "written":
            assert text.tokens[1:] == bare.tokens[:-1]


def test_every_second_passage_is_of_the_users_files(make_llama, tmp_path):
    llama, files = make_llama(**ONE_THREAD), [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, word in zip(files, ("north", "south"), strict=True):
        file.write_text("\n".join(f"{word} {i}." for i in range(400)), "utf-8")
    for number in range(8):
        text = passage(llama, number, 256, files)
        if number % 2:
            assert text.kind == "text"
            assert text_of(llama, text.tokens[1:])[:-10] in files[(number // 2 + number // 4) % 2].read_text("utf-8")
            assert len(text.tokens) == (64, 128, 256)[number % 3]
        else:
            assert text == passage(llama, number, 256)


def test_files_that_cannot_be_used_are_refused(make_llama, tmp_path):
    llama, file = make_llama(**ONE_THREAD), tmp_path / "a.txt"
    with pytest.raises(ConfigError, match=r"a\.txt cannot be read"):
        passage(llama, 1, 256, [file])
    for text in ("", "too short"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"a\.txt: \d+ tokens after a random line, 64 are needed"):
            passage(llama, 1, 256, [file])
    file.write_bytes(b"\xff\xfe" * 200)
    assert len(passage(llama, 1, 256, [file]).tokens) == 128


def test_without_pythons_own_texts_there_is_prose(monkeypatch, tmp_path):
    pytest.importorskip("pydoc_data.topics")
    prose = passages.prose(random.Random(3))
    assert len(prose) > 12 * 2048
    assert passages.documentation(random.Random(3)) != prose != passages.code(random.Random(3))
    monkeypatch.setitem(sys.modules, "pydoc_data", None)
    assert passages.documentation(random.Random(3)) == prose
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    passages._modules.cache_clear()
    assert passages.code(random.Random(3)) == prose
    passages._modules.cache_clear()


def test_what_a_model_writes_goes_on_after_an_end(make_llama, monkeypatch):
    llama = make_llama(**ONE_THREAD)
    newline = llama.tokenize(b"\n", add_bos=False)[0]
    plain = passages.written(llama, random.Random(0), 333)
    assert len(plain) == 333
    beginning = next(text for text in passages.BEGINNINGS if text_of(llama, plain[1:]).startswith(text))
    n_first = 1 + len(beginning.replace(" ", "▁").encode())
    ends = {token for token in plain[n_first:] if token % 3 == 0} - {newline}
    assert ends
    monkeypatch.setattr(llama, "is_end", lambda token, is_end=llama.is_end: token in ends or is_end(token))
    want = [t for token in plain[n_first:] for t in ([newline] * 2 if token in ends else [token])]
    within = n_first + want.index(newline) + 1  # two newlines do not fit
    for n_tokens in (64, 333, within):
        tokens = passages.written(llama, random.Random(0), n_tokens)
        assert tokens == (plain[:n_first] + want)[:n_tokens]
        assert not ends & set(tokens[n_first:])
