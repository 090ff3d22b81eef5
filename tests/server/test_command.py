"""``kvcompose serve``: options, addresses, and what ends it."""

from __future__ import annotations

import functools
import importlib.util
import re
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx2
import pytest
from support.commands import loaded_by_help
from support.serving import CONFIG, until
from typer.testing import CliRunner

from kvcompose_gguf import KVCompose
from kvcompose_gguf.cli.app import app
from kvcompose_gguf.methods import SnapKV
from kvcompose_gguf.server import command
from kvcompose_gguf.server.options import ServeOptions
from kvcompose_gguf.support.arguments import arguments_of


@pytest.fixture
def options_of(tiny_model, monkeypatch) -> Any:
    """The options that a command line means, or the line that refuses it."""
    seen: list[ServeOptions] = []
    monkeypatch.setattr(command, "serve", seen.append)

    def options_of(*arguments: str) -> Any:
        result = CliRunner().invoke(app, ["serve", "-m", str(tiny_model(CONFIG)), *arguments])
        return seen.pop() if result.exit_code == 0 else result.output + result.stderr

    return options_of


def test_what_is_not_said_is_as_in_the_options_themselves(options_of, tiny_model):
    assert options_of() == ServeOptions(model_path=tiny_model(CONFIG), type_k=1, type_v=1, timeout=3600)


def test_options_are_called_as_llama_servers(options_of, tmp_path):
    (tmp_path / "keys").write_text("b\nc\n")
    (tmp_path / "template").write_text("{{ messages }}")
    options = options_of(
        *["-c", "4096", "-np", "3", "-n", "7", "-b", "128", "-ub", "64", "-t", "2", "-tb", "1", "-ngl", "5", "-fa", "off", "-ctk", "q8_0", "-ctv", "f32", "-a", "x,y", "--tags", "t", "--api-key", "a"],
        *["--host", "127.0.0.1,::1", "--port", "0", "--no-metrics", "--no-slots", "--no-ui", "--timeout", "5", "--cors-origins", "*", "--jinja", "-v"],
        *["--temp", "0.5", "--top-k", "3", "--top-p", "0.5", "--min-p", "0.1", "--seed", "9", "--repeat-penalty", "1.1", "--repeat-last-n", "8", "--reasoning", "off"],
        *["--presence-penalty", "1", "--frequency-penalty", "2", "--no-cache-prompt", "--embeddings", "32", "--pooling", "last", "--reasoning-format", "none"],
        *["--slot-save-path"], str(tmp_path), *["--kv-save-idle", "1000", "--kv-budget", "10000000", "--queue", "2", "--max-body", "3"],
        "--api-key-file", str(tmp_path / "keys"), "--chat-template-file", str(tmp_path / "template"),
    )  # fmt: skip
    want: dict[str, Any] = {
        "n_ctx": 4096, "n_parallel": 3, "n_predict": 7, "n_batch": 128, "n_ubatch": 64, "threads": 2, "threads_batch": 1,
        "n_gpu_layers": 5, "flash_attn": False, "type_k": 8, "type_v": 0, "alias": "x,y", "tags": "t", "api_keys": ("a", "b", "c"),
        "endpoint_metrics": False, "endpoint_slots": False, "ui": False, "timeout": 5, "cors_origins": "*", "verbose": True,
        "cache_prompt": False, "embeddings": 32, "pooling": "last", "slot_save_path": tmp_path, "idle_bytes": 1000,
        "kv_budget": 10_000_000, "n_queue": 2, "max_body_bytes": 3 << 20, "chat_template": "{{ messages }}", "reasoning": False,
        "reasoning_format": "none", "method": None, "host": "127.0.0.1,::1", "port": 0,
    }  # fmt: skip
    assert {name: getattr(options, name) for name in want} == want
    s = options.sampling
    assert (s.temperature, s.top_k, s.top_p, s.min_p, s.seed, s.repeat_penalty, s.repeat_last_n) == (
        0.5,
        3,
        0.5,
        0.1,
        9,
        1.1,
        8,
    )
    assert (s.presence_penalty, s.frequency_penalty) == (1, 2)


