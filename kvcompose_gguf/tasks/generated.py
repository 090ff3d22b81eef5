"""Generates prose, and questions about made-up people, companies and towns, from the word lists of this package."""

from __future__ import annotations

import functools
import importlib.resources
import random
import re
from collections.abc import Mapping

from .questions import Question, Questions

N_SENTENCES = 8000  # sentences of generated prose, all different: about 130,000 words
N_PEOPLE, N_COMPANIES, N_TOWNS = 1500, 500, 400  # one document for each


def words() -> Mapping[str, tuple[str, ...]]:
    """Returns the nouns, adjectives and verbs."""
    return _lists("words.txt")


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
def prose() -> tuple[str, ...]:
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
def questions(n_hops: int) -> Questions:
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
