"""Runs the real benchmark on a tiny model. Numbers are compared exactly; times must only be present."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from support import tiny
from typer.testing import CliRunner

from kvcompose_gguf.bench import measure
from kvcompose_gguf.bench.measure import context_tokens
from kvcompose_gguf.bench.measured_cache import VariantRun
from kvcompose_gguf.bench.options import BenchOptions
from kvcompose_gguf.bench.plot import plot_bench
from kvcompose_gguf.bench.process import VariantProcess
from kvcompose_gguf.bench.result import BenchResult, Environment, Measurement, Variant, read_result
from kvcompose_gguf.cli.app import app
from kvcompose_gguf.errors import ConfigError, ContextLengthError, NativeError
from kvcompose_gguf.native.vocab_only import open_vocabulary
from kvcompose_gguf.support.checks import parse_numbers

N_TOKENS, N_DECODE, REPEATS = 300, 8, 2
MEASURED = ["full f16", "full q8_0", "KVCompose 0.5 f16", "KVCompose 0.75 f16", "KVCompose 0.75 q8_0"]


@pytest.fixture(scope="module")
def document(tiny_model: Callable[[tiny.TinyConfig], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the JSON file of a real run."""
    file = tmp_path_factory.mktemp("bench") / "out.json"
    arguments = [
        "bench", str(tiny_model(tiny.GQA)), "--n-tokens", str(N_TOKENS), "--compression-ratio", "0.5,0.75",
        "--n-decode", str(N_DECODE), "--repeats", str(REPEATS), "--threads", "2", "--json", str(file),
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert all(name in done.output for name in MEASURED)
    return file


@pytest.fixture
def result(document: Path) -> BenchResult:
    return read_result(document)


@pytest.fixture
def measured(result: BenchResult) -> dict[str, Measurement]:
    return {m.variant.name: m for m in result.measurements}


def made_up(sizes: Sequence[int] = (1000, 2000), variants: int = 9) -> BenchResult:
    """Returns a result without a run, with more variants than colours."""
    environment = Environment(
        "2026-01-01T00:00:00+00:00",
        "0.1.0",
        "0" * 40,
        "CPU",
        "a CPU",
        2,
        "Linux",
        "3.11",
        2,
        2,
        "m.gguf",
        10**8,
        "random",
    )
    rows = [
        Measurement(
            Variant("f16", None if i == 0 else i / 10), n, n + 512, 32, 1.0, 2.0, 0.1, 0.1, 512, (1.0, 2.0, 3.0),
            n * 1000 // (i + 1), n * 1100, 10**8, 10**8 + n * 1100, None,
        )
        for n in sizes
        for i in range(variants)
    ]  # fmt: skip
    return BenchResult(environment, {"n_tokens": list(sizes), "repeats": 3, "n_decode": 32}, tuple(rows), True)


#
# a real run
#


def test_every_variant_is_measured_with_equally_many_cells(result: BenchResult) -> None:
    assert [m.variant.name for m in result.measurements] == MEASURED
    assert {(m.n_tokens, m.n_ctx) for m in result.measurements} == {(N_TOKENS, 1024)}
    assert result.complete


def test_every_sample_is_present_and_positive(result: BenchResult) -> None:
    for m in result.measurements:
        assert len(m.decode_seconds) == REPEATS
        assert all(0 < seconds < math.inf for seconds in (*m.decode_seconds, m.prefill_seconds))
        steps = (m.score_seconds, m.plan_seconds, m.compose_seconds, m.scoring_chunk)
        if m.variant.compression_ratio is None:
            assert steps == (0, 0, 0, 0)
        else:
            assert min(steps) > 0


def test_rows_are_what_ratio_and_type_make_of_the_full_cache(measured: dict[str, Measurement]) -> None:
    n_elements = N_TOKENS * tiny.GQA.n_layer * tiny.GQA.n_head_kv * tiny.GQA.n_embd_head * 2
    rows = {name: m.kv_bytes_rows for name, m in measured.items()}
    q8_0 = 34 / 32  # bytes an element: a block of 32 has a scale of two bytes
    assert rows["full f16"] == n_elements * 2
    assert rows["full q8_0"] == n_elements * q8_0
    assert rows["KVCompose 0.5 f16"] == pytest.approx(n_elements * 2 / 2, rel=0.01)
    assert rows["KVCompose 0.75 f16"] == pytest.approx(n_elements * 2 / 4, rel=0.01)
    assert rows["KVCompose 0.75 q8_0"] == pytest.approx(n_elements * q8_0 / 4, rel=0.01)


def test_less_is_allocated_for_fewer_rows_and_smaller_types(measured: dict[str, Measurement]) -> None:
    assert sorted(measured, key=lambda name: -measured[name].kv_bytes) == MEASURED
    assert all(m.kv_bytes > m.kv_bytes_rows for m in measured.values())


def test_memory_is_measured_in_each_variants_own_process(measured: dict[str, Measurement]) -> None:
    for m in measured.values():
        assert m.baseline_bytes > 10_000_000  # an interpreter with numpy
        if sys.platform == "linux":
            assert m.peak_bytes is not None
            assert m.peak_bytes > m.rss_bytes - 1_000_000  # the kernel counts pages in batches
            assert m.peak_bytes < m.baseline_bytes + 100_000_000  # and not this process, which is larger
    full = measured["full f16"]
    assert full.rss_bytes > full.baseline_bytes


def test_the_document_says_what_was_run_and_where(document: Path, result: BenchResult) -> None:
    written = json.loads(document.read_text("utf-8"))
    assert (written["schema"], written["program"], written["complete"]) == (1, "kvcompose bench", True)
    assert len(written["llama_cpp_commit"]) == 40
    assert written["model_bytes"] > 0
    assert (written["n_threads"], written["n_threads_batch"]) == (2, 2)
    assert "random" in written["text"]
    assert all(written[name] for name in ("date", "package_version", "cpu", "os", "python", "backends", "model"))
    assert written["arguments"] == {
        "n_tokens": [N_TOKENS], "up_to": None, "ratios": [0.5, 0.75], "kv_types": ["f16", "q8_0"],
        "n_decode": N_DECODE, "repeats": REPEATS, "threads": 2, "text": None,
    }  # fmt: skip
    row = written["results"][0]
    assert row["name"] == "full f16"
    assert row["decode_speedup"] == 1
    assert row["decode_tokens_per_second"]["min"] <= row["decode_tokens_per_second"]["median"]
    assert row["decode_tokens_per_second"]["max"] == N_DECODE / min(row["decode_seconds"])


def test_a_document_read_and_written_again_is_the_same(document: Path, result: BenchResult) -> None:
    assert result.to_dict() == json.loads(document.read_text("utf-8"))
    assert BenchResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_an_earlier_run_is_shown_and_its_document_is_the_last_line(document: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "--from", str(document), "--json", "-"])
    assert done.exit_code == 0, done.output
    *table, last = done.stdout.splitlines()
    assert json.loads(last) == json.loads(document.read_text("utf-8"))
    assert all(any(name in line for line in table) for name in MEASURED)