def test_the_compression_is_called_as_in_every_command(options_of):
    method = options_of("--compression-ratio", "0.75", "--scoring", "window", "--min-tokens", "99").method
    assert type(method) is KVCompose
    assert (method.compression_ratio, method.scoring, method.min_tokens) == (0.75, "window", 99)
    method = options_of("--max-kv-bytes", "1.5MiB", "--method", "snapkv,window=8").method
    assert (type(method), method.max_kv_bytes, method.window) == (SnapKV, 1_572_864, 8)


def test_sizes_have_units(options_of, tmp_path):
    options = options_of("--kv-budget", "2GiB", "--kv-save-idle", "512 MB", "--slot-save-path", str(tmp_path))
    assert (options.kv_budget, options.idle_bytes) == (2 << 30, 512_000_000)


def test_copies_of_slots_have_no_room_beside_a_budget_unless_it_is_asked_for(options_of):
    """--kv-budget is for all caches together."""
    given: tuple[list[str], ...] = (
        [],
        ["--kv-budget", "2GiB"],
        ["--kv-budget", "2GiB", "--cache-ram", "3"],
        ["-cram", "0"],
        ["-cram", "-1"],
    )
    sizes = [options_of(*flags).memory_bytes for flags in given]
    assert sizes[:4] == [1 << 30, 0, 3 << 20, 0]
    assert sizes[4] > 1 << 60


OLD_NAMES = [
    ("--kv-compress", "--compression-ratio", "0.75"), ("--kv-bytes", "--max-kv-bytes", "100000"),
    ("--kv-method", "--method", "snapkv"), ("--kv-scoring", "--scoring", "window"), ("--kv-min-tokens", "--min-tokens", "99"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "value"), OLD_NAMES)
def test_an_old_name_means_the_new_one_and_says_so(tiny_model, monkeypatch, old, new, value):
    seen: list[Any] = []
    monkeypatch.setattr(command, "serve", seen.append)
    more = [] if "ratio" in new or "bytes" in new else ["--compression-ratio", "0.5"]
    start = ["serve", "-m", str(tiny_model(CONFIG)), *more]
    before, after = (CliRunner().invoke(app, [*start, name, value]) for name in (old, new))
    assert seen[0] == seen[1]
    assert seen[0].method is not None
    assert before.stderr == f"hint: {old} is now called {new}, the old name will be removed in the next version\n"
    assert after.stderr == ""
    both = CliRunner().invoke(app, [*start, old, value, new, value])
    assert both.exit_code == 1
    assert f"{old} is the old name of {new}: give {new} only" in both.stderr


def test_help_loads_neither_the_library_nor_the_server():
    text, loaded = loaded_by_help(["serve"], ["llama_cpp", "numba", "fastapi", "uvicorn"])
    assert "--kv-budget" in text
    assert loaded == []


def test_every_option_is_declared_once_and_sets_a_field():
    words = [word for argument in arguments_of(ServeOptions) for word in argument.spellings]
    assert len(words) == len(set(words))
    unset = {field.name for field in fields(ServeOptions) if not field.metadata}
    assert unset == {"model_path", "method"}  # made from the options that all commands share


def test_the_shim_takes_llama_servers_options(options_of, capsys):
    given = "--port 9 --temp 0.5 --offline --hf-repo a/b --batch-size 32 --cont-batching --embedding --metrics -np 3"
    options = options_of(*shim().our_arguments(given.split()))
    assert capsys.readouterr().out == "not ours: ['--offline', '--hf-repo', 'a/b', '--cont-batching']\n"
    want: dict[str, Any] = {
        "port": 9, "n_batch": 32, "embeddings": 32, "pooling": "mean", "endpoint_metrics": True, "endpoint_slots": False,
        "n_parallel": 3, "threads": 2, "timeout": None, "cors_origins": "*", "ui": True, "type_k": 1,
    }  # fmt: skip
    assert {name: getattr(options, name) for name in want} == want
    assert options.sampling.temperature == 0.5
    assert options_of(*shim().our_arguments([])).n_parallel == 4


