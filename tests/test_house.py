"""The house keeps its floor plan: arrows go downwards, nothing reaches into another module, no file grows too long."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAME = "kvcompose_gguf"
PACKAGE = ROOT / NAME

#: the floor plan, lowest first: a room may import the floors below it. Rooms of one floor do not know each other
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "moved"),
    ("support",),
    ("kernels", "models"),
    ("plan",),
    ("native",),
    ("scoring",),
    ("measurements",),
    ("methods",),
    ("cache",),
    ("tasks",),
    ("learning",),
    ("evaluation", "bench", "server", "chat"),
    ("cli",),
    ("door",),
)
#: the rooms of what lies at the top; all else there is a room of its own. The door hands on public names
AT_TOP = dict.fromkeys(
    ("access", "ceiling", "compression", "context", "holdings", "llama", "llama_base", "load", "reading", "sessions"),
    "cache",
) | dict.fromkeys(("", "__main__"), "door")

#: longest file, in lines. Exceptions must shrink: lower the number here with the file, and delete it at the limit
MAX_LINES, LONGER = 300, {"context.py": 347}  # one class: every verb that may change a cache
MAX_TEST_LINES = 400

#: names that begin with an underscore and are public, of named tuples and os
PUBLIC = {"_asdict", "_exit", "_fields", "_make", "_replace"}
#: private members of llama-cpp-python and of ctypes' libraries, and the only modules that may use them
BINDINGS = {
    "_LlamaModel", "_batch", "_candidates", "_ctx", "_exit_stack", "_create_completion", "_input_ids", "_internals",
    "_is_hybrid", "_is_recurrent", "_lib", "_logits_all", "_model", "_n_ctx", "_n_vocab", "_name", "_scores", "_seed",
    "_stack",
}  # fmt: skip
NEXT_TO_BINDINGS = ("native/", "llama.py", "llama_base.py")


@dataclass(frozen=True)
class Import:
    """An import of one of the package's modules.

    Attributes:
        source, target: modules, with dots, without the package's name; "" is the package's ``__init__``.
        typing_only: it stands under ``if TYPE_CHECKING``, so nothing is imported when the program runs.
    """

    source: str
    target: str
    where: str
    typing_only: bool = False


@dataclass(frozen=True)
class Module:
    """A file of the package, and its syntax tree."""

    path: str
    text: str

    @property
    def name(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".").removesuffix("__init__").rstrip(".")

    @property
    def tree(self) -> ast.Module:
        return parse(self.text)

    def at(self, node: ast.AST) -> str:
        return f"{NAME}/{self.path}:{node.lineno}"  # type: ignore[attr-defined]


@cache
def parse(text: str) -> ast.Module:
    return ast.parse(text)


@cache
def modules() -> tuple[Module, ...]:
    files = (file for file in sorted(PACKAGE.rglob("*.py")) if "lib" not in file.relative_to(PACKAGE).parts)
    return tuple(Module(file.relative_to(PACKAGE).as_posix(), file.read_text("utf-8")) for file in files)


def room(module: str) -> str:
    top = module.partition(".")[0]
    return AT_TOP.get(top, top)


def floor(module: str) -> int:
    """Returns the number of the module's floor, 0 for a room without one."""
    return next((n for n, rooms in enumerate(FLOORS, 1) if room(module) in rooms), 0)


#
# reading a module
#


