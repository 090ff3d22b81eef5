"""Options that are declared next to the fields they set."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from typer import Option, Typer
from typer.testing import CliRunner

from kvcompose_gguf.cli.options import parameters
from kvcompose_gguf.support.arguments import Argument, arguments_of, field_values, option, options, part


@dataclass(frozen=True)
class Inner:
    """The inner options."""

    seed: int = option(7, "--seed", "-s", help="The seed.", panel="Inner", option_default=-1, min=-1, read=abs)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options."""

    file: str
    size: int = option(1024, "--kib", help="The size.", panel="Outer", option_default=1, read=lambda kib: kib << 10)
    word: str | None = option(None, "--some-word", help="The word.", panel="Outer", choices=("red", "blue"))
    has_page: bool = option(True, "--page/--no-page", help="The page.", panel="Outer")
    names: tuple[str, ...] = options(
        (), Argument(("--one",), "One.", "Outer"), Argument(("--two",), "Two.", "Outer", default="b"),
        read=lambda one, two: (one, two),
    )  # fmt: skip
    inner: Inner = part(Inner)  # noqa: RUF009 (a field)


VALUES = {"kib": 3, "some_word": "red", "page": False, "one": "a", "two": "c", "seed": -5}


def test_options_come_in_the_order_of_the_fields() -> None:
    assert [argument.name for argument in arguments_of(Options)] == ["kib", "some_word", "page", "one", "two", "seed"]


def test_without_values_fields_have_their_own_defaults() -> None:
    assert Options(file="x") == Options(file="x", size=1024, word=None, has_page=True, names=(), inner=Inner(seed=7))


def test_defaults_of_the_command_line_are_in_its_own_units() -> None:
    assert [argument.default for argument in arguments_of(Options)] == [1, None, True, None, "b", -1]
    assert [argument.kind for argument in arguments_of(Options)] == [int, str, bool, str, str, int]


def test_fields_are_read_from_values() -> None:
    made = Options(file="x", **field_values(Options, VALUES))
    assert made == Options(file="x", size=3072, word="red", has_page=False, names=("a", "c"), inner=Inner(seed=5))


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(KeyError, match="two"):
        field_values(Options, {name: value for name, value in VALUES.items() if name != "two"})


def test_a_command_has_the_declared_options() -> None:
    app = Typer(add_completion=False)
    seen: list[dict[str, Any]] = []

    def command(**values: Any) -> None:
        seen.append(values)

    own = inspect.Parameter("more", inspect.Parameter.KEYWORD_ONLY, default=0, annotation=Annotated[int, Option()])
    setattr(command, "__signature__", inspect.Signature([own, *parameters(arguments_of(Options))]))  # noqa: B010
    app.command()(command)
    assert CliRunner().invoke(app, []).exit_code == 0
    assert seen.pop() == {"more": 0, "kib": 1, "some_word": None, "page": True, "one": None, "two": "b", "seed": -1}
    assert CliRunner().invoke(app, ["--kib", "2", "--some-word", "blue", "--no-page", "-s", "3"]).exit_code == 0
    assert seen.pop() == {"more": 0, "kib": 2, "some_word": "blue", "page": False, "one": None, "two": "b", "seed": 3}
    for wrong in (["--seed", "-2"], ["--some-word", "green"], ["--kib", "x"]):
        assert CliRunner().invoke(app, wrong).exit_code == 2
