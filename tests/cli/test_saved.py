"""``kvcompose compress`` and ``kvcompose sessions`` on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import tiny
from typer.testing import CliRunner

from kvcompose_gguf.cli import saved
from kvcompose_gguf.cli.app import app
from kvcompose_gguf.sessions import describe

WIDE = {"COLUMNS": "200", "TERM": "dumb"}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder of saved sessions."""
    found = tmp_path / "sessions"
    monkeypatch.setattr("kvcompose_gguf.sessions.info.sessions_dir", lambda: found)
    monkeypatch.setattr(saved, "sessions_dir", lambda: found)
    return found


def invoke(*arguments: str, input: str | None = None) -> Any:
    return CliRunner().invoke(app, arguments, env=WIDE, input=input)


@pytest.fixture
def compress(tiny_model: Any, tmp_path: Path) -> Any:
    """Runs the command on a text of 400 tokens."""
    text = tmp_path / "text.txt"
    text.write_text("The sea is calm. " * 24)

    def compress(out: str, *more: str) -> Any:
        return invoke("compress", str(tiny_model(tiny.GQA)), str(text), "-o", out, "-t", "1", "-c", "1024", *more)

    return compress


def test_a_document_becomes_a_session_of_the_size_that_is_printed(compress: Any, folder: Path) -> None:
    result = compress("report", "--compression-ratio", "0.5")
    assert result.exit_code == 0, result.output
    info = describe(folder / "report.kvc")
    assert info.report is not None
    assert info.report.compression_ratio == pytest.approx(0.5, abs=0.02)
    assert f"{info.n_tokens:,} tokens in a file of {info.n_bytes / 1e6:,.1f} MB" in result.output
    full, kept = (n / 1e6 for n in (info.report.kv_bytes_full, info.report.kv_bytes_kept))
    assert f"{kept:,.1f} MB of KV cache instead of {full:,.1f} MB (50% removed)" in result.output


def test_a_chat_goes_on_with_a_compressed_document(compress: Any, tiny_model: Any, tmp_path: Path) -> None:
    file = tmp_path / "here.kvc"
    assert compress(str(file)).exit_code == 0
    result = invoke(
        "chat", str(tiny_model(tiny.GQA)), "--session", str(file), "-q", "What?", "-n", "2", "-t", "1", "-c", "1024"
    )
    assert result.exit_code == 0, result.output
    assert "Loaded" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "a/b.txt", "FILE"], "does not end in .kvc"),
        (["-o", "name"], "no document is given"),
        (["-o", "name", "none.txt"], "none.txt does not exist"),
        (["-o", ".kvc", "FILE"], "error: "),
    ],
)
def test_what_cannot_be_compressed_is_refused_in_a_line(
    tiny_model: Any, tmp_path: Path, folder: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "text.txt").write_text("A text.")
    (tmp_path / ".kvc").mkdir()
    given = [str(tmp_path / "text.txt") if word == "FILE" else word for word in arguments]
    given = [str(tmp_path / ".kvc") if word == ".kvc" else word for word in given]
    result = invoke("compress", str(tiny_model(tiny.GQA)), *given)
    assert result.exit_code == 1
    assert words in result.stderr
    assert not folder.exists()


def test_sessions_are_listed_and_a_damaged_one_is_shown_as_damaged(compress: Any, folder: Path) -> None:
    assert "There are no sessions" in invoke("sessions").output
    compress("report")
    (folder / "broken.kvc").write_bytes((folder / "report.kvc").read_bytes()[:500])
    (folder / "empty.kvc").touch()
    result = invoke("sessions", "list")
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.output.splitlines()}
    assert set(lines) == {"name", "report", "broken", "empty"}
    info = describe(folder / "report.kvc")
    for word in (info.model_name, f"{info.n_tokens:,}", f"{info.n_bytes / 1e6:,.1f} MB", "50%"):
        assert word in lines["report"]
    assert "is damaged" in lines["broken"]
    assert "is damaged" in lines["empty"]
    assert invoke("sessions").output.split()[:2] == ["name", "model"]


def test_a_session_is_shown_after_its_checksum_was_verified(compress: Any, folder: Path) -> None:
    compress("report")
    text = invoke("sessions", "show", "report").output
    assert "text.txt" in text
    assert "compression_ratio=0.5" in text
    assert "layer" in text
    raw = bytearray((folder / "report.kvc").read_bytes())
    raw[-100] ^= 1
    (folder / "report.kvc").write_bytes(raw)
    result = invoke("sessions", "show", "report")
    assert result.exit_code == 1
    assert "is damaged" in result.stderr


def test_sessions_are_deleted_after_a_question(folder: Path) -> None:
    folder.mkdir()
    files = [folder / f"{name}.kvc" for name in "ab"]
    for file in files:
        file.write_bytes(b"damaged ones can be deleted too")
    assert "Delete the session a" in invoke("sessions", "delete", "a", input="n\n").output
    assert files[0].exists()
    assert "there is no session 'c'" in invoke("sessions", "delete", "a", "c", "--yes").stderr
    assert files[0].exists()
    assert invoke("sessions", "delete", "a", input="y\n").exit_code == 0
    assert [file.exists() for file in files] == [False, True]
    assert invoke("sessions", "delete", str(files[1]), "--yes").exit_code == 0
    assert list(folder.iterdir()) == []


def test_only_session_files_can_be_deleted(tmp_path: Path) -> None:
    file = tmp_path / "precious.txt"
    file.write_text("mine")
    assert "does not end in .kvc" in invoke("sessions", "delete", str(file), "--yes").stderr
    assert file.exists()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "now"), (-5, "now"), (59.9, "59 s"), (60, "1 min"), (7200, "2 h"), (86400, "1 day"), (200000, "2 days")],
)
def test_an_age_is_in_its_largest_unit(seconds: float, text: str) -> None:
    assert saved.age(seconds) == text
