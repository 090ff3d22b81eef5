"""Declares options of a command next to the fields that they set, so that each option is written once.

A field of a dataclass made by ``setting`` or ``settings`` says how the command line sets it. The commands make their
options from that, and ``field_values`` makes the fields of what the user typed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

_SETTING, _PART = "setting", "part"


@dataclass(frozen=True)
class Argument:
    """An option of a command, independent of the library that parses the command line.

    Attributes:
        names: its names, the long one first. A flag that can be turned off has both in one: ``--ui/--no-ui``.
        help: what it does, for --help and docs/options.md.
        panel: its group in --help.
        default: its value if it is not given.
        kind: type of its values.
        choices: the allowed values, for words. Empty: any.
        metavar: what --help shows as its value. None: the type.
        min, max: range of its values. None: no limit.
    """

    names: tuple[str, ...]
    help: str
    panel: str
    default: Any = None
    kind: type = str
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    min: float | None = None
    max: float | None = None

    @property
    def name(self) -> str:
        """Its name as a Python parameter, e.g. ``ctx_size``."""
        return self.spellings[0].removeprefix("--").replace("-", "_")

    @property
    def spellings(self) -> tuple[str, ...]:
        """All words that mean this option on a command line."""
        return tuple(word for name in self.names for word in name.split("/"))

    @property
    def is_flag(self) -> bool:
        """Whether it is given without a value."""
        return self.kind is bool


@dataclass(frozen=True)
class _Setting:
    arguments: tuple[Argument, ...]
    read: Callable[..., Any]


def setting(
    default: T,
    *names: str,
    help: str,
    panel: str,
    read: Callable[[Any], T] | None = None,
    typed: Any = None,
    kind: type | None = None,
    **more: Any,
) -> T:
    """Returns a dataclass field that one option sets.

    Args:
        default: of the field.
        read: makes the field's value of the option's. None: they are the same.
        typed: default of the option. None: as the field's.
        kind: type of the option's values. None: the type of its default, or text if it has none.
        **more: further attributes of ``Argument``.
    """
    shown = default if typed is None else typed
    kind = kind or (str if shown is None else type(shown))
    argument = Argument(names, help, panel, default=shown, kind=kind, **more)
    return settings(default, argument, read=_same if read is None else read)


def settings(default: T, *arguments: Argument, read: Callable[..., T]) -> T:
    """Returns a dataclass field that several options set; ``read`` makes its value of theirs."""
    made: T = field(default=default, metadata={_SETTING: _Setting(arguments, read)})
    return made


def part(cls: type[T]) -> T:
    """Returns a dataclass field that is an object of a class with settings of its own."""
    made: T = field(default_factory=cls, metadata={_PART: cls})
    return made


def arguments_of(cls: Any) -> Iterator[Argument]:
    """Yields the options that set the fields of a dataclass, in the order of its fields."""
    for each in dataclasses.fields(cls):
        if _SETTING in each.metadata:
            yield from each.metadata[_SETTING].arguments
        elif _PART in each.metadata:
            yield from arguments_of(each.metadata[_PART])


def field_values(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of all fields of a dataclass that options set.

    Args:
        values: values of all of these options, by their ``Argument.name``.
    Raises:
        ConfigError: a value cannot be read.
    """
    found: dict[str, Any] = {}
    for each in dataclasses.fields(cls):
        if _SETTING in each.metadata:
            declared: _Setting = each.metadata[_SETTING]
            found[each.name] = declared.read(*(values[argument.name] for argument in declared.arguments))
        elif _PART in each.metadata:
            inner = each.metadata[_PART]
            found[each.name] = inner(**field_values(inner, values))
    return found


def _same(value: T) -> T:
    return value


#
# options that several commands have
#

#: groups of --help
COMPRESSION, MODEL = "Compression", "Model"

THREADS = Argument(("--threads", "-t"), "Number of CPU threads. By default half of the cores.", MODEL, kind=int, min=1)