def imports(module: Module, names: set[str]) -> Iterator[Import]:
    """Yields the imports of the package's ``names``, also those in functions and in texts such as "package.module:name"."""
    under_typing = {
        id(inner)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(module.tree):
        for target in targets(module, node):
            while target and target not in names:  # a name that a module defines
                target = target.rpartition(".")[0]
            yield Import(module.name, target, module.at(node), id(node) in under_typing)


def targets(module: Module, node: ast.AST) -> Iterator[str]:
    """Yields the dotted names in the package that a node imports: modules, or names that modules define."""
    if isinstance(node, ast.Import):
        yield from (inside(alias.name) for alias in node.names if is_ours(alias.name))
    elif isinstance(node, ast.ImportFrom):
        above = module.path.split("/")[: -node.level] if node.level else []
        base = ".".join([*above, node.module or ""]).strip(".") if node.level else inside(node.module or "")
        if node.level or is_ours(node.module or ""):
            yield from (f"{base}.{alias.name}".strip(".") for alias in node.names if alias.name != "__version__")
    elif isinstance(node, ast.Constant) and re.fullmatch(rf"{NAME}(\.\w+)+(:\w+)?", str(node.value)):
        yield inside(str(node.value).partition(":")[0])


def is_ours(dotted: str) -> bool:
    return dotted == NAME or dotted.startswith(f"{NAME}.")


def inside(dotted: str) -> str:
    return dotted.removeprefix(NAME).removeprefix(".")


def owned(module: Module) -> set[str]:
    """Returns the private names that a module's classes and functions define."""
    found: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("self.", "cls.")):
            found |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return {name for name in found if is_private(name)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def private_uses(module: Module) -> Iterator[tuple[str, ast.AST]]:
    """Yields every private name that a module takes from an object or imports."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, node
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            yield from ((str(arg.value), node) for arg in node.args[1:2] if isinstance(arg, ast.Constant))


#
# the rules: each returns what breaks it
#


def arrows_up(every: tuple[Module, ...]) -> list[str]:
    """Imports of a room on the same floor or above. Types count too: a lower room should not even know a higher one."""
    homeless = {room(module.name) for module in every if not floor(module.name)}
    found = [f"{name} has no room: add it to FLOORS or AT_TOP" for name in sorted(homeless)]
    for arrow in all_imports(every):
        here, there = room(arrow.source), room(arrow.target)
        if here != there and floor(arrow.source) <= floor(arrow.target):
            found.append(f"{arrow.where}: {here} imports {there} ({arrow.target or 'the package itself'})")
    return list(dict.fromkeys(found))


def all_imports(every: tuple[Module, ...]) -> list[Import]:
    names = {module.name for module in every}
    return [arrow for module in every for arrow in imports(module, names)]


def circles(every: tuple[Module, ...]) -> list[str]:
    """Circles of modules that import each other. An import for types alone closes none: it does not run."""
    graph: dict[str, set[str]] = {module.name: set() for module in every}
    for arrow in all_imports(every):
        if not arrow.typing_only and arrow.source != arrow.target:
            graph[arrow.source].add(arrow.target)
    found = []
    for name in sorted(graph):
        path = shortest_way_back(graph, name)
        if path and name == min(path):
            found.append(" -> ".join([*path, name]))
    return found


def shortest_way_back(graph: dict[str, set[str]], start: str) -> list[str]:
    """Returns the shortest circle through ``start``, or nothing."""
    ways, seen = [[start]], {start}
    while ways:
        way = ways.pop(0)
        if start in graph[way[-1]]:
            return way
        ways += [[*way, name] for name in sorted(graph[way[-1]] - seen)]
        seen |= graph[way[-1]]
    return []


def ctypes_outside(every: tuple[Module, ...]) -> list[str]:
    found = []
    for module in every:
        for node in ast.walk(module.tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            if not module.path.startswith("native/") and {name.partition(".")[0] for name in names} & {
                "ctypes",
                "ctypeslib",
            }:
                found.append(module.at(node))
    return found


def reaches_into(every: tuple[Module, ...]) -> list[str]:
    """Private names that the module does not define, except of the bindings next to them."""
    found = []
    for module in every:
        allowed = owned(module) | (BINDINGS if module.path.startswith(NEXT_TO_BINDINGS) else set())
        for name, node in private_uses(module):
            if is_private(name) and name not in allowed:
                found.append(f"{module.at(node)}: {name}")
    return sorted(found, key=place)


def place(line: str) -> tuple[str, int]:
    """Returns file and line number of a finding, to sort by."""
    file, number = line.split(":")[:2]
    return file, int(number)


def too_long(every: tuple[Module, ...], longer: dict[str, int]) -> list[str]:
    """Files above their limit, and exceptions that are no longer needed or no longer tight."""
    found = []
    for module in every:
        n_lines, limit = len(module.text.splitlines()), longer.get(module.path, MAX_LINES)
        if n_lines > limit:
            found.append(f"{NAME}/{module.path}: {n_lines} lines, at most {limit}")
        elif module.path in longer and n_lines < limit:
            found.append(f"{NAME}/{module.path}: {n_lines} lines now, LONGER says {limit}")
    return found + [f"LONGER names {path}, which is gone" for path in longer.keys() - {m.path for m in every}]


def long_tests(files: list[Path]) -> list[str]:
    sizes = {test.relative_to(ROOT).as_posix(): len(test.read_text("utf-8").splitlines()) for test in files}
    return [f"{name}: {n} lines" for name, n in sizes.items() if n > MAX_TEST_LINES]


def imports_of_tests(files: list[Path]) -> list[str]:
    found = []
    for test in files:
        for node in ast.walk(parse(test.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(part.startswith("test_") for name in names for part in name.split(".") if name != "test_"):
                found.append(f"{test.relative_to(ROOT).as_posix()}:{node.lineno}: {', '.join(names)}")  # type: ignore[attr-defined]
    return found


def every_test() -> list[Path]:
    return sorted((ROOT / "tests").rglob("*.py"))


#
# the house
#


def none(found: list[str]) -> None:
    assert not found, "\n".join(["", *found])


def test_arrows_go_downwards() -> None:
    none(arrows_up(modules()))


def test_no_modules_import_each_other_in_a_circle() -> None:
    none(circles(modules()))


def test_only_the_native_room_uses_ctypes() -> None:
    none(ctypes_outside(modules()))


def test_no_module_uses_private_members_of_another() -> None:
    none(reaches_into(modules()))


def test_no_module_is_too_long() -> None:
    none(too_long(modules(), LONGER))


def test_no_test_file_is_too_long() -> None:
    none(long_tests(every_test()))


def test_no_test_module_imports_another() -> None:
    none(imports_of_tests(every_test()))


#
# the rules themselves
#


def house(**files: str) -> tuple[Module, ...]:
    """Modules by name, with ``__`` for a slash."""
    return tuple(Module(name.replace("__", "/") + ".py", text) for name, text in files.items())


@pytest.mark.parametrize(
    "line",
    [
        "from ..methods import base",
        "from ..methods.base import Method",
        "def f():\n    import kvcompose_gguf.methods.base",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..methods import base",
        "PLACE = 'kvcompose_gguf.methods.base:Method'",
        "from .. import KVCompose",
    ],
)
def test_every_kind_of_import_upwards_is_found(line: str) -> None:
    assert len(arrows_up(house(methods__base="", plan__budget=line))) == 1


def test_imports_downwards_and_of_the_version_are_allowed() -> None:
    assert not arrows_up(
        house(methods__base="from ..plan.budget import x\nfrom .. import __version__", plan__budget="")
    )


def test_products_do_not_know_each_other() -> None:
    assert len(arrows_up(house(bench__runner="from ..server import app", server__app=""))) == 1


def test_a_new_room_needs_a_floor() -> None:
    assert len(arrows_up(house(attic__trunk="", plan__a=""))) == 1


def test_a_circle_is_found_once_and_types_close_none() -> None:
    typing = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import a"
    a, b = "def f():\n    from . import b", "from .c import x"
    assert circles(house(plan__a=a, plan__b=b, plan__c="from . import a")) == ["plan.a -> plan.b -> plan.c -> plan.a"]
    assert not circles(house(plan__a=a, plan__b=b, plan__c=typing))


def test_ctypes_and_numpys_ctypeslib_are_found() -> None:
    lines = "import ctypes\nfrom ctypes import c_int\nnp.ctypeslib.as_array(x)"
    assert len(ctypes_outside(house(llama=lines, native__rows=lines))) == 3


def test_private_members_of_others_are_found() -> None:
    own = "class A:\n    _a: int\n    def f(self):\n        self._b = 1\n        return self._a + other._b"
    uses = "class B(A):\n    def f(self):\n        return self._b, x._ctx, getattr(y, '_a'), tuple._replace()"
    assert len(reaches_into(house(plan__a=own, plan__b=uses))) == 3
    assert sorted(line.rpartition(" ")[2] for line in reaches_into(house(plan__a=own, llama=uses))) == ["_a", "_b"]


def test_an_exception_must_shrink() -> None:
    long = house(plan__a="\n" * (MAX_LINES + 5))
    assert len(too_long(long, {})) == 1
    assert not too_long(long, {"plan/a.py": MAX_LINES + 5})
    assert len(too_long(long, {"plan/a.py": MAX_LINES + 6})) == 1
    assert len(too_long((), {"plan/a.py": MAX_LINES + 5})) == 1
