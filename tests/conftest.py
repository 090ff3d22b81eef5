"""Fixtures: models and libraries."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import pytest

pytest.register_assert_rewrite("support")  # before its first import: asserts in helpers show their values

from support import tiny, tiny_gguf  # noqa: E402
from support.llamas import F32  # noqa: E402

if TYPE_CHECKING:
    from kvcompose_gguf import KVCompose, Llama


def pytest_configure() -> None:
    os.environ.setdefault("NUMBA_NUM_THREADS", "2")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tiny.TinyConfig], Path]:
    """Returns the path of a tiny configuration's GGUF, which is written once."""
    folder = tmp_path_factory.mktemp("tiny")
    paths: dict[tiny.TinyConfig, Path] = {}

    def path(config: tiny.TinyConfig) -> Path:
        if config not in paths:
            paths[config] = tiny_gguf.write(config, folder / f"tiny-{len(paths)}.gguf")
        return paths[config]

    return path


@pytest.fixture
def make_llama(tiny_model: Callable[[tiny.TinyConfig], Path]) -> Any:
    """Builds a Llama on a tiny model and closes it after the test. The caches are f32, to compare with numpy."""
    from kvcompose_gguf import Llama  # loads the library, which the pure tests do without

    made: list[Llama] = []

    def make(config: tiny.TinyConfig = tiny.GQA, method: KVCompose | None = None, **kwargs: Any) -> Llama:
        options: dict[str, Any] = {
            "n_ctx": 1024, "n_threads": 2, "n_threads_batch": 2, "type_k": F32, "type_v": F32, "verbose": False,
        }  # fmt: skip
        llama = Llama(str(tiny_model(config)), kv_compressor=method, **(options | kwargs))
        made.append(llama)
        return llama

    yield make
    for llama in made:
        llama.close()


@pytest.fixture
def start(tiny_model: Callable[[tiny.TinyConfig], Path]) -> Iterator[Callable[..., Any]]:
    """Starts a server on the tiny model, with the options given, and returns a client."""
    from support.serving import CONFIG, in_process, tiny_options

    with contextlib.ExitStack() as running:
        yield lambda **options: running.enter_context(in_process(tiny_options(tiny_model(CONFIG), **options)))


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Returns the path of the real model, which is fetched into the user's cache once."""
    from kvcompose_gguf.models import known

    return str(known.fetch("smollm2"))


@pytest.fixture(autouse=True, scope="session")
def nothing_is_learnt() -> Iterator[None]:
    """Keeps tests apart from each other, and from what the user's models have learnt; also fixtures of whole modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVCOMPOSE_LEARN", "off")
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns an empty folder that stands for the user's calibrations."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    return tmp_path / "kvcompose-gguf" / "calibrations"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the empty folder in which this test keeps what it learns."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    monkeypatch.delenv("KVCOMPOSE_LEARN")
    return tmp_path / "kvcompose-gguf" / "learned"
