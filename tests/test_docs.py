"""The documents agree with the code: tables, links, commands, and the Python of the first page."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kvcompose_gguf"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "patches" / "README.md",
    *(ROOT / "docs").glob("*.md"),
]
PAGES = [pytest.param(document, id=str(document.relative_to(ROOT))) for document in sorted(DOCUMENTS)]


@pytest.fixture(scope="module")
def options() -> ModuleType:
    """scripts/docs_options.py."""
    spec = importlib.util.spec_from_file_location("docs_options", ROOT / "scripts" / "docs_options.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


#
# tables that come from the code
#


def test_the_tables_of_options_are_those_of_the_code(options: ModuleType) -> None:
    text = options.DOCUMENT.read_text("utf-8")
    assert options.render(text) == text, "run python scripts/docs_options.py"


def test_a_changed_default_makes_the_document_out_of_date(options: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    text = options.DOCUMENT.read_text("utf-8")
    field = next(field for field in options._fields(options.Method) if field.name == "keep_last")
    monkeypatch.setattr(field, "default", 33)
    changed = options.render(text)
    assert "| `keep_last` | `33` |" in changed
    assert changed != text


def test_a_changed_help_text_makes_the_document_out_of_date(
    options: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = options.DOCUMENT.read_text("utf-8")
    command = options.commands()["doctor"]
    monkeypatch.setattr(command, "help", "Another sentence.")
    monkeypatch.setattr(options, "commands", lambda: {"doctor": command})
    assert "### `kvcompose doctor`\n\nAnother sentence." in options.render(text)


def test_a_document_without_one_of_the_markers_is_refused(options: ModuleType) -> None:
    text = options.DOCUMENT.read_text("utf-8").replace("<!-- generated: shared-options -->", "")
    with pytest.raises(ValueError, match="shared-options"):
        options.render(text)


def test_attributes_of_a_docstring_are_read_over_lines_and_for_several_names(options: ModuleType) -> None:
    docstring = (
        "A thing.\n\nAttributes:\n    one: first\n        line, ``x``.\n    two, three: both.\nRaises:\n    E: no."
    )
    assert options.attributes(docstring) == {"one": "first line, `x`.", "two": "both.", "three": "both."}


def test_an_option_without_a_description_is_an_error(options: ModuleType) -> None:
    with pytest.raises(ValueError, match="does not describe nothing_like_this"):
        options._meaning(options.Method, "nothing_like_this")


def test_every_command_and_every_method_has_a_heading(options: ModuleType) -> None:
    headings = re.findall(r"^### `([^`]+)`", options.DOCUMENT.read_text("utf-8"), re.M)
    assert {f"kvcompose {name}" for name in options.commands()} <= {*headings}
    assert {name for name, _ in options._methods()} <= {*headings}


#
# the first page and links
#


def test_the_first_page_has_at_most_120_lines() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


@pytest.mark.parametrize("document", PAGES)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    assert not wrong


@pytest.mark.parametrize("document", PAGES)
def test_files_and_modules_that_a_page_names_exist(document: Path) -> None:
    text = document.read_text("utf-8")
    files = re.findall(
        r"\b(?:tests|scripts|patches|docs|kvcompose_gguf)/[\w/.-]*\w\.(?:py|sh|md|cpp|h|json|svg|png)\b", text
    )
    modules = re.findall(r"\bkvcompose_gguf(?:\.\w+)+", text)
    rooms = "|".join(folder.name for folder in PACKAGE.iterdir() if folder.is_dir())
    in_rooms = re.findall(rf"(?<![\w/.-])(?:{rooms})/[\w/.-]*\w\.py\b", text)
    places = {ROOT / name for name in files} | {ROOT / f"{name.replace('.', '/')}.py" for name in modules}
    places |= {PACKAGE / name for name in in_rooms}
    assert not [place for place in sorted(places) if not place.exists() and not place.with_suffix("").is_dir()]


def anchors(file: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(file.read_text("utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def test_every_document_of_docs_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {*re.findall(r"\]\((\w+\.md)\)", index.read_text("utf-8"))}
    assert linked == {document.name for document in index.parent.glob("*.md")} - {index.name}


#
# commands and code
#


@pytest.mark.parametrize("document", PAGES)
def test_commands_and_their_options_exist(document: Path, options: ModuleType) -> None:
    known = options.commands()
    wrong = []
    for line in command_lines(document.read_text("utf-8")):
        words = shlex.split(line, comments=True)[1:]
        name = next((name for n in (2, 1) if (name := " ".join(words[:n])) in known), None)
        if name is None:
            wrong.append(line)
            continue
        shown = [param for param in known[name].params if not getattr(param, "hidden", False)]  # no old names
        accepted = {option for param in shown for option in (*param.opts, *param.secondary_opts)} | {"--help"}
        given = [word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]
        wrong += [f"{word}: {line}" for word in given if word not in accepted]
    assert not wrong


def command_lines(text: str) -> Iterator[str]:
    """Every use of ``kvcompose`` with arguments in code: blocks, indented lines, and code in a sentence."""
    for block in re.findall(r"^```\n(.*?)^```$", text, re.M | re.S):
        yield from commands_of(re.sub(r"\n +", " ", block))
    prose = without_code(text)
    for line in re.findall(r"^    (.*)$", prose, re.M):
        yield from commands_of(line)
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose):
        yield from commands_of(" ".join(code.split()))


def commands_of(code: str) -> Iterator[str]:
    for line in code.splitlines():
        for part in re.split(r"\s\|\s|&&", line.removeprefix("### ")):
            # words in capitals stand for the reader's own, brackets for what may be left out
            if re.match(r"kvcompose [a-z]", part.strip()):
                yield re.sub(r"[\[\]…]", "", part.strip())


def test_command_lines_are_found_in_blocks_lines_and_sentences() -> None:
    text = "Use `kvcompose eval\nMODEL --quick`.\n\n    cat x | kvcompose chat m -\n\n```\nkvcompose bench m\n  --plot p\n```\n"
    assert [*command_lines(text)] == [
        "kvcompose bench m --plot p",
        "kvcompose chat m -",
        "kvcompose eval MODEL --quick",
    ]


@pytest.mark.parametrize("document", PAGES)
def test_python_in_documents_compiles(document: Path) -> None:
    for code in python_blocks(document):
        compile(code, str(document), "exec")


def python_blocks(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", document.read_text("utf-8"), re.M | re.S)


@pytest.mark.model
@pytest.mark.parametrize("name", ["README.md", "docs/sessions.md"])
def test_the_python_of_a_page_runs(name: str, smollm2: str, tmp_path: Path) -> None:
    (code,) = python_blocks(ROOT / name)
    (tmp_path / "report.txt").write_text("The report was written by Agnes in 1887. " * 40, encoding="utf-8")
    (tmp_path / "model.gguf").symlink_to(smollm2)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "of the KV entries removed" in done.stdout
    assert (tmp_path / "report.kvc").is_file()
