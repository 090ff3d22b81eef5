"""The page, in Debian's Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import tiny
from serving import running

from kvcompose_gguf import KVCompose
from kvcompose_gguf.server.options import ServeOptions

CONFIG = tiny.GQA
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def address(tiny_model) -> Iterator[str]:
    method = KVCompose(compression_ratio=0.5, scoring="repeat", min_tokens=100, keep_last=8)
    options = ServeOptions(
        model_path=tiny_model(CONFIG), n_ctx=1024, threads=1, n_batch=64, flash_attn=False, alias="tiny", method=method
    )
    with running(options) as address:
        yield address


def shown(address: str, folder: Path) -> str:
    """The page's document when its script has come to rest."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--virtual-time-budget=8000",
        "--dump-dom", f"{address}/",
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=90).stdout


def test_the_page_shows_the_model_and_that_nothing_is_compressed(address, tmp_path):
    document = shown(address, tmp_path)
    assert re.search(r'id="model">tiny, 1024 tokens<', document)
    assert "Nothing is compressed: prompts of 256 tokens and more are." in document


def test_the_page_shows_what_is_kept(address, tmp_path):
    body = {"prompt": tiny.tokens(CONFIG, 308), "n_predict": 2}
    kv = httpx2.post(f"{address}/completion", json=body, timeout=60).json()["timings"]["kv"]
    document = shown(address, tmp_path)
    assert re.search(r"Slot 0: of 300 tokens 50 % of the entries are removed", document)
    bars = [int(n) for n in re.findall(r'title="layer \d+: (\d+) of 300 tokens"', document)]
    assert bars == kv["n_kept"]
    shares = re.findall(r'title="kept by (\d+) % of the heads" style="background-color: rgba\(', document)
    assert len(shares) == 300
    assert len(set(shares)) > 2
