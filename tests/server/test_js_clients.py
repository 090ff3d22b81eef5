"""Clients in JavaScript, over a real socket: Anthropic's own and Vercel's AI SDK. Their packages are fetched once."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from platformdirs import user_cache_path
from support import tiny
from support.chat_templates import CALL, HERMES
from support.serving import TIMEOUT, running, saying, tiny_options

pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="no npm")

KEY = "sk-secret"
HERE = Path(__file__).parent / "js"
#: seconds for npm, which may be behind a slow line
FETCH_TIMEOUT = 600


@pytest.fixture(scope="module")
def program() -> Path:
    """The program in a folder that has its packages, in the user's cache."""
    name = hashlib.sha256((HERE / "package.json").read_bytes()).hexdigest()[:16]
    folder = user_cache_path("kvcompose-gguf") / "js" / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            shutil.copy(HERE / "package.json", folder)
            command = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]
            try:
                subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=FETCH_TIMEOUT)
            except subprocess.SubprocessError as error:
                pytest.skip(f"npm cannot fetch the packages: {error}")
            (folder / "done").touch()
    return Path(shutil.copy(HERE / "clients.mjs", folder))


@pytest.fixture(scope="module")
def said_to(program: Path, tiny_model: Any) -> Iterator[Callable[[str], Any]]:
    """Returns what a client makes of the server's answers."""

    def run(what: str) -> Any:
        command = ["node", str(program), address, KEY, what]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with running(tiny_options(tiny_model(tiny.GQA), chat_template=HERMES, api_keys=(KEY,))) as address:
        yield run


def test_anthropics_client_asks_streams_and_counts(said_to):
    told = said_to("anthropic text")
    whole, final = told["whole"], told["final"]
    assert (whole["stop_reason"], whole["usage"]["output_tokens"]) == ("max_tokens", 12)
    assert told["text"] == final["content"][0]["text"] == whole["content"][0]["text"] != ""
    assert final["usage"]["output_tokens"] == 12
    usage = whole["usage"]
    assert told["counted"]["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_anthropics_client_uses_a_tool(said_to):
    with saying(CALL):
        told = said_to("anthropic tool")
    for message in told.values():
        used = message["content"][-1]
        assert (message["stop_reason"], used["name"], used["input"]) == ("tool_use", "weather", {"city": "Rome"})


def test_vercels_client_asks_and_streams(said_to):
    told = said_to("ai text")
    assert told["text"] == told["streamed"] != ""
    assert told["finishReason"] == "length"
    assert told["usage"]["outputTokens"] == told["streamedUsage"]["outputTokens"] == 12
    assert told["usage"]["inputTokens"] == told["streamedUsage"]["inputTokens"] > 0


def test_vercels_client_calls_a_tool(said_to):
    with saying(CALL):
        told = said_to("ai tool")
    assert [(call["toolName"], call["input"]) for call in told["toolCalls"]] == [("weather", {"city": "Rome"})]
    assert told["toolResults"][0]["output"] == "Rome is warm"
    assert [(call["toolName"], call["input"]) for call in told["streamedCalls"]] == [("weather", {"city": "Rome"})]


def test_vercels_client_gets_json(said_to):
    assert said_to("ai json") == {"city": "Rome"}


@pytest.mark.parametrize("client", ["anthropic", "ai"])
def test_errors_reach_the_user(said_to, client):
    told = said_to(f"{client} error")
    assert told["status"] == 400
    assert "exceeds the available context size" in told["message"]
