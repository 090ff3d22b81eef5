"""Runs the whole chain on SmolLM2-135M-Instruct."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.llamas import greedy, last_logits

from kvcompose_gguf import CompositionPlan, KVCompose

pytestmark = pytest.mark.model

DATA = Path(__file__).parent / "data"


@pytest.fixture
def make_smollm2(smollm2):
    from kvcompose_gguf import Llama

    made = []

    def make(method=None, **kwargs):
        options = {"n_ctx": 2560, "n_threads": 2, "n_threads_batch": 2, "flash_attn": True, "verbose": False}
        made.append(Llama(smollm2, kv_compressor=method, **(options | kwargs)))
        return made[-1]

    yield make
    for llama in made:
        llama.close()


@pytest.fixture(scope="session")
def prose() -> list[int]:
    """Returns 1,000 token ids of ordinary English for SmolLM2, with which the reference's budgets were made."""
    return json.loads((DATA / "reference_budgets.json").read_text())["models"]["SmolLM2-135M-Instruct.Q4_1"]["ids"]


def test_layer_budgets_are_those_of_the_published_reference(make_smollm2, prose):
    want = np.array(
        json.loads((DATA / "reference_budgets.json").read_text())["models"]["SmolLM2-135M-Instruct.Q4_1"]["n_kept"]
    )
    llama = make_smollm2(
        KVCompose(
            compression_ratio=0.5, scoring="repeat", scoring_chunk=None, n_sink=0, first_layer_rule=True, keep_last=0
        )
    )
    got = llama.compress(prose).n_kept
    correlation = np.corrcoef(got, want)[0, 1]
    difference = np.abs(got - want)
    print(f"correlation {correlation:.5f}, largest difference {difference.max()} of 1000, mean {difference.mean():.2f}")
    assert got.sum() == want.sum() == 15000
    assert correlation > 0.999
    assert difference.max() <= 12  # the reference in bfloat16 instead of float32 is up to 6 away from itself


def test_keeping_everything_changes_no_logits(make_smollm2, prose):
    llama = make_smollm2()
    after = prose[400:464]
    llama.context.prefill(prose[:400])
    want = []
    for token in after:
        llama.eval([token])
        want.append(last_logits(llama))
    llama.context.prefill(prose[:400])
    llama.session.compose(CompositionPlan.keep_all(400, [3] * 30))
    for token, logits in zip(after, want, strict=True):
        llama.eval([token])
        assert np.abs(last_logits(llama) - logits).max() <= 1e-3
    assert llama.session.state().n_composed == 400


def test_a_needle_is_found_in_a_quarter_of_the_cache(make_smollm2, prose):
    from kvcompose_gguf import Llama

    llama: Llama = make_smollm2(KVCompose(compression_ratio=0.75, keep_last=0))
    text = (
        llama.detokenize(prose[:250]) + b"\nThe password of the boathouse is 7419.\n" + llama.detokenize(prose[500:800])
    )
    context = llama.prompt_tokens(text)
    report = llama.compress(context)
    prompt = context + llama.context.vocabulary.tokens("\n\nThe password of the boathouse is")
    assert b"7419" in llama.detokenize(greedy(llama, prompt, 6))
    assert report.kv_bytes_kept <= 0.26 * report.kv_bytes_full


def test_a_prompt_continues_when_the_tokenizer_merges_across_the_seam(make_smollm2, prose):
    llama = make_smollm2(KVCompose(compression_ratio=0.5, keep_last=0, min_tokens=100))
    document = llama.detokenize(prose[:200]).decode().rsplit(" ", 3)[0] + " night"
    prompt = document + "s are long here, and"
    tokens = llama.prompt_tokens(document)
    assert llama.prompt_tokens(prompt)[: len(tokens)] != tokens  # "nights" is one token
    report = llama.compress(document)
    llama.create_completion(prompt, max_tokens=3, temperature=0.0)
    assert llama.kv_report is report
    assert llama.session.state().n_composed == len(tokens)
    assert llama.detokenize(llama.context.tokens).decode().lstrip().startswith(prompt)


def test_a_chat_is_compressed_and_continued(make_smollm2, prose):
    llama = make_smollm2(KVCompose(compression_ratio=0.5))
    document = llama.detokenize(prose[:400]).decode()
    messages = [{"role": "user", "content": f"{document}\n\nWhat is this about?"}]
    first = llama.create_chat_completion(messages, max_tokens=12, temperature=0.0)["choices"][0]["message"]
    report = llama.kv_report
    assert report is not None
    assert report.n_tokens > 350
    again = [*messages, first, {"role": "user", "content": "And who is in it?"}]
    llama.create_chat_completion(again, max_tokens=4, temperature=0.0)
    assert llama.kv_report is report


