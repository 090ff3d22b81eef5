"""``-hf USER/REPO[:QUANT]`` against a server of the hub's routes on loopback, with an empty cache."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import hub_server, tiny
from support.hub_server import Hub, Repo
from typer.testing import CliRunner

from kvcompose_gguf.cli.app import app
from kvcompose_gguf.errors import ConfigError, DownloadError
from kvcompose_gguf.models import hub as hub_module
from kvcompose_gguf.models.hub import HubModel, choose_files, fetch_hub, parse_spec

QUANTS = {f"m-{quant}.gguf": quant.encode() * 1000 for quant in ("IQ4_XS", "Q4_K", "Q4_K_M", "Q8_0")}


@pytest.fixture
def hub(tiny_model) -> Iterator[Hub]:
    parts = {f"Q8_0/big-Q8_0-0000{i}-of-00003.gguf": bytes([i]) * 5000 for i in (3, 1, 2)}
    repos = {
        "user/quants": Repo({"README.md": b"# Model", "mmproj-Q4_K_M.gguf": b"vision", **QUANTS}),
        "user/split": Repo({**parts, "big-F16.gguf": b"f16"}),
        "user/hole": Repo({"big-Q8_0-00001-of-00002.gguf": b"one"}),
        "user/none": Repo({"README.md": b"# Model", "model.safetensors": b"weights"}),
        "user/gated": Repo({"m.gguf": b"secret"}, token="hf_right"),
        "user/down": Repo({"m.gguf": b""}, status=500),
        "user/refused": Repo({"m.gguf": b""}, status=401),
        "user/tiny": Repo({"tiny-f32.gguf": tiny_model(tiny.GQA).read_bytes()}),
    }
    with hub_server.running(repos) as server:
        yield server


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python in a process that has the server for its hub, an empty cache and no token."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()
    }
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], env=kept | settings | variables, capture_output=True, text=True, timeout=120
        )  # fmt: skip

    return run


@pytest.fixture
def fetch(client) -> Callable[..., str]:
    """What ``fetch_hub`` returns, or "Class: message" of one of the package's errors; anything else fails the test."""
    code = """
import sys
from kvcompose_gguf.errors import KVComposeError
from kvcompose_gguf.models.hub import fetch_hub
try:
    print(fetch_hub(sys.argv[1]))
except KVComposeError as error:
    print(f"{type(error).__name__}: {error}")
"""

    def fetch(spec: str, **variables: str) -> str:
        done = client("-c", code, spec, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return fetch


#
# files
#


@pytest.mark.parametrize(
    ("quant", "file"),
    [
        ("", "m-Q4_K_M.gguf"),
        (":Q8_0", "m-Q8_0.gguf"),
        (":q8_0", "m-Q8_0.gguf"),
        (":Q4_K", "m-Q4_K.gguf"),
        (":latest", "m-Q4_K_M.gguf"),
    ],
)
def test_the_file_of_a_quantization_is_downloaded_and_no_other(hub, fetch, tmp_path, quant, file):
    path = Path(fetch(f"user/quants{quant}"))
    assert path.name == file
    assert path.is_relative_to(tmp_path / "hf" / "hub")
    assert path.read_bytes() == QUANTS[file]
    assert hub.downloads() == [file]


def test_a_file_in_the_cache_is_not_downloaded_again(hub, fetch):
    assert fetch("user/quants:Q8_0") == fetch("user/quants:Q8_0")
    assert hub.downloads() == ["m-Q8_0.gguf"]


def test_a_file_that_changed_on_the_hub_is_downloaded_again(hub, fetch):
    fetch("user/quants:Q8_0")
    hub.repos["user/quants"].commit = "2" * 40
    hub.repos["user/quants"].files["m-Q8_0.gguf"] = b"newer"
    assert Path(fetch("user/quants:Q8_0")).read_bytes() == b"newer"


def test_all_parts_of_a_split_model_are_fetched_and_the_first_is_returned(fetch):
    first = Path(fetch("user/split:Q8_0"))
    assert first.name == "big-Q8_0-00001-of-00003.gguf"
    parts = sorted(first.parent.iterdir())
    assert [part.read_bytes() for part in parts] == [bytes([i]) * 5000 for i in (1, 2, 3)]


def test_a_download_that_breaks_is_an_error_and_the_next_one_goes_on_from_there(hub, fetch):
    content = bytes(range(256)) * (25 << 12)  # the client writes 10 MiB at a time
    hub.repos["user/quants"].files["m-Q8_0.gguf"] = content
    hub.cut_after = 15 << 20
    answer = fetch("user/quants:Q8_0")
    assert answer.startswith("DownloadError: hf_repo='user/quants' cannot be downloaded: "), answer
    path = fetch("user/quants:Q8_0")
    ranges = [each for method, where, each in hub.requests if method == "GET" and where.startswith("/cdn/")]
    assert ranges == [None, f"bytes={10 << 20}-"]
    assert Path(path).read_bytes() == content


def test_the_token_of_the_user_opens_a_gated_model(fetch):
    assert Path(fetch("user/gated", HF_TOKEN="hf_right")).read_bytes() == b"secret"


#
# errors are sentences
#


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        ("user/quants:Q2_K", "ConfigError", "has no file of quantization 'Q2_K', it has IQ4_XS, Q4_K, Q4_K_M, Q8_0"),
        ("user/none", "ConfigError", "has no .gguf model"),
        ("user/hole", "DownloadError", "lacks big-Q8_0-00002-of-00002.gguf, one of 2 parts"),
        ("user/nothing", "DownloadError", "does not exist"),
        ("user/gated", "DownloadError", "is gated: accept its terms"),
        ("user/down", "DownloadError", "HTTP 500"),
        ("user/refused", "DownloadError", "refused the token (HTTP 401)"),
        ("user--x/repo..y", "ConfigError", "is not a name of a repository"),
    ],
)
def test_what_cannot_be_downloaded_is_explained(fetch, spec, kind, words):
    answer = fetch(spec)
    assert answer.startswith(f"{kind}: hf_repo='{spec.split(':')[0]}'")
    assert words in answer


