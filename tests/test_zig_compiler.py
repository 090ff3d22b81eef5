"""The flags of gcc that zig calls by another name (scripts/zig_compiler.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "scripts" / "zig_compiler.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("-march=armv8-a", "-mcpu=generic+v8a"),
        ("-march=armv8.2-a+dotprod+fp16+sve", "-mcpu=generic+v8_2a+dotprod+fullfp16+sve"),
        ("-march=armv9.2-a+nosve+sme", "-mcpu=generic+v9_2a-sve+sme"),
        ("-mavx2", "-mavx2"),
        ("-DNAME=-march=armv8-a", "-DNAME=-march=armv8-a"),
    ],
)
def test_versions_and_features_of_arm_get_llvms_names(script: ModuleType, given: str, wanted: str) -> None:
    assert script.translated(given) == wanted