#
# a process
#


def run(model: Path, variant: Variant) -> VariantRun:
    tokens = tiny.tokens(tiny.GQA, 40)
    return VariantRun(model, variant, 256, 2, 2, tokens[:32], tokens[32:])


def test_a_waiting_process_takes_no_cpu_time_and_a_dead_one_is_noticed(
    tiny_model: Callable[[tiny.TinyConfig], Path],
) -> None:
    with VariantProcess(run(tiny_model(tiny.GQA), Variant("f16"))) as started:
        started.read()
        assert started.decode() > 0
        process = psutil.Process(started.pid)

        def seconds_used() -> float:
            before = process.cpu_times()
            time.sleep(0.5)
            after = process.cpu_times()
            return after.user + after.system - before.user - before.system

        # OpenMP's threads spin for a while first, on a machine with other work for longer
        assert any(seconds_used() < 0.05 for _ in range(120))
        process.kill()
        with pytest.raises(NativeError, match=r"full f16 at n_tokens=32: the process ended with exit code"):
            started.decode()
    assert not psutil.pid_exists(process.pid)


def test_an_error_of_a_process_names_its_variant(tmp_path: Path) -> None:
    file = tmp_path / "no.gguf"
    file.write_bytes(b"not a model")
    with (
        VariantProcess(run(file, Variant("q8_0", 0.5))) as started,
        pytest.raises(ConfigError, match=r"KVCompose 0.5 q8_0 at n_tokens=32: .*no.gguf cannot be used"),
    ):
        started.read()