def shim() -> Any:
    """scripts/llama_server_shim.py."""
    file = Path(__file__).parents[2] / "scripts" / "llama_server_shim.py"
    spec = importlib.util.spec_from_file_location("llama_server_shim", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_old_names_are_not_in_the_help():
    text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    assert "--compression-ratio" in text
    assert not [old for old, _, _ in OLD_NAMES if old in text]


def test_start_scripts_of_llama_server_work(options_of):
    options = options_of(
        "--mlock", "--no-warmup", "-cb", "--numa", "distribute", "--cache-reuse=0", "-c", "512", "-kvu", "-np", "2"
    )
    assert (options.n_ctx, options.n_parallel) == (512, 2)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--mmproj", "images"), ("--lora", "does not have it"), ("--context-shift", "--max-kv-bytes"), ("--rope-scale", "model's file"),
        ("--spec-draft-n-max", "speculative"), ("--json-schema", "body of a request"), ("--fim-qwen-7b-default", "--model"), ("--hf-token", "HF_TOKEN"), ("--list-devices", "kvcompose doctor"),
    ],
)  # fmt: skip
def test_flags_of_llama_server_that_would_change_answers_say_what_to_use(options_of, flag, words):
    line = options_of(flag, "x")
    assert line.startswith(f"error: {flag}: ")
    assert words in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--compression-ratio", "0.5", "--max-kv-bytes", "9"], "exactly one"), (["-ctk", "q9"], "is not a type of a KV cache"),
        (["--api-key-file", "none"], "cannot be read"), (["--chat-template-file", "none"], "cannot be read"),
        (["--kv-save-idle", "9"], "slot_save_path"), (["--slot-save-path", "none"], "is no folder"),
        (["--reasoning-format", "loud"], "is none of"), (["--compression-ratio", "0.5", "--method", "magic"], "magic"),
        (["--max-kv-bytes", "9 bytes"], "max_kv_bytes='9 bytes' is not a size"), (["--kv-budget", "0"], "kv_budget='0' is less than 1 byte"),
        (["--kv-save-idle", "1XB"], "kv_save_idle='1XB' is not a size"), (["--compression-ratio", "1"], "compression_ratio=1.0"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused_in_a_line(options_of, arguments, words):
    line = options_of(*arguments)
    assert line.startswith("error: ")
    assert words in line


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kvcompose_gguf", "serve", *arguments], stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def is_up(url: str) -> bool:
    return httpx2.get(url).status_code == 200


def test_a_process_listens_on_its_addresses_and_ends_when_told(tiny_model):
    hosts = ["127.0.0.1", "::1"] if has_ipv6() else ["127.0.0.1"]
    with start(
        "-m", str(tiny_model(CONFIG)), "--host", ",".join(hosts), "--port", "0", "-c", "512", "-t", "1"
    ) as process:
        assert process.stderr is not None
        text = process.stderr.readline()
        threading.Thread(target=process.stderr.read, daemon=True).start()
        ports = re.findall(r"http://(?:127\.0\.0\.1|::1):(\d+)", text)
        assert len(ports) == len(hosts), text
        for host, port in zip(("127.0.0.1", "[::1]"), ports, strict=False):
            until(functools.partial(is_up, f"http://{host}:{port}/health"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)  # uvicorn, when all is done, ends as the signal wants it


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_a_model_that_cannot_be_loaded_ends_the_process_with_a_line(tmp_path):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + b"\0" * 100)
    with start("-m", str(file), "--port", "0") as process:
        assert process.stderr is not None
        text = process.stderr.read()
        assert process.wait(30) == 1
    assert "error: " in text
    assert "Traceback" not in text


def test_a_port_that_is_taken_is_told(tiny_model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(
            app, ["serve", "-m", str(tiny_model(CONFIG)), "--port", str(taken.getsockname()[1])]
        )
    assert result.exit_code == 1
    assert "nothing can listen on 127.0.0.1" in result.stderr