MEMORY = """
import gc, json, sys
import numpy as np
from kvcompose_gguf import KVCompose, Llama
from kvcompose_gguf.scoring.evidence import Evidence

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

def reset_peak():
    open("/proc/self/clear_refs", "w").write("5")

n_tokens, ratio = 4000, 0.75
llama = Llama(sys.argv[1], n_ctx=4096, flash_attn=True, n_threads=2, n_threads_batch=2, verbose=False)
ids = np.random.default_rng(0).integers(100, 40000, n_tokens).tolist()
llama.context.prefill(ids)
session = llama.session
# attention that spreads over layers like a real one's: memory does not depend on which tokens are kept
rng = np.random.default_rng(1)
attention = [(rng.random((9, n_tokens)) ** power).astype(np.float32) for power in np.linspace(1, 12, 30)]
plan = KVCompose(compression_ratio=ratio).plan(Evidence(n_tokens, session.layers, attention))
from kvcompose_gguf import kernels
kernels.warm_up()
del attention
gc.collect()
full, rss_full = session.state().n_bytes, status("VmRSS")
reset_peak()
session.compose(plan)
out = {
    "n_tokens": n_tokens, "n_kept": plan.n_kept.tolist(), "row": session.layers[0].n_bytes_row,
    "full": full, "small": session.state().n_bytes, "rows": [session.cells(il).n_rows for il in range(30)],
    "rss_full": rss_full, "rss_small": status("VmRSS"), "peak": status("VmHWM"),
}
llama.eval(ids[:8])
print(json.dumps(out))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_gives_the_memory_back(smollm2):
    out = subprocess.run([sys.executable, "-c", MEMORY, smollm2], capture_output=True, text=True, check=True).stdout
    m = json.loads(out.splitlines()[-1])
    freed, rss_freed = m["full"] - m["small"], m["rss_full"] - m["rss_small"]
    kept, room = sum(m["n_kept"]) * m["row"], (sum(m["rows"]) - sum(m["n_kept"])) * m["row"]
    context = m["n_tokens"] * 30 * m["row"]
    layer = m["full"] / 30
    mb = {key: round(value / 1e6, 1) for key, value in m.items() if isinstance(value, int)}
    print(
        f"{mb}, kept rows {kept / context:.3f} of the context's, freed {freed / 1e6:.1f}, resident {rss_freed / 1e6:.1f} MB less, "
        f"peak {(m['peak'] - m['rss_full']) / 1e6:+.1f} MB over full"
    )
    assert m["small"] <= 0.27 * context + room
    assert rss_freed >= 0.9 * freed
    assert m["peak"] <= m["rss_full"] + layer + 32e6


@pytest.fixture
def gemma():
    """gemma-3-270m, a base model: 15 of 18 layers see the last 512 tokens, the other three everything."""
    from kvcompose_gguf import Llama
    from kvcompose_gguf.models import known as models

    method = KVCompose(compression_ratio=0.25, keep_last=0)  # three layers hold all that lies behind the windows
    llama = Llama(
        str(models.fetch("gemma-3-270m")), n_ctx=4096, n_threads=2, n_threads_batch=2, flash_attn=True, verbose=False,
        kv_compressor=method, swa_full=False,
    )  # fmt: skip
    yield llama
    llama.close()


def test_a_sliding_window_model_keeps_its_windows_and_finds_what_lies_behind_them(gemma):
    from kvcompose_gguf.cli.demo.questions import document

    text = document()
    needle = "\nThe password of the boathouse is 7419.\n"
    context = gemma.prompt_tokens(text[:1500] + needle + text[1500:6500])
    question = gemma.context.vocabulary.tokens("\nThe password of the boathouse is")
    place = len(gemma.prompt_tokens(text[:1500]))
    assert len(context) - place > 512 + 256  # the windows do not see it, and their cells were used again
    report = gemma.compress(context)
    assert len(report.n_kept) == 3
    assert report.kv_bytes_kept <= 0.751 * report.kv_bytes_full
    answers = [gemma.detokenize(greedy(gemma, context + question, 8)) for _ in range(2)]
    assert b"7419" in answers[0]
    assert answers[0] == answers[1]  # the windows were brought back to the end of the context
    assert gemma.session.state().n_composed == len(context)


def test_keeping_everything_of_a_sliding_window_model_changes_no_logits(gemma, prose):
    text = gemma.prompt_tokens(b"The keeper walked along the shore and looked at the lamp. " * 90)
    context, after = text[:1000], text[1000:1024]
    assert len(after) == 24
    want: list[np.ndarray] = []
    got: list[np.ndarray] = []
    for logits, compose in ((want, False), (got, True)):
        gemma.context.prefill(context, keep_prefix=False)
        if compose:
            gemma.session.compose(CompositionPlan.keep_all(1000, [layer.n_head_kv for layer in gemma.session.layers]))
        for token in after:
            gemma.eval([token])
            logits.append(last_logits(gemma))
    assert np.abs(np.array(got) - np.array(want)).max() <= 1e-3


def test_the_quick_evaluation_has_real_numbers(smollm2, tmp_path, capsys):
    """Also a smoke test of `kvcompose eval`: prints its report."""
    from typer.testing import CliRunner

    from kvcompose_gguf.cli.app import app
    from kvcompose_gguf.evaluation.records import RunFolder

    result = CliRunner().invoke(
        app,
        ["eval", smollm2, "--quick", "--texts", "generated", "--out", str(tmp_path), "--jobs", "1", "--threads", "2"],
    )
    assert result.exit_code == 0, result.output
    with capsys.disabled():
        print(result.output)
    answers = RunFolder(tmp_path).answers()

    def mean(method, ratio, value=lambda answer: answer.score):
        values = [value(a) for a in answers if (a.method, a.ratio) == (method, ratio)]
        assert len(values) == 6
        return float(np.mean(values))

    assert mean("full", 0) >= 5 / 6
    assert mean("kvcompose", 0.5) >= 4 / 6
    divergence = {(m, r): mean(m, r, lambda a: a.kl) for m in ("kvcompose", "streaming-llm") for r in (0.5, 0.75)}
    assert divergence["kvcompose", 0.5] < divergence["kvcompose", 0.75]
    for ratio in (0.5, 0.75):
        assert divergence["kvcompose", ratio] < divergence["streaming-llm", ratio]