def test_a_gated_model_says_how_to_log_in(hub, fetch):
    answer = fetch("user/gated")
    assert f"{hub.url}/user/gated" in answer
    assert "hf auth login" in answer


def test_a_cache_that_cannot_be_written_is_explained(fetch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert fetch("user/quants", HF_HOME=str(tmp_path / "file" / "hf")).startswith(
        "DownloadError: hf_repo='user/quants'"
    )


@pytest.mark.parametrize("variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=str)
def test_without_a_connection_the_cached_copy_is_used(fetch, variables):
    path = fetch("user/quants:Q8_0")
    assert fetch("user/quants:Q8_0", **variables) == path
    other = fetch("user/quants:Q4_K", **variables)
    assert other.startswith(
        "DownloadError: hf_repo='user/quants' has no file of quantization 'Q4_K', it has Q8_0 in the cache"
    )
    missing = fetch("user/split", **variables)
    assert missing.startswith("DownloadError: hf_repo='user/split' is not in the cache")
    assert ("unset HF_HUB_OFFLINE" in missing) == ("HF_HUB_OFFLINE" in variables)


def test_offline_mode_asks_the_server_nothing(hub, fetch):
    fetch("user/quants:Q8_0", HF_HUB_OFFLINE="1")
    assert hub.requests == []


#
# names
#


@pytest.mark.parametrize(
    "spec", ["", "repo", "user/", "user/repo:", "a/b/c", "user/repo:Q8 0", "https://x/y", "user/../x", "-a/b"]
)
def test_a_name_of_another_form_is_refused_before_anything_is_imported(monkeypatch, spec):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an import of it would fail
    with pytest.raises(ConfigError, match="is not USER/REPO"):
        fetch_hub(spec)


def test_quantizations_are_whole_words():
    files = ["a-IQ4_XS.gguf", "a-Q8_0_L.gguf", "a.Q4_K_S.gguf", "UD-Q2_K_XL/a-UD-Q2_K_XL.gguf"]
    for quant, file in (("iq4_xs", 0), ("Q8_0_L", 1), ("Q4_K_S", 2), ("Q2_K_XL", 3), ("UD-Q2_K_XL", 3)):
        assert choose_files(HubModel("u/r", quant), files) == [files[file]]
    for quant in ("Q4_XS", "Q8_0", "Q4_K"):
        with pytest.raises(ConfigError, match="it has UD-Q2_K_XL, IQ4_XS, Q8_0_L, Q4_K_S"):
            choose_files(HubModel("u/r", quant), files)


def test_without_the_default_quantization_the_first_file_is_taken():
    assert choose_files(HubModel("u/r"), ["b.gguf", "a.gguf", "mmproj-a.gguf"]) == ["a.gguf"]
    with pytest.raises(DownloadError, match="lacks a-00001-of-00002"):
        choose_files(HubModel("u/r"), ["a-00002-of-00002.gguf"])


def test_a_spec_may_have_the_prefix_of_names_from_the_hub():
    assert parse_spec("hf://user/repo:Q8_0") == parse_spec("user/repo:Q8_0") == HubModel("user/repo", "Q8_0")
    assert parse_spec("user/repo") == parse_spec("user/repo:latest") == HubModel("user/repo")


#
# commands
#


def test_a_model_of_the_hub_answers_a_question(client, tmp_path):
    (tmp_path / "text.txt").write_text("A text about the sea. " * 20)
    done = client(
        "-m", "kvcompose_gguf", "chat", "-hf", "user/tiny", str(tmp_path / "text.txt"), "-q", "What?", "-n", "2", "-t", "1",
        "--ctx-size", "1024",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "command",
    [
        ["bench", "-hf", "u/r:Q8_0"],
        ["eval", "-hf", "u/r:Q8_0", "--out"],
        ["learn", "-hf", "u/r:Q8_0"],
        ["learn", "--hf-repo", "u/r:Q8_0", "--for", "compresskv"],
        ["serve", "-hf", "u/r:Q8_0"],
        ["chat", "-hf", "u/r:Q8_0", "-q", "Why?"],
        ["compress", "-hf", "u/r:Q8_0", "-o", "s.kvc", "FILE"],
        ["run", "-hf", "u/r:Q8_0", "--question", "Why?", "--context", "FILE"],
    ],
    ids=str,
)
def test_every_command_with_a_model_takes_one_of_the_hub(monkeypatch, tmp_path, command):
    file = tmp_path / "text.txt"
    file.write_text("A text.")

    def found(spec: str) -> Path:
        raise DownloadError(f"asked for {spec}")

    monkeypatch.setattr(hub_module, "fetch_hub", found)
    monkeypatch.delenv("KVCOMPOSE_LEARN")
    arguments = [str(file) if word == "FILE" else word for word in command]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "out")] if command[-1] == "--out" else arguments)
    assert result.exit_code == 1
    assert "error: asked for hf://u/r:Q8_0" in result.stderr


@pytest.mark.parametrize(
    "command", [["bench"], ["eval"], ["chat"], ["compress", "-o", "s.kvc"], ["serve", "-m"]], ids=str
)
def test_a_model_and_one_of_the_hub_exclude_each_other(command):
    result = CliRunner().invoke(app, [*command, "smollm2", "-hf", "u/r"])
    assert result.exit_code == 1
    assert "are two models: give one of them" in result.stderr


@pytest.mark.parametrize("command", [["bench"], ["learn"], ["chat"], ["compress", "-o", "s.kvc"], ["serve"]], ids=str)
def test_a_command_without_a_model_says_what_to_give(command):
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "the model is missing" in result.stderr
