"""What an evaluation writes down: answers, and the folder of a run, which survives a crash."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError
from ..files import append_file, write_file

FULL = "full"  # the method of an uncompressed cache
CONFIG, ANSWERS, SAMPLES = "config.json", "answers.jsonl", "samples.jsonl"

Record = TypeVar("Record", "Answer", "SampleCost")


@dataclass(frozen=True)
class Answer:
    """One answer to a sample.

    Attributes:
        type_kv: of the cache, e.g. ``f16``.
        method: ``full``, or the name that tables show.
        ratio: fraction removed, 0 for ``full`` and only for it.
        score, exact: in [0, 1].
        kl: nats from the uncompressed run, mean over the answer's positions; None where it was not measured.
        same_top: share of those positions with the same most probable token, or None.
        depth: of the needle, share of the haystack before it, or None.
        n_tokens: tokens of the context that is compressed.
        n_kept: composite tokens of every layer, or None.
        kv_bytes: of the rows kept.
        seconds: wall time: of the full cache's answer, token by token; of others restore, compose and answer, checked
            against that one, so that the two do not compare.
    """

    task: str
    index: int
    type_kv: str
    method: str
    ratio: float
    score: float
    exact: float
    kl: float | None
    same_top: float | None
    depth: float | None
    n_tokens: int
    n_kept: tuple[int, ...] | None
    kv_bytes: int
    seconds: float
    answer: str

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1 or (self.method == FULL) != (self.ratio == 0):
            raise ConfigError(f"ratio={self.ratio} of {self.method!r}, allowed are 0 for {FULL!r}, (0, 1) for others")
        if not 0 <= self.score <= 1 or not 0 <= self.exact <= 1:
            raise ConfigError(f"score={self.score}, exact={self.exact}, allowed are 0 to 1")


@dataclass(frozen=True)
class SampleCost:
    """Wall time of a sample with one type of cache; ``scoring_seconds`` by the kind of attention asked for.

    That of ``prefill()`` contains a whole prefill, the sample's only one if a method asks for it. Methods that ask for
    none are there by their own names.
    """

    task: str
    index: int
    type_kv: str
    n_tokens: int
    prefill_seconds: float
    scoring_seconds: dict[str, float]
    total_seconds: float


class RunFolder:
    """A run on disk: ``config.json``, then a line an answer, and a line a finished sample.

    Only what :meth:`open` returned may be added to, by one process at a time.

    Attributes:
        config: ``settings`` (what decides the answers), ``environment``, and ``resumed``: for every time that the run
            went on, what of the environment was different.
    Raises:
        ConfigError: there is no run in ``path``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.config: dict[str, Any] = json.loads((path / CONFIG).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"folder={str(path)!r} is not that of a run: {error}") from error

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any], environment: dict[str, Any]) -> RunFolder:
        """A new run, or one that goes on; what there is of an unfinished sample is dropped.

        Raises:
            ConfigError: the run there has other settings, or none; or the folder cannot be written.
        """
        config = json.loads(json.dumps({"settings": settings, "environment": environment, "resumed": []}))
        try:
            if (path / CONFIG).exists():
                folder = cls(path)
                folder._resume(config)
                return folder
            left = [name for name in (ANSWERS, SAMPLES) if (path / name).exists()]
            if left:
                raise ConfigError(f"folder={str(path)!r} has {left[0]}, but no {CONFIG}: its settings are not known")
            write_file(path / CONFIG, _pretty(config))
        except OSError as error:
            raise ConfigError(f"folder={str(path)!r} cannot be written: {error}") from error
        return cls(path)

    def _resume(self, config: dict[str, Any]) -> None:
        there, here = self.config["settings"], config["settings"]
        names = [name for name in {**there, **here} if there.get(name, ...) != here.get(name, ...)]
        if names:
            texts = [f"{name}={there.get(name)!r} there, {here.get(name)!r} now" for name in names]
            raise ConfigError(f"folder={str(self.path)!r} has a run with other settings: {'; '.join(texts)}")
        before = self.config["environment"]
        changed = {name: value for name, value in config["environment"].items() if before.get(name, ...) != value}
        if changed:
            self.config["resumed"].append(changed)
            write_file(self.path / CONFIG, _pretty(self.config))
        for name, records in ((ANSWERS, self.answers()), (SAMPLES, self.costs())):
            file, text = self.path / name, "".join(map(_line, records))
            if file.exists() and file.read_bytes() != text.encode():
                write_file(file, text)

    def add(self, cost: SampleCost, answers: Sequence[Answer]) -> None:
        """Append a sample: its answers, and once they are on the disk its cost, which makes it a finished one.

        Raises:
            ConfigError: it is there, an answer is of another sample, or two are of one method and ratio.
        """
        if _key(cost) in self.done():
            raise ConfigError(f"sample={_key(cost)} is there already")
        if {_key(answer) for answer in answers} != {_key(cost)}:
            raise ConfigError(f"sample={_key(cost)} has no answers, or some of another sample")
        if len({(answer.method, answer.ratio) for answer in answers}) < len(answers):
            raise ConfigError(f"sample={_key(cost)} has two answers of one method and ratio")
        lines = "".join(map(_line, answers)), _line(cost)  # both before anything is written
        append_file(self.path / ANSWERS, lines[0])
        append_file(self.path / SAMPLES, lines[1])

    def done(self) -> set[tuple[str, int, str]]:
        """(task, index, type_kv) of the finished samples."""
        return {_key(cost) for cost in self.costs()}

    def answers(self) -> list[Answer]:
        """Answers of the finished samples, in the order they were added."""
        done = self.done()
        return [answer for answer in _read(self.path / ANSWERS, Answer) if _key(answer) in done]

    def costs(self) -> list[SampleCost]:
        """The finished samples, in the order they were added."""
        return _read(self.path / SAMPLES, SampleCost)


def _key(record: Answer | SampleCost) -> tuple[str, int, str]:
    return record.task, record.index, record.type_kv


def _line(record: Answer | SampleCost) -> str:
    return json.dumps(asdict(record)) + "\n"


def _pretty(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=1) + "\n"


def _read(file: Path, kind: type[Record]) -> list[Record]:
    """The records in ``file``; behind the last line break is what a crash cut off, or nothing."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            if values.get("n_kept") is not None:
                values["n_kept"] = tuple(values["n_kept"])
            records.append(kind(**values))
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{str(file)!r}, line {number}, is not one of a run: {error}") from error
    return records
