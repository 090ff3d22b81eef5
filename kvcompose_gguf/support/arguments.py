"""Declares options of a command next to the fields that they set, so that each option is written once.

A field of a dataclass made by ``option`` or ``options`` says how the command line sets it. The commands make their
options from that, and ``field_values`` makes the values of the fields from what the user typed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

_OPTIONS, _PART = "options", "part"


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
class _Options:
    arguments: tuple[Argument, ...]
    read: Callable[..., Any]


def _same(value: T) -> T:
    return value


def option(
    default: T,
    *names: str,
    help: str,
    panel: str,
    read: Callable[[Any], T] = _same,
    option_default: Any = None,
    kind: type | None = None,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    min: float | None = None,
    max: float | None = None,
) -> T:
    """Returns a dataclass field that one option sets; the other arguments are attributes of ``Argument``.

    Args:
        default: default of the field.
        read: makes the field's value from the option's.
        option_default: default of the option. None: that of the field.
        kind: type of the option's values. None: the type of its default, or text if it has none.
    """
    shown = default if option_default is None else option_default
    kind = kind or (str if shown is None else type(shown))
    return options(default, Argument(names, help, panel, shown, kind, choices, metavar, min, max), read=read)


def options(default: T, *arguments: Argument, read: Callable[..., T]) -> T:
    """Returns a dataclass field that several options set; ``read`` makes its value from theirs."""
    made: T = field(default=default, metadata={_OPTIONS: _Options(arguments, read)})
    return made


def part(cls: type[T]) -> T:
    """Returns a dataclass field that is an object of a class with options of its own."""
    made: T = field(default_factory=cls, metadata={_PART: cls})
    return made


def arguments_of(cls: Any) -> Iterator[Argument]:
    """Yields the options that set the fields of a dataclass, in the order of its fields."""
    for each in dataclasses.fields(cls):
        if _OPTIONS in each.metadata:
            yield from each.metadata[_OPTIONS].arguments
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
        if _OPTIONS in each.metadata:
            declared: _Options = each.metadata[_OPTIONS]
            found[each.name] = declared.read(*(values[argument.name] for argument in declared.arguments))
        elif _PART in each.metadata:
            inner = each.metadata[_PART]
            found[each.name] = inner(**field_values(inner, values))
    return found


#
# options that several commands have
#

#: groups of --help
COMPRESSION, MODEL = "Compression", "Model"

THREADS = Argument(("--threads", "-t"), "Number of CPU threads. By default half of the cores.", MODEL, kind=int, min=1)