#
# what is measured
#


def test_sizes_are_powers_of_two_up_to_what_the_model_allows() -> None:
    assert BenchOptions().sizes(8192) == [1024, 2048, 4096, 7680]
    assert BenchOptions(up_to=4096).sizes(8192) == [1024, 2048, 4096]
    assert BenchOptions(up_to=100_000).sizes(2048) == [1024, 1536]
    assert BenchOptions().sizes(1024) == [512]
    assert BenchOptions(n_tokens=(2000, 1000)).sizes(8192) == [1000, 2000]
    assert BenchOptions(n_tokens=(8160,), n_decode=32).sizes(8192) == [8160]


@pytest.mark.parametrize("n_ctx_train", [8191, 20])
def test_sizes_beyond_the_model_are_refused(n_ctx_train: int) -> None:
    with pytest.raises(ContextLengthError, match=r"n_tokens=8160 .* n_decode=32 leaves"):
        BenchOptions(n_tokens=(100, 8160)).sizes(n_ctx_train)
    with pytest.raises(ContextLengthError, match=r"n_tokens=2 "):
        BenchOptions().sizes(33)


def test_the_middle_ratio_is_measured_with_the_other_types_as_well() -> None:
    variants = BenchOptions(ratios=(0.9, 0.5, 0.75), kv_types=("f16", "q8_0", "q4_0")).variants
    assert variants[:3] == [Variant("f16"), Variant("q8_0"), Variant("q4_0")]
    assert variants[3:6] == [Variant("f16", 0.9), Variant("f16", 0.5), Variant("f16", 0.75)]
    assert variants[6:] == [Variant("q8_0", 0.75), Variant("q4_0", 0.75)]


@contextlib.contextmanager
def vocabulary_of(model: Path) -> Iterator[object]:
    with open_vocabulary(model) as vocabulary:
        yield vocabulary


def test_random_tokens_are_ordinary_and_a_shorter_context_is_the_beginning_of_a_longer_one(
    tiny_model: Callable[[tiny.TinyConfig], Path],
) -> None:
    with vocabulary_of(tiny_model(tiny.GQA)) as vocabulary:
        tokens, text = context_tokens(vocabulary, 500, None)
        assert context_tokens(vocabulary, 200, None)[0] == tokens[:200]
    assert tokens[0] == 1  # <s>, which this vocabulary asks for
    assert all(3 <= token < tiny.GQA.n_vocab for token in tokens[1:])
    assert len(set(tokens)) > 100
    assert "default_rng(0)" in text


