"""Tests session files on tiny models: what they restore, and which files are refused."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.llamas import F16, Q8_0, greedy

from kvcompose_gguf import ConfigError, KVCompose, StateError, sessions
from kvcompose_gguf.methods import SnapKV
from kvcompose_gguf.models.identity import Identity
from kvcompose_gguf.plan.composed import Contents

CONFIG = tiny.GQA
CONTEXT = tiny.tokens(CONFIG, 292, seed=5)
QUESTION = tiny.tokens(CONFIG, 9, seed=6)
HALF = KVCompose(compression_ratio=0.5, scoring="repeat", min_tokens=100, keep_last=0)

#: an architecture with sliding windows; its compressed contexts also save the state of the windows
GEMMA3 = tiny.ARCHITECTURES["gemma3"]
SMALL = {"n_batch": 64, "n_ubatch": 64, "swa_full": False}


def compressed(make_llama: Any, **kwargs: Any) -> Any:
    llama = make_llama(method=HALF, **kwargs)
    llama.compress(CONTEXT)
    return llama


@pytest.mark.parametrize("flash_attn", [False, True], ids=["transposed-v", "flash-attention"])
def test_a_session_goes_on_in_another_process_where_it_was_saved(make_llama, tmp_path, flash_attn):
    llama = compressed(make_llama, flash_attn=flash_attn)
    info = llama.save_session(tmp_path / "a.kvc", extra={"messages": [{"role": "user", "content": "é"}]})
    want = greedy(llama, [*CONTEXT, *QUESTION], 12)

    other = make_llama(method=HALF, flash_attn=flash_attn)
    loaded = other.load_session(tmp_path / "a.kvc")
    assert {**vars(loaded), "report": None} == {**vars(info), "report": None}
    assert loaded.extra == {"messages": [{"role": "user", "content": "é"}]}
    assert (loaded.n_tokens, loaded.n_context) == (292, 292)
    n_before = other.n_tokens
    assert greedy(other, [*CONTEXT, *QUESTION], 12) == want
    assert n_before == 292  # the context was continued, not read again
    assert str(other.kv_report) == str(llama.kv_report)
    assert other.context.composed.rows.n_rows.tolist() == other.kv_report.n_kept.tolist()
    ours, theirs = other.context.composed.rows, llama.context.composed.rows
    assert ours.end == theirs.end == 292
    for a, b in zip((*ours.positions, *ours.scores), (*theirs.positions, *theirs.scores), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_conversation_behind_the_context_is_saved_as_well(make_llama, tmp_path):
    llama = compressed(make_llama)
    said = greedy(llama, [*CONTEXT, *QUESTION], 5)
    llama.save_session(tmp_path / "a.kvc")
    tokens = llama.context.tokens
    other = make_llama(method=HALF)
    other.load_session(tmp_path / "a.kvc")
    assert other.context.tokens == tokens
    assert other.n_context == 292
    more = [*CONTEXT, *QUESTION, *said, *QUESTION]
    assert greedy(other, more, 8) == greedy(llama, more, 8)


def test_a_full_cache_is_saved_too(make_llama, tmp_path):
    llama = make_llama()
    want = greedy(llama, CONTEXT, 6)
    llama.prefill(CONTEXT)
    info = llama.save_session(tmp_path / "full.kvc")
    assert (info.method, info.n_context, info.report) == ("", 0, None)
    other = make_llama()
    other.load_session(tmp_path / "full.kvc")
    assert (other.n_tokens, greedy(other, CONTEXT, 6)) == (292, want)


def test_a_loaded_context_is_continued_under_any_method_until_another_is_set(make_llama, tmp_path):
    compressed(make_llama).save_session(tmp_path / "a.kvc")
    other = make_llama(method=SnapKV(compression_ratio=0.75, min_tokens=100))
    other.load_session(tmp_path / "a.kvc")
    greedy(other, [*CONTEXT, *QUESTION], 2)
    assert other.kv_report.compression_ratio == pytest.approx(0.5, abs=0.01)
    other.kv_compressor = SnapKV(compression_ratio=0.8, min_tokens=100)
    greedy(other, [*CONTEXT, *QUESTION], 2)
    assert other.kv_report.compression_ratio == pytest.approx(0.8, abs=0.01)


def test_a_file_is_the_rows_their_scores_and_one_percent(make_llama, tmp_path):
    llama = make_llama(method=KVCompose(compression_ratio=0.5, scoring="repeat", keep_last=0), n_ctx=8192)
    report = llama.compress(tiny.tokens(CONFIG, 6000, seed=9))
    info = llama.save_session(tmp_path / "a.kvc")
    # a tiny model's row has 512 bytes in 3 layers, so tokens and cells take a larger share than in a real model
    n_scores = int(report.n_kept.sum()) * CONFIG.n_head_kv
    beside = info.n_bytes - report.kv_bytes_kept - 4 * n_scores
    per_cell = beside / int(report.n_kept.max())
    assert per_cell < 40, f"{info.n_bytes} bytes, {report.kv_bytes_kept} of rows"


def test_a_second_question_finds_the_windows_of_a_loaded_session_as_they_were(make_llama, tmp_path):
    llama = make_llama(GEMMA3, method=HALF, **SMALL)
    llama.compress(CONTEXT)
    llama.save_session(tmp_path / "a.kvc")
    want = greedy(llama, [*CONTEXT, *QUESTION], 6)
    other = make_llama(GEMMA3, method=HALF, **SMALL)
    other.load_session(tmp_path / "a.kvc")
    greedy(other, [*CONTEXT, *tiny.tokens(GEMMA3, 80, seed=3)], 6)  # pushes the context out of the windows
    assert greedy(other, [*CONTEXT, *QUESTION], 6) == want
    refusing(make_llama, tmp_path / "a.kvc", "swa_full=False, this context has swa_full=True", config=GEMMA3)


#
# files that are refused
#


def refusing(make_llama: Any, path: Path, match: str, **kwargs: Any) -> None:
    llama = make_llama(**kwargs)
    want = greedy(llama, QUESTION, 4)
    held = llama.context.tokens
    with pytest.raises(StateError, match=match):
        llama.load_session(path)
    assert llama.context.tokens == held  # the cache is unchanged
    assert greedy(llama, QUESTION, 4) == want


def test_another_model_type_or_setting_is_refused_and_both_are_named(make_llama, tmp_path):
    path = tmp_path / "a.kvc"
    compressed(make_llama).save_session(path)
    refusing(
        make_llama,
        path,
        r"made with the model tiny-\d+\.gguf .* this one is tiny-\d+\.gguf \(\w+\): load it with its own model",
        config=tiny.MHA,
    )
    refusing(make_llama, path, "made with type_k=f32, this context has type_k=f16: use the same", type_k=F16)
    flash = tmp_path / "flash.kvc"
    compressed(make_llama, flash_attn=True).save_session(flash)
    refusing(make_llama, flash, "type_v=f32, this context has type_v=q8_0", type_v=Q8_0, flash_attn=True)
    refusing(make_llama, path, "flash_attn=False, this context has flash_attn=True", flash_attn=True)
    refusing(make_llama, path, "rope_freq_base=0.0, this context has rope_freq_base=5000", rope_freq_base=5000.0)
    refusing(make_llama, path, "292 tokens, n_ctx=256 is too small: raise it", n_ctx=256)


def rewritten(raw: bytes, **changes: Any) -> bytes:
    """Returns the file with other values in its header and a correct checksum."""
    magic, version, n_head = struct.unpack_from("<8sII", raw)
    header = json.loads(raw[16 : 16 + n_head]) | changes
    version = changes.pop("format", version)
    text = json.dumps(header).encode()
    at, out = 16 + n_head, [struct.pack("<8sII", magic, version, len(text)), text]
    size = 16 + len(text)
    for _, n_bytes in json.loads(raw[16 : 16 + n_head])["sections"]:
        at += -at % 64
        out += [bytes(-size % 64), raw[at : at + n_bytes]]
        size += -size % 64 + n_bytes
        at += n_bytes
    whole = b"".join(out)
    return whole + hashlib.sha256(whole).digest()


def test_headers_that_lie_are_refused(make_llama, tmp_path):
    path = tmp_path / "a.kvc"
    llama = compressed(make_llama)
    llama.save_session(path)
    good = path.read_bytes()
    assert rewritten(good) == good
    sections = json.loads(good[16 : 16 + struct.unpack_from("<8sII", good)[2]])["sections"]
    lies: dict[str, dict[str, Any]] = {
        "context": {"n_context": 10**9}, "negative": {"n_context": -1}, "heads": {"n_head_kv": [7]}, "many": {"n_head_kv": [2**40]}, "number": {"n_head_kv": 6},
        "report": {"report": {"n_tokens": 1}}, "listed report": {"report": [1]}, "infinite": {"report": {"kv_bytes": 1e999}}, "extra": {"extra": []},
        "model": {"model": 3}, "created": {"created": "now"}, "no sections": {"sections": sections[:1]},
        "huge section": {"sections": [["tokens", 2**60]]}, "text section": {"sections": [["tokens", "x"]]},
        "negative section": {"sections": [*sections[:-1], ["state", -5]]}, "settings": {"settings": 5},
    }  # fmt: skip
    other = make_llama(method=HALF)
    greedy(other, QUESTION, 2)
    held = other.context.tokens
    for name, changes in lies.items():
        path.write_bytes(rewritten(good, **changes))
        with pytest.raises(StateError, match=r"a\.kvc is damaged"):
            other.load_session(path)
        assert other.context.tokens == held, name
    path.write_bytes(rewritten(good, format=3))
    with pytest.raises(StateError, match="session format 3, this version reads format 2: make a new one"):
        other.load_session(path)
    path.write_bytes(rewritten(good, versions={"llama.cpp": "abc", "kvcompose-gguf": "9.9"}))
    with pytest.raises(
        StateError, match=r"llama.cpp abc in kvcompose-gguf 9.9, this is llama.cpp [0-9a-f]+ in .*: make a new one"
    ):
        other.load_session(path)


def test_a_flipped_bit_anywhere_is_an_error(make_llama, tmp_path):
    path, bad = tmp_path / "a.kvc", tmp_path / "b.kvc"
    compressed(make_llama).save_session(path)
    raw, chosen = bytearray(path.read_bytes()), random.Random(7)
    other = make_llama()
    places = [
        *range(0, 128),
        *(chosen.randrange(8 * len(raw)) for _ in range(300)),
        *range(8 * len(raw) - 64, 8 * len(raw)),
    ]
    for place in places:
        raw[place // 8] ^= 1 << place % 8
        bad.write_bytes(raw)
        with pytest.raises(StateError):
            other.load_session(bad)
        raw[place // 8] ^= 1 << place % 8
    bad.write_bytes(raw)
    other.load_session(bad)


def test_files_that_are_no_sessions_are_named(make_llama, tmp_path):
    llama = make_llama()
    for name, data in {"empty": b"", "text": b"hello" * 100, "short": b"KVCSESS\n"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(StateError, match=name):
            llama.load_session(tmp_path / name)
    with pytest.raises(StateError, match="No such file"):
        llama.load_session(tmp_path / "none.kvc")
    with pytest.raises(StateError, match="cannot be read"):
        llama.load_session(tmp_path)


def test_what_cannot_be_saved_is_refused_and_the_old_file_stays(make_llama, tmp_path):
    path = tmp_path / "a.kvc"
    llama = make_llama()
    with pytest.raises(ConfigError, match="the cache is empty"):
        llama.save_session(path)
    llama.prefill(CONTEXT)
    llama.save_session(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="extra="):
        llama.save_session(path, extra={"x": object()})
    with pytest.raises(StateError, match="cannot be written"):
        llama.save_session(path / "below" / "b.kvc")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.kvc"]
    assert path.stat().st_mode & 0o777 == 0o600


#
# names and lists
#


def test_a_name_is_a_file_of_the_users_folder_and_a_path_is_a_path(monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_data_dir", lambda name: str(tmp_path))
    assert sessions.session_path("report") == tmp_path / "sessions" / "report.kvc"
    assert sessions.session_path("report.kvc") == Path("report.kvc")
    assert sessions.session_path("../x") == Path("../x")
    for name in ("", ".", ".hidden"):
        with pytest.raises(ConfigError, match="session="):
            sessions.session_path(name)


def test_sessions_are_listed_newest_first(make_llama, tmp_path):
    llama = make_llama()
    llama.prefill(CONTEXT[:10])
    for i, name in enumerate(("b", "a", "c")):
        llama.save_session(tmp_path / f"{name}.kvc")
        os.utime(tmp_path / f"{name}.kvc", (1000 + i, 1000 + i))
    (tmp_path / "other.txt").write_text("x")
    assert [file.stem for file in sessions.list_sessions(tmp_path)] == ["c", "a", "b"]
    assert sessions.list_sessions(tmp_path / "none") == []
    assert sessions.describe(tmp_path / "a.kvc").n_tokens == 10


#
# crashes while a file is saved
#

WRITER = """
import sys
import numpy as np
from pathlib import Path
from kvcompose_gguf import sessions
from kvcompose_gguf.models.identity import Identity
from kvcompose_gguf.plan.composed import Contents

