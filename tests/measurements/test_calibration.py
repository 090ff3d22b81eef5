"""Calibrations: their files, and where they are looked for."""

from __future__ import annotations

import json
import math

import pytest

from kvcompose_gguf import ConfigError
from kvcompose_gguf.measurements import calibration
from kvcompose_gguf.measurements.calibration import Calibration, load_calibration, save_calibration
from kvcompose_gguf.models import hashes
from kvcompose_gguf.models.hashes import model_sha256

GOOD = Calibration("m.gguf", "abc", ((0.5, 1.25), (0.0, 3.0)), (0.25, 0.75), {"n_needles": 3})


def test_a_calibration_comes_back_from_its_file(folder):
    assert Calibration.from_json(GOOD.to_json()) == GOOD
    file = save_calibration(GOOD)
    assert file == folder / "abc.json"
    assert file.read_text("utf-8") == GOOD.to_json()
    assert json.loads(GOOD.to_json())["heads"] == [[0.5, 1.25], [0.0, 3.0]]
    assert [path.name for path in folder.iterdir()] == ["abc.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version=2"), ({"version": None}, "version"), ({"heads": []}, "0 layers"),
        ({"heads": [[1.0, 2.0]]}, "1 layers and 2 errors"), ({"heads": [[1.0], []]}, "layers"),
        ({"heads": [1.0, 2.0]}, "list of lists"), ({"heads": None}, "list of lists"), ({"errors": 1.0}, "list of lists"),
        ({"heads": [[1.0], [math.nan]]}, "nan"), ({"heads": [[1.0], [-1e-9]]}, "number of at least 0"),
        ({"heads": [[1.0], ["1"]]}, "'1'"), ({"heads": [[1.0], [True]]}, "True"), ({"errors": [0.5, 0.6]}, "sum"),
        ({"errors": [1.5, -0.5]}, "-0.5"), ({"errors": [math.inf, 0]}, "inf"), ({"model_sha256": 5}, "model_sha256"),
        ({"settings": [1]}, "settings"), ({"unknown": 1}, "unknown"),
    ],
)  # fmt: skip
def test_a_damaged_calibration_is_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        Calibration.from_json(json.dumps(json.loads(GOOD.to_json()) | change))


def test_something_else_is_refused():
    for text in ("", "{", "[]", "[1]", "5", "{}", '{"version": 1}'):
        with pytest.raises(ConfigError, match="calibration"):
            Calibration.from_json(text)


def test_the_users_own_calibration_comes_before_the_packages(folder, tmp_path, monkeypatch):
    model = tmp_path / "some.gguf"
    model.write_bytes(b"weights")
    shipped = tmp_path / "package"
    shipped.mkdir()
    monkeypatch.setattr(calibration, "shipped_dir", lambda: shipped)
    with pytest.raises(ConfigError, match=f"kvcompose learn {model} --for compresskv"):
        load_calibration(model)
    sha256 = model_sha256(model)
    of_package = Calibration("shipped", sha256, GOOD.heads, GOOD.errors)
    (shipped / f"{sha256}.json").write_text(of_package.to_json(), "utf-8")
    assert load_calibration(model) == of_package
    own = Calibration("own", sha256, GOOD.heads, GOOD.errors)
    save_calibration(own)
    assert load_calibration(model) == own
    (folder / f"{sha256}.json").write_text(GOOD.to_json(), "utf-8")
    with pytest.raises(ConfigError, match=r"another model, m\.gguf"):
        load_calibration(model)
    (folder / f"{sha256}.json").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=sha256):
        load_calibration(model)


def test_every_calibration_of_the_package_can_be_used():
    files = [*calibration.shipped_dir().glob("*.json")]
    assert files
    for file in files:
        assert Calibration.from_json(file.read_text("utf-8")).model_sha256 == file.stem


def test_a_model_is_hashed_once_unless_it_changes(folder, tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(hashes, "sha256", lambda file, sha256=hashes.sha256: hashed.append(file) or sha256(file))
    model = tmp_path / "m.gguf"
    model.write_bytes(b"one")
    first = model_sha256(model)
    assert model_sha256(model) == first
    assert len(hashed) == 1
    model.write_bytes(b"other")
    assert model_sha256(model) != first
    assert len(hashed) == 2
    (folder / "sha256.json").write_text("{", "utf-8")
    assert len(model_sha256(model)) == 64
    assert len(hashed) == 3
    with pytest.raises(ConfigError, match="cannot be read"):
        model_sha256(tmp_path / "none.gguf")
