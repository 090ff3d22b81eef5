"""Fixtures: runs of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import tiny
from support.answers import ENVIRONMENT, SETTINGS, SMALL, cost_of

from kvcompose_gguf.evaluation.records import RunFolder


@pytest.fixture(scope="module")
def model_path(tiny_model: Callable[[tiny.TinyConfig], Path]) -> Path:
    return tiny_model(tiny.GQA)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder.open(tmp_path / "run", SETTINGS, ENVIRONMENT)
    for sample in SMALL:
        run.add(cost_of(sample), sample)
    return run