file, size = Path(sys.argv[1]), int(sys.argv[2])
for number in range(1 << 30):
    tokens = np.full(1000, number, dtype=np.int32)
    state = np.full(size, number % 251, dtype=np.uint8)
    identity = Identity("m", "id", {}, {})
    sessions.save(sessions.Snapshot(identity, Contents(tokens, state, None, None), size, {"number": number}), file)
    print(number, flush=True)
"""


def killed_while_saving(folder: Path, n_kills: int, n_bytes: int, seed: int) -> list[int]:
    """Kills a writer ``n_kills`` times; returns the number of the whole file found after each kill."""
    file, chosen, found = folder / "a.kvc", random.Random(seed), []
    for _ in range(n_kills):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(file), str(n_bytes)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        for _ in range(chosen.randint(1, 3)):
            assert writer.stdout.readline()
        time.sleep(chosen.random() * 0.05)  # by now the writer is somewhere in a later file
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        with sessions.opened(file) as (saved, info):
            number = info.extra["number"]
            assert (saved.contents.tokens == number).all()
            assert (saved.contents.state == number % 251).all()
            found.append(number)
    return found


def test_a_killed_process_leaves_the_old_file_whole(tmp_path):
    assert len(killed_while_saving(tmp_path, n_kills=5, n_bytes=1 << 20, seed=1)) == 5


def test_what_killed_processes_leave_is_removed_later(tmp_path):
    left = tmp_path / ".write-abc"
    left.mkdir()
    (left / "a.kvc").write_bytes(b"x")
    sessions_file = tmp_path / "a.kvc"
    snapshot = sessions.Snapshot(
        Identity("m", "id", {}, {}), Contents(np.zeros(1, np.int32), np.zeros(1, np.uint8), None, None), 0, {}
    )
    sessions.save(snapshot, sessions_file)
    assert left.exists()  # another process may still be writing it
    os.utime(left, (1, 1))
    sessions.save(snapshot, sessions_file)
    assert not left.exists()


#
# states in memory
#


@pytest.mark.parametrize("config", [CONFIG, GEMMA3], ids=["llama", "gemma3"])
def test_states_can_be_pickled_and_copied(make_llama, config):
    llama = make_llama(config, method=HALF, **SMALL)
    llama.compress(CONTEXT)
    state = llama.save_state()
    want = greedy(llama, [*CONTEXT, *QUESTION], 6)
    for again in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
        other = make_llama(config, method=HALF, **SMALL)
        other.load_state(again)
        assert (other.n_context, greedy(other, [*CONTEXT, *QUESTION], 6)) == (292, want)


def test_rows_that_lie_under_a_right_checksum_never_end_the_process(make_llama, tmp_path):
    path = tmp_path / "a.kvc"
    compressed(make_llama).save_session(path)
    good, chosen = path.read_bytes(), random.Random(11)
    n_head = struct.unpack_from("<8sII", good)[2]
    sections = dict(json.loads(good[16 : 16 + n_head])["sections"])
    first = len(good) - 32 - sections["state"]
    other = make_llama(method=HALF)
    outcomes = {"loaded": 0, "refused": 0}
    for number in range(300):
        raw = bytearray(good[:-32])
        # the counts and layouts are in the first bytes; rows, which may be anything, fill the rest
        at = first + chosen.randrange(400 if number % 3 else sections["state"])
        raw[at] = chosen.randrange(256)
        path.write_bytes(bytes(raw) + hashlib.sha256(raw).digest())
        try:
            other.load_session(path)
            outcomes["loaded"] += 1
        except StateError:
            outcomes["refused"] += 1
    path.write_bytes(good)
    other.load_session(path)
    assert len(greedy(other, [*CONTEXT, *QUESTION], 3)) == 3
    assert outcomes["refused"] > 0
