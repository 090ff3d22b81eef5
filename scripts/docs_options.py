#!/usr/bin/env python3
"""Write the tables of docs/options.md that come from the code: options of methods, of layer budgets, of commands.

    python scripts/docs_options.py            rewrite what lies between the markers
    python scripts/docs_options.py --check    exit 1 if the document and the code differ, and show the difference

A marker is a comment line, ``<!-- generated: NAME -->``, and the text below it ends at ``<!-- end -->``. Options of
methods come from the fields and the ``Attributes`` sections of their classes, options of commands from their help.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from kvcompose_gguf.cli.app import app
from kvcompose_gguf.methods import METHODS
from kvcompose_gguf.methods.allocation import ByEvictionError, GlobalRanking, Pyramid, Uniform
from kvcompose_gguf.methods.base import Method

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "options.md"
_BLOCK = re.compile(r"(?P<start><!-- generated: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end -->)", re.S)
_ATTRIBUTE = re.compile(r"(\w+(?:, \w+)*): (.*)")
#: not for users: what methods/variant.py tries
_INTERNAL = ("variant",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the document is out of date")
    check = parser.parse_args().check
    old = DOCUMENT.read_text("utf-8")
    new = render(old)
    if check:
        diff = "".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "document", "code"))
        sys.exit(f"{diff}\n{DOCUMENT} is out of date: run python scripts/docs_options.py" if diff else 0)
    DOCUMENT.write_text(new, "utf-8")


def render(text: str) -> str:
    """``text`` with what the code says now between its markers.

    Raises:
        ValueError: a marker has an unknown name, or one of ``BLOCKS`` has no marker.
    """
    names = [match["name"] for match in _BLOCK.finditer(text)]
    if sorted(names) != sorted(BLOCKS):
        raise ValueError(f"the document has markers for {names}, needed is one each for {list(BLOCKS)}")
    return _BLOCK.sub(lambda match: f"{match['start']}\n{BLOCKS[match['name']]()}\n\n{match['end']}", text)


#
# methods
#


def shared_options() -> str:
    """The options that every method has, as a table."""
    return _field_table(Method, _fields(Method))


def method_options() -> str:
    """Every method with the options that are its own and the defaults that differ, a heading and a table each."""
    parts = (
        f"### `{name}`: {method.__name__}\n\n{_first_paragraph(method)}\n\n{_own_options(method)}"
        for name, method in _methods()
    )
    return "\n\n".join(parts)


def _own_options(method: type[Method]) -> str:
    parents = {field.name: field.default for parent in method.__bases__ for field in _fields(parent)}
    own = [f for f in _fields(method) if f.name not in parents or parents[f.name] != f.default]
    base = method.__bases__[0]
    of_base = "It takes the options of every method" if base is Method else f"It takes the options of `{base.__name__}`"
    return f"{of_base}, and:\n\n{_field_table(method, own)}" if own else f"{of_base}, and no others."


def _field_table(cls: type, fields: list[dataclasses.Field[Any]]) -> str:
    """A row for each option; neighbours that share a default and a description share a row."""
    rows: list[tuple[str, ...]] = []
    for field in fields:
        name, rest = f"`{field.name}`", (_default(_field_default(field)), _meaning(cls, field.name))
        if rows and rows[-1][1:] == rest:
            name = f"{rows.pop()[0]}, {name}"
        rows.append((name, *rest))
    return _table(("option", "default", "meaning"), rows)


def allocation_options() -> str:
    """The rules that divide a budget among the layers, with their options, as a table."""
    rows = []
    for rule in (Uniform, GlobalRanking, Pyramid, ByEvictionError):
        options = " ".join(f"`{_signature(field)}`: {_meaning(rule, field.name)}" for field in _fields(rule))
        rows.append((f"`{rule.__name__}`", _first_paragraph(rule), options or "none"))
    return _table(("rule", "what it does", "options"), rows)


def _methods() -> Iterator[tuple[str, type[Method]]]:
    """The package's methods by name, in the order of ``METHODS``."""
    for name, place in METHODS.items():
        if isinstance(place, str) and name not in _INTERNAL:
            module, _, attribute = place.partition(":")
            yield name, getattr(__import__(module, fromlist=[attribute]), attribute)


