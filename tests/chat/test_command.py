"""``kvcompose chat`` without a terminal: options, pipes, JSON, and files that cannot be read; the real model once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fpdf
import pytest
from support import tiny
from support.processes import environment

from kvcompose_gguf.chat.options import ChatOptions
from kvcompose_gguf.errors import ConfigError

TEXT = " ".join(f"Room {i} is painted in colour {i * 37 % 101}." for i in range(24))


@pytest.fixture
def run(
    tiny_model: Callable[[tiny.TinyConfig], Path], tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a chat with pipes for its standard streams."""
    (tmp_path / "rooms.txt").write_text(TEXT)

    def start(stdin: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
        request = {"model": str(tiny_model(tiny.GQA)), "threads": 1, "max_tokens": 8, **options}
        return subprocess.run(
            [sys.executable, "-m", "support.chatting", json.dumps(request)],
            cwd=tmp_path,
            env=environment(XDG_DATA_HOME=str(tmp_path / "data")),
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            timeout=240,
        )

    return start


Run = Callable[..., "subprocess.CompletedProcess[str]"]


#
# options
#


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -0.5}, "temperature=-0.5 is negative"),
        ({"temperature": "hot"}, "temperature='hot' is not a number"),
        ({"ctx_size": 0}, "ctx_size=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"repeat_penalty": 0}, "repeat_penalty=0"),
        ({"threads": 1.5}, "threads=1.5 is not an integer"),
        ({"compression_ratio": 0.5, "max_kv_bytes": 1000}, "are two budgets: give one"),
        ({"session": "a", "files": ("b.txt",)}, "session='a' has its own documents: leave out b.txt"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        ChatOptions(model="m", **options)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"files": ["nowhere.txt"]}, "error: nowhere.txt does not exist: check the name and the folder"),
        ({"files": ["binary.bin"]}, "error: binary.bin is a binary file, not text. Documents are text, Markdown"),
        ({"files": ["."]}, "error: . is a folder"),
        ({"files": ["rooms.txt"], "ctx_size": 512}, "do not fit into the context of 512 with 64 for a question. Use a larger --ctx-size"),
        ({"files": ["long.txt"]}, "do not fit into the context of 4,096 with 64 for a question. The model was trained for 4,096"),
        ({"session": "nothing"}, "nothing.kvc"),
        ({"method": "magic"}, "error: method='magic' is none of"),
        ({"compression_ratio": 1.0}, "error: compression_ratio=1.0"),
        ({"model": "nowhere.gguf"}, "nowhere.gguf"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_ends_the_command_with_a_sentence(
    run: Run, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)))
    (tmp_path / "long.txt").write_text(TEXT * 6)
    done = run(**options, questions=["Which colour?"])
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


#
# pipes
#


def test_questions_on_the_command_line_are_answered_in_plain_text(run: Run) -> None:
    says = "It is **blue**.\n\n- not red"
    done = run(files=["rooms.txt"], questions=["Which colour?", "/help is a question here"], says=says, max_tokens=99)
    assert done.returncode == 0
    assert done.stdout == f"{says}\n\n{says}\n"
    assert done.stderr.startswith("Read rooms.txt: ")
    assert "\x1b" not in done.stdout + done.stderr


def test_questions_and_commands_come_line_by_line_from_a_pipe(run: Run) -> None:
    done = run("Which colour?\n\n/memory\nAnd now?\n/quit\nNever asked?\n", files=["rooms.txt"], says="Blue.")
    assert done.returncode == 0
    assert done.stdout == "Blue.\nBlue.\n"
    assert "tokens are compressed" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_a_command_that_fails_in_a_pipe_fails_the_chat_at_its_end(run: Run) -> None:
    done = run("/add nowhere.txt\nWhich colour?\n", says="Blue.")
    assert done.returncode == 1
    assert "error: nowhere.txt does not exist" in done.stderr
    assert done.stdout == "Blue.\n"


def test_a_document_may_come_through_the_pipe(run: Run) -> None:
    done = run(TEXT, files=["-"], questions=["Which colour?"], says="Blue.")
    assert (done.returncode, done.stdout) == (0, "Blue.\n")
    assert done.stderr.startswith("Read standard input: ")


def test_json_has_answers_times_and_figures(run: Run) -> None:
    done = run(files=["rooms.txt"], questions=["Which colour?", "Why?"], json=True, compression_ratio=0.5)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["documents"] == ["rooms.txt"]
    assert found["report"]["compression_ratio"] == pytest.approx(0.5, abs=0.01)
    assert len(found["report"]["n_kept"]) == tiny.GQA.n_layer
    assert [answer["question"] for answer in found["answers"]] == ["Which colour?", "Why?"]
    first, second = found["answers"]
    assert first["n_tokens"] == 8
    assert first["end"] == "max_tokens"
    assert first["first_seconds"] > 0
    assert second["n_prompt"] > first["n_prompt"]
    assert second["memory"]["n_bytes"] < second["memory"]["n_bytes_full"]
    assert second["memory"]["n_context"] == found["report"]["n_tokens"]


def test_json_takes_questions_from_a_pipe(run: Run) -> None:
    done = run("Which colour?\n\nWhy?\n", says="Blue \x1b[2J\x9b.", json=True, max_tokens=99)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "\x9b" not in done.stdout
    assert [answer["answer"] for answer in json.loads(done.stdout)["answers"]] == ["Blue \x1b[2J\x9b."] * 2


def test_a_session_is_named_in_another_process(run: Run) -> None:
    assert run("/save rooms\n", files=["rooms.txt"]).returncode == 0
    done = run(session="rooms", questions=["Which colour?"], says="Blue.")
    assert (done.returncode, done.stdout) == (0, "Blue.\n")
    assert "about rooms.txt, with 0 answers" in done.stderr


#
# the real model
#

FACT = "The access code of the east gate is 7316."
FILLER = (
    "The harbour office keeps a log of every ship that enters. Each entry has a date, a name and a cargo. "
    "In spring the fishing boats leave before dawn and return in the afternoon. The wind comes mostly from the west. "
    "Repairs of the pier were finished last year, and the new cranes have been in use since then. "
)


def make_pdf(path: Path, n_paragraphs: int) -> None:
    """A PDF of several pages with ``FACT`` in the middle."""
    pdf = fpdf.FPDF()
    pdf.set_font("helvetica", size=12)
    pdf.add_page()
    for i in range(n_paragraphs):
        pdf.multi_cell(0, text=f"{i + 1}. {FILLER}" + (FACT if i == n_paragraphs // 2 else ""))
        pdf.ln(8)
    pdf.output(str(path))


@pytest.mark.model
def test_a_fact_of_a_pdf_is_found_in_its_compressed_context(smollm2: str, run: Run, tmp_path: Path) -> None:
    make_pdf(tmp_path / "harbour.pdf", 12)
    question = "What is the access code of the east gate?"
    options = {"model": smollm2, "compression_ratio": 0.5, "max_tokens": 64, "threads": 2}
    done = run(f"{question}\n/save harbour\n", files=["harbour.pdf"], **options)
    assert done.returncode == 0, done.stderr
    assert "7316" in done.stdout
    assert done.stderr.startswith("Read harbour.pdf: ")

    done = run(session="harbour", questions=[f"Once more: {question}"], json=True, **options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "7316" in found["answers"][0]["answer"]
    assert found["report"]["compression_ratio"] == pytest.approx(0.5, abs=0.01)
    # the answer went on from the saved context: what is compressed is what was read
    assert found["answers"][0]["memory"]["n_context"] == found["report"]["n_tokens"] > 500
