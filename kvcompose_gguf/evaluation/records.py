"""Stores an evaluation run on disk: its answers, its costs and its settings. A run survives a crash."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError
from ..support.files import append_file, write_file

FULL = "full"  # method name of the uncompressed cache
CONFIG, ANSWERS, SAMPLES = "config.json", "answers.jsonl", "samples.jsonl"

Record = TypeVar("Record", "Answer", "SampleCost")


@dataclass(frozen=True)
class Answer:
    """One answer to a sample.

    Attributes:
        type_kv: cache type, e.g. ``f16``.
        method: ``full``, or the method's name in tables.
        ratio: fraction removed; 0 for ``full`` and for no other method.
        score, exact: in [0, 1].
        kl: KL divergence from the uncompressed run in nats, mean over the answer's positions; None if not measured.
        same_top: share of those positions with the same most probable token, or None.
        depth: depth of the needle (share of the haystack before it), or None.
        n_tokens: tokens of the compressed context.
        n_kept: composite tokens of every layer, or None.
        kv_bytes: bytes of the kept rows.
        seconds: wall time. For the full cache: decoding the answer token by token. For others: restore, compose, and
            answer by checking against the full cache's answer. The two kinds do not compare.
        alike: share of references that the answer lacks while it has a word that looks like them
            (``metrics.look_alike``); None: an older run.
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
    alike: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1 or (self.method == FULL) != (self.ratio == 0):
            raise ConfigError(f"ratio={self.ratio} of {self.method!r}; allowed: 0 for {FULL!r}, (0, 1) for others")
        if not 0 <= self.score <= 1 or not 0 <= self.exact <= 1:
            raise ConfigError(f"score={self.score}, exact={self.exact}; allowed: 0 to 1")


@dataclass(frozen=True)
class SampleCost:
    """Wall time of a sample with one cache type; ``scoring_seconds`` has an entry per kind of attention request.

    The time of ``prefill()`` includes a whole prefill, and it is the sample's only one if a method requests it. Methods
    that request no attention are listed under their own names.
    """

    task: str
    index: int
    type_kv: str
    n_tokens: int
    prefill_seconds: float
    scoring_seconds: dict[str, float]
    total_seconds: float


class RunFolder:
    """A run on disk: ``config.json``, one line per answer, and one line per finished sample.

    Add records only to a folder that :meth:`open` returned, from one process at a time.

    Attributes:
        config: ``settings`` (they decide the answers), ``environment``, and ``resumed``: the changes of the environment
            at each resumption.
    Raises:
        ConfigError: ``path`` has no run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.config: dict[str, Any] = json.loads((path / CONFIG).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"folder={str(path)!r} does not contain a run: {error}") from error

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any], environment: dict[str, Any]) -> RunFolder:
        """Creates a run, or resumes one; drops the records of an unfinished sample.

        Raises:
            ConfigError: the existing run has other settings or none, or the folder cannot be written.
        """
        config = json.loads(json.dumps({"settings": settings, "environment": environment, "resumed": []}))
        try:
            if (path / CONFIG).exists():
                folder = cls(path)
                folder._resume(config)
                return folder
            left = [name for name in (ANSWERS, SAMPLES) if (path / name).exists()]
            if left:
                raise ConfigError(f"folder={str(path)!r} has {left[0]}, but no {CONFIG}: its settings are unknown")
            write_file(path / CONFIG, _pretty(config))
        except OSError as error:
            raise ConfigError(f"folder={str(path)!r} cannot be written: {error}") from error
        return cls(path)

    def _resume(self, config: dict[str, Any]) -> None:
        there, here = self.config["settings"], config["settings"]
        names = [name for name in {**there, **here} if there.get(name, ...) != here.get(name, ...)]
        if names:
            texts = [f"{name}={there.get(name)!r} in the run, {here.get(name)!r} now" for name in names]
            raise ConfigError(f"folder={str(self.path)!r} contains a run with other settings: {'; '.join(texts)}")
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
        """Appends a sample. Writes its answers first, then its cost; the cost marks the sample as finished.

        Raises:
            ConfigError: the sample exists, an answer belongs to another sample, or two answers share method and ratio.
        """
        if _key(cost) in self.done():
            raise ConfigError(f"sample={_key(cost)} is already in the run")
        if {_key(answer) for answer in answers} != {_key(cost)}:
            raise ConfigError(f"sample={_key(cost)} has no answers, or answers of another sample")
        if len({(answer.method, answer.ratio) for answer in answers}) < len(answers):
            raise ConfigError(f"sample={_key(cost)} has two answers with the same method and ratio")
        lines = "".join(map(_line, answers)), _line(cost)  # serialise both before writing either
        append_file(self.path / ANSWERS, lines[0])
        append_file(self.path / SAMPLES, lines[1])

    def done(self) -> set[tuple[str, int, str]]:
        """Returns (task, index, type_kv) of every finished sample."""
        return {_key(cost) for cost in self.costs()}

    def answers(self) -> list[Answer]:
        """Returns the answers of the finished samples, in the order of their addition."""
        done = self.done()
        return [answer for answer in _read(self.path / ANSWERS, Answer) if _key(answer) in done]

    def costs(self) -> list[SampleCost]:
        """Returns the costs of the finished samples, in the order of their addition."""
        return _read(self.path / SAMPLES, SampleCost)


def _key(record: Answer | SampleCost) -> tuple[str, int, str]:
    return record.task, record.index, record.type_kv


def _line(record: Answer | SampleCost) -> str:
    return json.dumps(asdict(record)) + "\n"


def _pretty(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=1) + "\n"


def _read(file: Path, kind: type[Record]) -> list[Record]:
    """Returns the records in ``file``; ignores an incomplete last line, which a crash may leave."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            if values.get("n_kept") is not None:
                values["n_kept"] = tuple(values["n_kept"])
            records.append(kind(**values))
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{str(file)!r}, line {number}, is not a record of a run: {error}") from error
    return records