def test_a_text_is_repeated_until_it_is_long_enough(
    tiny_model: Callable[[tiny.TinyConfig], Path], tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abc", encoding="utf-8")
    with vocabulary_of(tiny_model(tiny.GQA)) as vocabulary:
        tokens, text = context_tokens(vocabulary, 9, file)
    assert tokens == [1, *([3 + ord(letter) for letter in "abcabcab"])]
    assert text == "text.txt, 3 tokens, cut or repeated"


#
# the picture
#


@pytest.mark.parametrize("name", ["picture.svg", "picture.png"])
def test_a_picture_is_drawn_of_a_document(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra `plot`")
    source, picture = tmp_path / "made_up.json", tmp_path / name
    source.write_text(json.dumps(made_up().to_dict()), encoding="utf-8")
    done = CliRunner().invoke(app, ["bench", "--from", str(source), "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    assert picture.stat().st_size > 5000
    if picture.suffix == ".svg":
        assert "KVCompose, 80% removed, f16" in picture.read_text("utf-8")


def test_without_matplotlib_only_the_picture_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"plot=.*kvcompose-gguf\[plot\]"):
        plot_bench(made_up(), tmp_path / "picture.svg")
    source = tmp_path / "made_up.json"
    source.write_text(json.dumps(made_up().to_dict()), encoding="utf-8")
    assert CliRunner().invoke(app, ["bench", "--from", str(source)]).exit_code == 0


#
# errors, before anything is run
#


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model is missing"),
        (["no.gguf"], "model='no.gguf' is neither a file nor one of gemma-3-270m, smollm2"),
        (["m.gguf", "--n-tokens", ""], "n_tokens=[] must be"),
        (["m.gguf", "--n-tokens", "1k"], "n_tokens='1k' is not a comma-separated list of integers"),
        (["m.gguf", "--n-tokens", "100,100"], "n_tokens=[100, 100] must be a list of different values"),
        (["m.gguf", "--n-tokens", "100,1"], "n_tokens=1 is too small"),
        (["m.gguf", "--n-tokens", "4096"], "n_tokens=4096 is too large"),
        (["m.gguf", "--compression-ratio", " "], "compression_ratio=[] must be"),
        (
            ["m.gguf", "--compression-ratio", "0.5,"],
            "compression_ratio='0.5,' is not a comma-separated list of numbers",
        ),
        (["m.gguf", "--compression-ratio", "0.5,1"], "compression_ratio=1.0: the fraction removed must be in [0, 1)"),
        (["m.gguf", "--compression-ratio", "-0.1"], "compression_ratio=-0.1"),
        (["m.gguf", "--compression-ratio", "nan"], "compression_ratio=nan"),
        (["m.gguf", "--kv-types", "f16,q9"], "kv_types='q9' is not one of f32, f16"),
        (["m.gguf", "--n-decode", "0"], "n_decode=0 is not positive"),
        (["m.gguf", "--repeats", "0"], "repeats=0 is not positive"),
        (["m.gguf", "--up-to", "-1"], "up_to=-1 is not positive"),
        (["m.gguf", "--json", "no/out.json"], "json='no/out.json' cannot be written"),
        (["m.gguf", "--json", "."], "json='.' cannot be written"),
        (["m.gguf", "--plot", "no/out.svg"], "plot='no/out.svg' cannot be written"),
        (["m.gguf", "--plot", "out.gif"], "plot='out.gif' does not end in one of .svg, .png, .pdf"),
        (["m.gguf", "--text", "no.txt"], "text='no.txt' cannot be read"),
        (["m.gguf", "--text", "empty.txt"], "text='empty.txt' is empty"),
        (["m.gguf", "--from", "out.json"], "cannot be combined"),
        (["--from", "no.json"], "from='no.json' is not a JSON file of"),
        (["--from", "empty.txt"], "from='empty.txt' is not a JSON file of"),
        (["--from", "newer.json"], "schema=2; this version reads 1"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_run(
    arguments: list[str],
    message: str,
    tiny_model: Callable[[tiny.TinyConfig], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib", reason="pictures need the extra `plot`")
    monkeypatch.setattr(measure, "_measure", lambda *_: pytest.fail("measured"))
    monkeypatch.chdir(tmp_path)
    Path("m.gguf").write_bytes(tiny_model(tiny.GQA).read_bytes())
    Path("empty.txt").touch()
    Path("newer.json").write_text('{"schema": 2}', encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 1, done.output
    assert message in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_lists_of_numbers_may_have_blanks() -> None:
    assert parse_numbers("n_tokens", "1024, 2048", int) == (1024, 2048)
    assert parse_numbers("n_tokens", None, int) is None


def test_the_command_has_help() -> None:
    done = CliRunner().invoke(app, ["bench", "--help"])
    assert done.exit_code == 0
    assert "--n-tokens" in done.output
