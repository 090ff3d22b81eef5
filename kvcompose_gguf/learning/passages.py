"""Texts of many kinds to learn from: files that come with Python, and what the model itself writes."""

from __future__ import annotations

import functools
import itertools
import json
import random
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..tasks.texts import load_texts

if TYPE_CHECKING:
    from ..llama import Llama

#: beginnings for texts that the model writes; a model that lacks a language continues in one that it knows
BEGINNINGS = (
    "Once upon a time", "The history of", "Es war einmal", "Dear Sir or Madam,", "Il était une fois", "def main():",
    "Había una vez", "In this article we", "从前", "В начале", "## Introduction\n\n", "昔々、",
)  # fmt: skip
PEOPLE = (
    "Alice", "Bruno", "Chiara", "Dmitri", "Elena", "Farid", "Grace", "Hiro", "Ines", "Jonas", "Karim", "Lena", "Marta",
)  # fmt: skip
#: lengths, as shares of the longest passage
LENGTHS = (0.25, 0.5, 1.0)
MIN_TOKENS = 64


@dataclass(frozen=True)
class Passage:
    """A text to learn from, or to measure the quality with."""

    kind: str
    tokens: list[int]


def passage(llama: Llama, number: int, longest: int, files: Sequence[Path] = ()) -> Passage:
    """Returns passage ``number``; its kind, length and text depend only on the arguments.

    Args:
        longest: length of the longest passages in tokens.
        files: the user's texts; every second passage comes from them.
    Raises:
        ConfigError: a file cannot be read, or is too short.
    """
    # the periods of kinds (7), lengths (3) and files (2) have no common divisor, so all combinations occur
    length = max(MIN_TOKENS, int(longest * LENGTHS[number % len(LENGTHS)]))
    rng = random.Random(number)
    if files and number % 2:
        turn = number // 2
        file = files[(turn + turn // len(files)) % len(files)]  # every round begins with another file
        return Passage("text", _cut(llama, _from_anywhere(read_text(file), rng), length, str(file)))
    kind = list(KINDS)[number % len(KINDS)]
    return Passage(kind, text_of_kind(llama, kind, rng, length))


def text_of_kind(llama: Llama, kind: str, rng: random.Random, n_tokens: int) -> list[int]:
    """Returns up to ``n_tokens`` tokens of a text of one of ``KINDS``."""
    if kind == "written":
        return written(llama, rng, n_tokens)
    return _cut(llama, KINDS[kind](rng), n_tokens, kind)


def written(llama: Llama, rng: random.Random, n_tokens: int) -> list[int]:
    """Returns text that the model writes by itself, in several languages if it knows them."""
    tokens = list(llama.tokenize(rng.choice(BEGINNINGS).encode(), add_bos=llama.adds_bos))
    new_paragraph = list(llama.tokenize(b"\n\n", add_bos=False))
    llama.set_seed(rng.randrange(1 << 31))
    llama.reset()
    for token in llama.generate(list(tokens), temp=1.0, top_k=0, top_p=0.95, min_p=0.02):
        tokens += new_paragraph if llama.is_end(token) else [token]  # an end token starts a new paragraph instead
        if len(tokens) >= n_tokens:
            break
    return tokens[:n_tokens]


def documentation(rng: random.Random) -> str:
    """Returns Python's reference from a random place on."""
    try:
        from pydoc_data import topics
    except ImportError:  # some distributions leave it out
        return prose(rng)
    texts = [text for _, text in sorted(topics.topics.items()) if len(text) > 4000]
    return _from_anywhere("\n\n".join(texts), rng)


def code(rng: random.Random) -> str:
    """Returns a module of Python's standard library."""
    files = _modules()
    return _from_anywhere(rng.choice(files).read_text("utf-8"), rng) if files else prose(rng)


def table(rng: random.Random) -> str:
    """Returns rows of CSV, JSON, Markdown or a log."""
    nouns = load_texts("generated").nouns
    columns = rng.sample(nouns, 4)

    def number() -> int:
        return rng.randint(1, 10 ** rng.randint(1, 6))

    def row(kind: str, i: int) -> str:
        if kind == "csv":
            return f"{i},{rng.choice(PEOPLE)},{number()},{rng.choice(nouns)},{rng.random():.3f}"
        if kind == "json":
            return json.dumps(
                {"id": i, "name": rng.choice(PEOPLE), columns[0]: number(), columns[1]: rng.choice(nouns)}
            )
        if kind == "markdown":
            return f"| {rng.choice(PEOPLE)} | {number()} | {rng.choice(nouns)} | {rng.random():.2f} |"
        day, clock = f"2026-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}", f"{i // 60:02d}:{i % 60:02d}"
        level, verb = rng.choice(("INFO", "WARN", "ERROR")), rng.choice(("started", "took", "failed after"))
        return f"{day} {clock}:{rng.randint(0, 59):02d} {level} {rng.choice(nouns)}: {verb} {number()}"

    heads = {
        "csv": f"id,name,{','.join(columns[:3])}\n",
        "json": "",
        "markdown": f"| {' | '.join(columns)} |\n|---|---|---|---|\n",
        "log": "",
    }
    kind = rng.choice(list(heads))
    return heads[kind] + "\n".join(row(kind, i) for i in range(600))


def facts(rng: random.Random) -> str:
    """Returns prose full of facts to look up: numbers, passwords, and who has what."""
    texts = load_texts("generated")

    def fact() -> str:
        noun, other, person = rng.choice(texts.nouns), rng.choice(texts.nouns), rng.choice(PEOPLE)
        number = rng.randint(1000, 9_999_999)
        return rng.choice(
            (
                f"The {noun} number of {person} is {number}.",
                f"The code of the {noun}-{other} is: {number}.",
                f"The password for the {other} is {noun}{number % 100}.",
                f"{person} keeps the {other} in the {noun}.",
                f"{noun}_{other} = {number}",
            )
        )

    return " ".join(fact() if rng.random() < 0.6 else rng.choice(texts.sentences) for _ in range(500))


def dialogue(rng: random.Random) -> str:
    """Returns a dialogue of two people."""
    sentences = load_texts("generated").sentences
    pair = rng.sample(PEOPLE, 2)
    turns = (
        "Did you know that? {}",
        "{} What do you think?",
        "I heard something. {}",
        "No, really. {}",
        "{}",
        "Why? {}",
    )
    said = (rng.choice(turns).format(rng.choice(sentences)) for _ in range(300))
    return "\n".join(f"{name}: {text}" for name, text in zip(itertools.cycle(pair), said))


def prose(rng: random.Random) -> str:
    """Returns generated sentences, in order."""
    sentences = load_texts("generated").sentences
    first = rng.randrange(len(sentences) - 500)
    return " ".join(sentences[first : first + 500])


#: generators of each kind; only ``written`` needs the model
KINDS: dict[str, Callable[[random.Random], str]] = {
    "documentation": documentation,
    "code": code,
    "facts": facts,
    "table": table,
    "written": prose,
    "dialogue": dialogue,
    "prose": prose,
}


@functools.cache
def _modules() -> list[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    return sorted(file for file in folder.glob("*.py") if file.stat().st_size > 20_000)


def _from_anywhere(text: str, rng: random.Random) -> str:
    """Returns ``text`` from a random line on, with at least half of it left."""
    return text[text.rfind("\n", 0, rng.randrange(len(text) // 2 + 1)) + 1 :]


def _cut(llama: Llama, text: str, n_tokens: int, name: str) -> list[int]:
    """Returns up to ``n_tokens`` tokens from the beginning of the text, as a prompt has them."""
    tokens = list(llama.tokenize(text[: 12 * n_tokens].encode(), add_bos=llama.adds_bos))
    if len(tokens) < MIN_TOKENS:
        raise ConfigError(f"{name}: {len(tokens)} tokens after a random line, {MIN_TOKENS} are needed")
    return tokens[:n_tokens]


def read_text(file: Path) -> str:
    """Returns a file's text; what is not UTF-8 is replaced. Raises ConfigError if it cannot be read."""
    try:
        return file.read_text("utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