def _fields(cls: type) -> list[dataclasses.Field[Any]]:
    # what the package itself sets does not make methods different
    return [field for field in dataclasses.fields(cls) if field.init and field.compare]


def _meaning(cls: type, name: str) -> str:
    """What the docstrings of a class and its parents say about one of its attributes.

    Raises:
        ValueError: nothing.
    """
    for parent in inspect.getmro(cls):
        found = attributes(inspect.cleandoc(parent.__doc__ or ""))
        if name in found:
            return _capitalized(found[name])
    raise ValueError(f"the docstring of {cls.__name__} does not describe {name}")


def attributes(docstring: str) -> dict[str, str]:
    """The section ``Attributes`` of a docstring, each name with its description on one line."""
    found: dict[str, str] = {}
    names: list[str] = []
    lines = iter(docstring.splitlines())
    for line in lines:
        if line == "Attributes:":
            break
    for line in lines:
        if not line.startswith("    "):
            break
        if match := _ATTRIBUTE.fullmatch(line[4:]):
            names = match[1].split(", ")
            found |= dict.fromkeys(names, match[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return {name: text.replace("``", "`") for name, text in found.items()}


def _first_paragraph(cls: type) -> str:
    """The first paragraph of a class's docstring, on one line."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split()).replace("``", "`")


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _signature(field: dataclasses.Field[Any]) -> str:
    return field.name if field.default is dataclasses.MISSING else f"{field.name}={field.default!r}"


def _field_default(field: dataclasses.Field[Any]) -> Any:
    """The default of a field; ``MISSING`` if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _default(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1 << 20 and not value % (1 << 20):
        return f"`{value >> 20} << 20`"
    return f"`{value!r}`"


#
# commands
#


def command_options() -> str:
    """Every command with what it does and its options, a heading and a table each."""
    return "\n\n".join(_command("kvcompose " + name, command) for name, command in commands().items())


def commands() -> dict[str, Any]:
    """Every command that is not hidden by its words, e.g. ``"sessions show"``, in the order of the help."""
    return dict(_leaves(typer.main.get_command(app), ()))


def _leaves(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if getattr(command, "hidden", False):
        return
    below = getattr(command, "commands", None)
    if below is None or getattr(command, "invoke_without_command", False):
        yield " ".join(words), command
    for name, child in (below or {}).items():
        yield from _leaves(child, (*words, name))


def _command(name: str, command: Any) -> str:
    shown = [param for param in command.params if not getattr(param, "hidden", False)]
    rows = [(_names(param), _value(param), _help(param)) for param in shown]
    help_text = " ".join(inspect.cleandoc(command.help or "").split())
    table = _table(("option", "default", "meaning"), rows) if rows else "No options."
    return f"### `{name}`\n\n{help_text}\n\n{table}"


def _names(param: Any) -> str:
    if param.param_type_name == "argument":
        return f"`{(param.metavar or param.name).upper()}{' …' if param.nargs == -1 else ''}`"
    return ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))


def _value(param: Any) -> str:
    """The default as it would be typed; empty if there is none, or the help says it."""
    if param.required:
        return "required"
    value = param.default() if callable(param.default) else param.default
    if isinstance(value, Enum):
        value = value.value
    if value is None or value == "" or value == () or value == [] or str(value).startswith("Sentinel"):
        return ""
    if isinstance(value, bool) and param.param_type_name == "option" and param.is_flag:
        on_or_off = param.opts[0] if value else next(iter(param.secondary_opts), "")
        return f"`{on_or_off}`" if on_or_off else ""
    return f"`{value}`"


def _help(param: Any) -> str:
    return " ".join((param.help or "").split())


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


#: what lies between the markers, by their names
BLOCKS: dict[str, Callable[[], str]] = {
    "shared-options": shared_options,
    "method-options": method_options,
    "allocation-options": allocation_options,
    "command-options": command_options,
}


if __name__ == "__main__":
    main()
