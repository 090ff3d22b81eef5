"""Checks that files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcompose_gguf.support.files import append_file, write_file


def test_folders_are_made_and_no_other_file_is_left(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "c.txt"
    write_file(file, "one\n")
    write_file(file, "two: ü\n")
    append_file(file, "three\n")
    assert file.read_bytes() == "two: ü\nthree\n".encode()
    assert [*file.parent.iterdir()] == [file]


def test_the_old_contents_stay_if_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.txt"
    write_file(file, "one")

    def fsync(descriptor: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError, match="the disk is full"):
        write_file(file, "two")
    assert file.read_text("utf-8") == "one"
    assert [*tmp_path.iterdir()] == [file]
