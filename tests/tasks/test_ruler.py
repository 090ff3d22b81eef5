"""Checks that RULER's tasks (tasks/ruler.py) can be solved from the context, by solvers that read only the text."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvcompose_gguf import ConfigError
from kvcompose_gguf.evaluation.metrics import METRICS
from kvcompose_gguf.tasks import ruler
from kvcompose_gguf.tasks.needles import Needles
from kvcompose_gguf.tasks.ruler import RULER_TASKS, TASKS, make_sample
from kvcompose_gguf.tasks.samples import Sample
from kvcompose_gguf.tasks.task import Draft, Recipe, Task
from kvcompose_gguf.tasks.texts import Texts, load_texts

NIAH = [task for task in TASKS if task.startswith("niah") or task == "passkey"]
SIZES = [1024, 2048, 4096]

every_task = pytest.mark.parametrize("task", TASKS)


def count(text: str) -> int:
    return len(text) // 4


def count_words(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.fixture(scope="module")
def texts() -> Texts:
    return load_texts("generated")


def sample(
    texts: Texts, task: str, n_tokens: int = 2048, index: int = 0, seed: int = 0, depth: float | None = None
) -> Sample:
    return make_sample(task, n_tokens, index, seed, count, texts, depth=depth)


#
# solvers: the answer from context and question alone
#


def solve_niah(s: Sample) -> list[str]:
    needles = re.findall(r"One of the special magic (?:numbers|words|uuids) for (\S+) is: (\S+)\.", s.context)
    match = re.search(r"special magic \w+ for (.+) mentioned in the provided text\?", s.question)
    assert match
    keys = re.split(r", and |, ", match[1])
    return [value for key in keys for other, value in needles if other == key]


def solve_vt(s: Sample) -> list[str]:
    match = re.search(r"assigned the value (\d+) in", s.question)
    assert match
    found = re.findall(rf"VAR (\w+) = {match[1]}\n", s.context + "\n")
    links = dict(re.findall(r"VAR (\w+) = VAR (\w+)", s.context))
    while new := [name for name, source in links.items() if source in found and name not in found]:
        found += new
    return found


def solve_cwe(s: Sample) -> list[str]:
    listed = s.context.rsplit("Memorize the ones that appear most often.\n", 1)[1]
    words = re.findall(r"(\d+)\. (\S+)", listed)
    assert [int(number) for number, _ in words] == list(range(1, len(words) + 1))
    frequent = Counter(word for _, word in words).most_common(11)
    assert frequent[9][1] > frequent[10][1]
    return [word for word, _ in frequent[:10]]


def solve_fwe(s: Sample) -> list[str]:
    coded = s.context.split("frequently appeared coded words. ")[1].split()
    frequent = Counter(word for word in coded if word != "...").most_common(4)
    assert len(frequent) == 3 or frequent[2][1] > frequent[3][1]
    return [word for word, _ in frequent[:3]]


#: a question's beginning or end -> the place of its answer in a document
FACTS = {
    "On which river": r"on the river (.+?) in the",
    "In which region": r"in the region of (.+?)\.",
    "granted a market?": r"granted a market in (\d+)",
    "How many inhabitants": r"it had ([\d,]+) inhabitants",
    "founded?": r"was founded in \w+ in (\d+)",
    "Who founded": r"by (.+?), until then",
    "become known for?": r"became known for its (.+?), which",
    "How many people": r"it employed (\d+) people",
    "What was the profession": r", an? ([a-z ]+), was born",
    "On which day": r"was born in \w+ on (\d+ \w+)",
    "Which award": r"received the (.+?) in",
    "Who painted": r"A portrait by (.+?) is",
}


def solve_qa(s: Sample) -> list[str]:
    question = s.question.rsplit("Question: ", 1)[1]
    documents = dict(re.findall(r"Document \d+:\n(.+)\n(.+)", s.context))
    (title,) = [title for title in documents if title in question]
    text = documents[title]
    if s.task == "qa_2":
        link = r"worked for (.+?) and received" if "worked for" in question else r"(?:born|founded) in (\w+) (?:in|on)"
        match = re.search(link, text)
        assert match
        text = documents[match[1]]
    (pattern,) = [
        pattern for part, pattern in FACTS.items() if question.startswith(part) or question.endswith(f" {part}")
    ]
    match = re.search(pattern, text)
    assert match
    return [match[1]]


def solve(s: Sample) -> list[str]:
    solvers: dict[str, Callable[[Sample], list[str]]] = {"vt": solve_vt, "cwe": solve_cwe, "fwe": solve_fwe}
    return solvers.get(s.task, solve_qa if s.task.startswith("qa") else solve_niah)(s)


@every_task
@pytest.mark.parametrize("n_tokens", SIZES)
def test_the_references_follow_from_context_and_question(texts: Texts, task: str, n_tokens: int) -> None:
    for index in range(5):
        s = sample(texts, task, n_tokens, index)
        assert sorted(solve(s)) == sorted(s.references)


@every_task
def test_the_right_answer_scores_one_and_an_empty_answer_nothing(texts: Texts, task: str) -> None:
    s = sample(texts, task)
    assert METRICS[s.metric](", ".join(s.references), s.references) == 1
    assert METRICS[s.metric]("", s.references) == 0


@every_task
def test_question_and_answer_prefix_do_not_say_the_answer(texts: Texts, task: str) -> None:
    for index in range(20):
        s = sample(texts, task, index=index)
        asked = (s.question + s.answer_prefix).lower()
        assert not [reference for reference in s.references if reference.lower() in asked]


def test_a_worked_example_does_not_have_the_answer(texts: Texts) -> None:
    for index in range(20):
        s = sample(texts, "cwe", 1024, index)
        example, listed = s.context.split("Answer: The top 10 words")
        words = set(re.findall(r"\d+\. (\S+)", listed.split("most often.\n")[1]))
        assert not words & set(re.findall(r"\d+\. (\S+)", example))
        s = sample(texts, "vt", 1024, index)
        example, listed = s.context.split("they are: ")
        assert not [name for name in s.references if name in example]
        assert s.question.split("value ")[1].split()[0] not in example


@pytest.mark.parametrize("n_tokens", SIZES)
def test_how_often_words_occur_is_as_in_ruler(texts: Texts, n_tokens: int) -> None:
    listed = sample(texts, "cwe", n_tokens).context.rsplit("most often.\n", 1)[1]
    often = Counter(Counter(re.findall(r"\d+\. (\S+)", listed)).values())
    assert set(often) == ({30, 3} if n_tokens >= 4096 else {6, 1})
    assert often[max(often)] == 10


@pytest.mark.parametrize(
    ("task", "n_asked", "n_needles"),
    [("niah_single_2", 1, 1), ("niah_multikey_1", 1, 4), ("niah_multivalue", 4, 4), ("niah_multiquery", 4, 4)],
)
def test_counts_of_needles_are_those_of_synthetic_yaml(texts: Texts, task: str, n_asked: int, n_needles: int) -> None:
    s = sample(texts, task)
    assert len(s.references) == n_asked
    assert s.context.count("One of the special magic") == n_needles


def test_the_wording_is_rulers(texts: Texts) -> None:
    s = sample(texts, "niah_single_3")
    key = s.question.split(" for ")[1].split()[0]
    assert s.context.startswith(
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about the uuid"
        " afterwards.\n"
    )
    assert s.question == f"\nWhat is the special magic uuid for {key} mentioned in the provided text?"
    assert s.answer_prefix == f" The special magic uuid for {key} mentioned in the provided text is"
    many = sample(texts, "niah_multiquery")
    assert many.context.startswith("Some special magic numbers are hidden within")
    assert many.question.startswith("\nWhat are all the special magic numbers for ")
    assert many.question.count(", ") == 3
    assert ", and " in many.question
    assert many.answer_prefix.endswith(" mentioned in the provided text are")
    assert {task: TASKS[task].max_tokens for task in ("niah_single_1", "vt", "cwe", "fwe", "qa_1")} == {
        "niah_single_1": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32
    }  # fmt: skip
    assert len(RULER_TASKS) == 13


#
# length
#


@every_task
@pytest.mark.parametrize("counter", [count, count_words])
def test_a_sample_is_within_one_unit_below_its_length(
    texts: Texts, task: str, counter: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = ruler._largest
    found: list[tuple[int, int, int]] = []

    def watched(size: Callable[[int], int], limit: int, least: int, most: int) -> tuple[int, int]:
        n, used = largest(size, limit, least, most)
        found.append((used, size(n), size(n + 1)))
        return n, used

    monkeypatch.setattr(ruler, "_largest", watched)
    for n_tokens in (*SIZES, 3000, 9000):
        s = make_sample(task, n_tokens, 0, 0, counter, texts)
        assert s.n_tokens == counter(s.prompt)
        ((used, same, one_more),) = found
        found.clear()
        assert used == same == s.n_tokens + s.max_tokens <= n_tokens
        assert one_more > n_tokens


@every_task
def test_filling_counts_tokens_a_few_times_only(texts: Texts, task: str) -> None:
    calls: list[int] = []

    def counted(text: str) -> int:
        calls.append(1)
        return count_words(text)

    for index in range(5):
        make_sample(task, 4096, index, 0, counted, texts)
    print(task, len(calls) / 5, "calls a sample")
    assert len(calls) <= 5 * 12


@pytest.mark.parametrize(
    "cost", [lambda n: n, lambda n: 7 * n + n * n, lambda n: 300 + n // 3, lambda n: n + 40 * (n > 500)]
)
def test_the_largest_size_that_fits_is_found_whatever_the_slope(cost: Callable[[int], int]) -> None:
    for limit in (300, 541, 1000, 4000):
        for most in (3, 100, 4000):
            expected = max((n for n in range(1, most + 1) if cost(n) <= limit), default=1)
            assert ruler._largest(cost, limit, 1, most) == (expected, cost(expected))


@every_task
def test_the_question_does_not_depend_on_the_length(texts: Texts, task: str) -> None:
    short, long = sample(texts, task, 1024), sample(texts, task, 8192)
    assert (short.question, short.references) == (long.question, long.references)


@every_task
def test_a_length_that_is_too_short_names_the_shortest(texts: Texts, task: str) -> None:
    with pytest.raises(ConfigError, match=r"n_tokens=60, the least .* is \d+") as caught:
        sample(texts, task, 60)
    least = int(str(caught.value).rsplit(" ", 1)[1])
    assert sample(texts, task, least).n_tokens + TASKS[task].max_tokens <= least


def test_a_list_longer_than_all_words_goes_on_with_others() -> None:
    few = Texts("few", ("A b.",), tuple(f"noun{i}" for i in range(60)), tuple(f"adj{i}" for i in range(60)), ("run",))
    s = make_sample("cwe", 2500, 0, 0, count, few)
    assert sorted(solve_cwe(s)) == sorted(s.references)
    assert re.search(r"\d\. adj\d+-noun", s.context)
    with pytest.raises(ConfigError, match="texts='few' has 60 adjectives and 60 nouns, too few for"):
        make_sample("cwe", 100_000, 0, 0, count, few)


#
# determinism
#


@every_task
def test_samples_differ_by_index_and_seed_and_else_not_at_all(texts: Texts, task: str) -> None:
    first = [sample(texts, task, 1500, index, seed) for seed in range(3) for index in range(10)]
    again = [sample(texts, task, 1500, index, seed) for seed in range(3) for index in range(10)]
    assert first == again
    assert len({s.context for s in first}) == 30
    if task != "cwe":  # its question is always the same
        assert len({(s.question, s.references) for s in first}) == 30
    if task in NIAH or task in ("vt", "cwe", "fwe"):
        references = [reference for s in first for reference in s.references]
        assert len(set(references)) >= len(references) * (0.7 if task == "cwe" else 1)  # cwe: words of one list
    if first[0].depth is not None:
        assert len({s.depth for s in first}) > 5


def test_a_sample_is_the_same_in_another_process(texts: Texts) -> None:
    code = (
        "from kvcompose_gguf.tasks import ruler, texts; import hashlib; t = texts.load_texts('generated');"
        "print(hashlib.sha256(repr([ruler.make_sample(n, 1500, 3, 5, lambda s: len(s) // 4, t) for n in ruler.TASKS])"
        ".encode()).hexdigest())"
    )
    root = str(Path(__file__).parents[2])
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONPATH": root, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


#
# depth
#


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("task", [task for task in TASKS if TASKS[task].takes_depth])
def test_the_needle_is_at_the_depth_asked_for(texts: Texts, task: str, depth: float) -> None:
    s = sample(texts, task, 4096, depth=depth)
    (value,) = s.references
    haystack = s.context.split("\n", 1)[1]
    line = next(
        part for part in re.findall(r"One of the special magic \w+ for \S+ is: \S+\.", haystack) if value in part
    )
    place = haystack.index(line) / (len(haystack) - len(line))
    print(f"asked for {depth}, found {place:.3f}")
    assert s.depth == depth
    assert abs(place - depth) < 0.02


@pytest.mark.parametrize("task", ["niah_multikey_1", "niah_multivalue", "niah_multiquery", "vt", "qa_1", "qa_2"])
def test_depth_is_that_of_the_first_needle_asked_for(texts: Texts, task: str) -> None:
    for index in range(5):
        s = sample(texts, task, 4096, index)
        haystack = s.context.rsplit("afterwards.\n" if task in NIAH else "following text.\n\n", 1)[-1]
        if task.startswith("qa"):
            documents = s.context.split("Document ")[1:]
            title = next(d.split("\n")[1] for d in documents if d.split("\n")[1] in s.question)
            places = [i / len(documents) for i, d in enumerate(documents) if d.split("\n")[1] == title]
        else:
            places = [haystack.index(r if task in NIAH else f"VAR {r} =") / len(haystack) for r in s.references]
        assert s.depth is not None
        # with two documents, the other one may come first
        assert s.depth <= min(places) + 0.03 if task == "qa_2" else abs(s.depth - min(places)) < 0.04


#
# errors, and tasks of one's own
#


def test_wrong_arguments_are_named(texts: Texts) -> None:
    with pytest.raises(ConfigError, match=r"task='niah'; allowed: niah_single_1, "):
        sample(texts, "niah")
    with pytest.raises(ConfigError, match="index=-1"):
        sample(texts, "vt", index=-1)
    with pytest.raises(ConfigError, match=r"depth=0.5 with task='vt'; allowed only with .*passkey"):
        sample(texts, "vt", depth=0.5)
    with pytest.raises(ConfigError, match=r"depth=1.5; allowed: 0 to 1"):
        sample(texts, "passkey", depth=1.5)
    with pytest.raises(ConfigError, match="haystack='hay'; allowed: noise, essay, needle"):
        Needles(128, haystack="hay")
    with pytest.raises(ConfigError, match=r"n_keys=1, n_values=1, n_queries=2"):
        Needles(128, n_queries=2)


def test_a_users_task_is_an_entry_in_the_dict(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Repeat(Task):
        def recipe(self, seed: str, n_tokens: int, texts: Texts, depth: float | None) -> Recipe:
            return Recipe(lambda n: Draft("x " * n, "\nHow many?", "", (str(n),)), 1, 2 * n_tokens)

    monkeypatch.setitem(TASKS, "repeat", Repeat(4))
    s = sample(texts, "repeat", 100)
    assert s.references == (str(len(s.context) // 2),)
    assert 98 <= s.n_tokens + 4 <= 100
