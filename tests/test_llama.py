"""The behaviour of Llama(..., kv_compressor=...) that users meet."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.llamas import greedy

from kvcompose_gguf import (
    ConfigError,
    ContextLengthError,
    KVCompose,
    KVReport,
    UnsupportedError,
)
from kvcompose_gguf.llama_base import llama_cpp
from kvcompose_gguf.native.rows import cached_rows
from kvcompose_gguf.scoring.evidence import Evidence

N = 300
METHOD = KVCompose(compression_ratio=0.5, min_tokens=100, keep_last=8)
CONTEXT = tiny.tokens(tiny.GQA, N)
AFTER = tiny.tokens(tiny.GQA, 20, seed=9)


def fresh_answer(make_llama, prompt: list[int], n: int = 12) -> list[int]:
    """What an object that has seen nothing else answers."""
    return greedy(make_llama(method=METHOD), prompt, n)


def test_a_prompt_is_compressed_before_its_first_token(make_llama):
    llama = make_llama(method=METHOD)
    greedy(llama, CONTEXT, 4)
    report = llama.kv_report
    assert isinstance(report, KVReport)
    assert report.n_tokens == N - 8
    assert report.n_kept.sum() == int(3 * (N - 8) * 0.5)
    assert report.kv_bytes < report.kv_bytes_before
    assert report.compression_ratio == pytest.approx(0.5, abs=0.01)
    assert [llama.kv_cells(il).n_rows_used for il in range(3)] == [n + 8 + 3 for n in report.n_kept]
    assert min(report.prefill_seconds, report.score_seconds, report.plan_seconds, report.compose_seconds) > 0
    assert "removed" in str(report)


def test_without_a_compressor_it_is_the_original_class(make_llama, tiny_model):
    stock = llama_cpp.Llama(
        str(tiny_model(tiny.GQA)), n_ctx=1024, n_threads=2, n_threads_batch=2, type_k=0, type_v=0, verbose=False
    )
    ours = make_llama()
    prompt = "The quick brown fox jumps over the lazy dog. " * 8
    for options in (
        {"temperature": 0.0},
        {"temperature": 0.9, "seed": 3},
        {"max_tokens": 5, "stop": ["a"], "echo": True},
    ):
        want = stock.create_completion(prompt, **({"max_tokens": 16} | options))
        got = ours.create_completion(prompt, **({"max_tokens": 16} | options))
        assert got["choices"] == want["choices"]
        assert got["usage"] == want["usage"]
    assert ours.kv_report is None
    stock.close()


def test_ten_questions_continue_on_one_compressed_document(make_llama):
    llama = make_llama(method=METHOD)
    llama.compress(CONTEXT)
    kept = [cells.n_rows_used for cells in map(llama.kv_cells, range(3))]
    for seed in range(10):
        question = tiny.tokens(tiny.GQA, 10, seed=seed)
        answer = greedy(llama, CONTEXT + question, 5)
        other = make_llama(method=METHOD)
        other.compress(CONTEXT)
        assert answer == greedy(other, CONTEXT + question, 5)
        assert llama.n_tokens == N + 10 + 4  # only the question was evaluated
        assert [c.n_rows_used for c in map(llama.kv_cells, range(3))] == [n + 14 for n in kept]
    assert llama.kv_report.n_prefilled == N


def test_a_conversation_goes_on_behind_the_compressed_prompt(make_llama):
    llama = make_llama(method=METHOD)
    first = greedy(llama, CONTEXT, 6)
    report = llama.kv_report
    greedy(llama, CONTEXT + first + tiny.tokens(tiny.GQA, 9, seed=1), 6)
    assert llama.kv_report is report  # not compressed again


def test_a_prompt_that_diverges_inside_starts_over(make_llama):
    llama = make_llama(method=METHOD)
    llama.compress(CONTEXT)
    other = CONTEXT[:150] + tiny.tokens(tiny.GQA, 160, seed=9)
    assert greedy(llama, other, 12) == fresh_answer(make_llama, other)
    short = CONTEXT[:50]
    assert greedy(llama, short, 12) == greedy(make_llama(), short, 12)
    assert llama.session.state().n_composed == 0


def test_the_same_prompt_again_gives_the_same_answer(make_llama):
    llama = make_llama(method=METHOD)
    first = greedy(llama, CONTEXT, 12)
    assert greedy(llama, CONTEXT, 12) == first
    llama.compress(CONTEXT)
    second = greedy(llama, CONTEXT, 12)  # nothing of it is left to evaluate: starts over
    assert second == first


def test_short_prompts_are_left_alone(make_llama):
    llama = make_llama(method=METHOD)
    assert greedy(llama, CONTEXT[:107], 5) == greedy(make_llama(), CONTEXT[:107], 5)
    assert llama.kv_report is None
    report = llama.compress(CONTEXT[:99])
    assert report.compression_ratio == 0
    assert report.kv_bytes == report.kv_bytes_before


def test_a_pickled_object_keeps_its_compressor(make_llama):
    import pickle

    llama = make_llama(method=METHOD)
    other = pickle.loads(pickle.dumps(llama))
    assert other.kv_compressor == llama.kv_compressor == replace(METHOD, scoring="learned")
    assert greedy(other, CONTEXT, 4) == greedy(llama, CONTEXT, 4)
    other.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one"),
        ({"compression_ratio": 0.5, "n_kept": 3}, "exactly one"),
        ({"compression_ratio": 1.0}, r"\[0, 1\)"),
        ({"compression_ratio": -0.1}, r"\[0, 1\)"),
        ({"max_kv_bytes": 0}, "max_kv_bytes"),
    ],
)
def test_bad_options_are_errors_of_the_packages_own(options, words):
    with pytest.raises(ConfigError, match=words):
        KVCompose(**options)


def test_a_context_longer_than_n_ctx_is_refused_before_anything_changes(make_llama):
    llama = make_llama(method=METHOD, n_ctx=512)
    llama.compress(CONTEXT)
    state = llama.session.state()
    with pytest.raises(ContextLengthError, match="512"):
        llama.compress(tiny.tokens(tiny.GQA, 600))
    assert llama.session.state() == state
    whole = make_llama(method=replace(METHOD, scoring="repeat", scoring_chunk=None), n_ctx=512)
    with pytest.raises(ContextLengthError, match="scoring_chunk"):
        whole.compress(CONTEXT)
    assert not whole.session.state().scoring


def test_a_context_that_nearly_fills_n_ctx_is_scored_in_smaller_chunks(make_llama):
    llama = make_llama(method=METHOD, n_ctx=512)
    report = llama.compress(tiny.tokens(tiny.GQA, 500))
    assert report.scoring_chunk == 12


def test_what_cannot_be_compressed_is_refused(make_llama):
    with pytest.raises(ConfigError, match="is not a method"):
        make_llama(method=0.5)
    with pytest.raises(ConfigError, match="kv_compressor"):
        make_llama().compress("text")
    llama = make_llama(method=METHOD)
    with pytest.raises(ConfigError, match="empty"):
        llama.compress([])


def test_speculative_decoding_gives_the_same_tokens(make_llama):
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    prompt = (tiny.tokens(tiny.GQA, 30, seed=2) * 10)[:N]
    plain = make_llama(method=METHOD)
    drafted = make_llama(method=METHOD, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4))
    assert greedy(drafted, prompt, 30) == greedy(plain, prompt, 30)
    assert drafted.session.state().n_composed == N - 8


def test_completions_stream_log_probabilities_and_grammars(make_llama):
    text = "Once upon a time there was a lighthouse keeper who counted the waves. " * 5
    llama = make_llama(method=replace(METHOD, scoring="repeat", in_place=False), logits_all=True)
    whole = llama.create_completion(text, max_tokens=8, temperature=0.0, logprobs=2)
    assert llama.session.state().n_composed > 0
    assert len(whole["choices"][0]["logprobs"]["token_logprobs"]) == 8
    streamed = "".join(
        part["choices"][0]["text"] for part in llama.create_completion(text, max_tokens=8, temperature=0.0, stream=True)
    )
    assert streamed == whole["choices"][0]["text"]
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)
    assert llama.create_completion(text, max_tokens=8, grammar=grammar)["choices"][0]["text"] in ("yes", "no")
    chat = llama.create_chat_completion([{"role": "user", "content": text}], max_tokens=4)
    assert chat["choices"][0]["message"]["role"] == "assistant"


def test_prompts_judge_the_context_when_asked_to(make_llama):
    options: dict[str, Any] = {"compression_ratio": 0.8, "min_tokens": 100, "keep_last": 0}
    repeat = make_llama(method=KVCompose(**options)).compress(CONTEXT)
    prompted = make_llama(method=KVCompose(scoring="prompts", prompts=["what?", "and who?"], **options)).compress(
        CONTEXT
    )
    assert prompted.n_kept.sum() == repeat.n_kept.sum()
    assert (prompted.n_kept != repeat.n_kept).any()


def test_value_norms_are_the_caches(make_llama):
    def norms_of(llama):
        layers = range(len(llama.session.layers))
        return [np.linalg.norm(cached_rows(llama.session, l, "v", N), axis=2) for l in layers]

    for flash_attn in (False, True):
        llama = make_llama(flash_attn=flash_attn)
        llama.context.prefill(CONTEXT)
        model = tiny.NumpyLlama(tiny.GQA)
        model.forward(CONTEXT)
        for got, v in zip(norms_of(llama), model.v, strict=True):
            assert np.abs(got - np.linalg.norm(v, axis=2).T).max() <= (2e-3 if flash_attn else 1e-4)
    quantized = make_llama(tiny.WIDE, flash_attn=True, type_k=8, type_v=8)
    quantized.context.prefill(CONTEXT)
    model = tiny.NumpyLlama(tiny.WIDE)
    model.forward(CONTEXT)
    for got, v in zip(norms_of(quantized), model.v, strict=True):
        assert np.abs(got / np.linalg.norm(v, axis=2).T - 1).max() <= 0.02  # rotation keeps norms


def test_every_budget_is_kept(make_llama):
    row = 2 * 2 * 32 * 4
    for method in (
        KVCompose(n_kept=50, min_tokens=100),
        KVCompose(max_kv_bytes=150 * row + 17, min_tokens=100),
        KVCompose(compression_ratio=0.9, min_tokens=100, n_sink=4, add_v_norm=True),
    ):
        report = make_llama(method=method).compress(CONTEXT)
        # 1 - 0.9 is a little less than 0.1, and the reference truncates
        assert report.n_kept.sum() == (150 if method.compression_ratio is None else 89)
        assert report.kv_bytes_kept == report.n_kept.sum() * row
        assert report.n_kept.min() >= method.n_sink


def test_a_stock_library_is_refused_loudly(tmp_path):
    """The stock class would swallow kv_compressor= silently; ours says that nothing could be compressed."""
    code = (
        "import sys, types\n"
        "module = types.ModuleType('llama_cpp'); module.__version__ = '0.3.36'\n"
        "module.llama_cpp = types.SimpleNamespace(_lib=types.SimpleNamespace(_name='/usr/lib/libllama.so'))\n"
        "sys.modules['llama_cpp'] = module\n"
        "import kvcompose_gguf\n"
        "try:\n    kvcompose_gguf.Llama\nexcept kvcompose_gguf.LibraryError as error:\n    print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "stock llama.cpp" in out
    assert "import kvcompose_gguf before llama_cpp" in out


def test_importing_the_package_loads_no_library():
    code = "import sys, kvcompose_gguf; print([m for m in ('llama_cpp', 'numba', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "llama_cpp" not in out
    assert "numba" not in out


def test_from_pretrained_downloads_through_huggingface_hub(monkeypatch, tiny_model):
    """The hub is out of reach here, so its two entry points are replaced; the signature is the real one."""
    import inspect

    import huggingface_hub

    from kvcompose_gguf import Llama

    path = tiny_model(tiny.GQA)
    real = inspect.signature(huggingface_hub.hf_hub_download)

    def download(*args, **kwargs):
        real.bind(*args, **kwargs)
        return str(path)

    class Files:
        def ls(self, repo_id, recursive):
            return [{"name": f"{repo_id}/{path.name}"}]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Files)
    llama = Llama.from_pretrained(
        "org/repo", "*.gguf", kv_compressor=METHOD, n_ctx=1024, n_threads=2, n_threads_batch=2, verbose=False
    )
    greedy(llama, CONTEXT, 3)
    assert llama.session.state().n_composed == N - 8
    llama.close()


@pytest.mark.parametrize("elastic", [True, False])
@pytest.mark.parametrize("scoring", ["repeat", "window", "prefill"])
def test_one_document_after_another_is_compressed_in_every_mode(make_llama, scoring, elastic):
    method = KVCompose(n_kept=40, min_tokens=10, keep_last=0, scoring=scoring, window=1000)
    llama = make_llama(method=method, elastic=elastic)
    first, second = tiny.tokens(tiny.GQA, 200, seed=1), tiny.tokens(tiny.GQA, 150, seed=2)
    kept = [llama.compress(document).n_kept.tolist() for document in (first, second, first)]
    assert kept[0] == kept[2] != kept[1]
    next(llama.generate([*second, 5, 6, 7], temp=0.0))
    assert llama.kv_report.n_tokens == 152  # the last token is evaluated for its logits


def test_the_window_of_a_prompt_is_its_question(make_llama):
    """generate() keeps the last tokens; as queries they are evaluated on top of the context and again behind it."""
    question = tiny.tokens(tiny.GQA, 30, seed=8)
    method = KVCompose(n_kept=40, min_tokens=10, keep_last=30, scoring="window", window=20)
    llama = make_llama(method=method)
    next(llama.generate(CONTEXT + question, temp=0.0))
    model = tiny.NumpyLlama(tiny.GQA)
    attention = model.forward(CONTEXT + question)[1]
    layers = llama.session.layers
    scores = [p[:, -20:, : len(CONTEXT)].max(axis=1).astype(np.float32) for p in attention]
    want = method.plan(Evidence(len(CONTEXT), layers, scores))
    assert llama.kv_report.n_kept.tolist() == want.n_kept.tolist()


def test_a_small_budget_keeps_fewer_sinks_and_says_so(make_llama):
    llama = make_llama(method=KVCompose(n_kept=8, n_sink=10, n_recent=3, min_tokens=100, keep_last=0))
    report = llama.compress(CONTEXT)
    assert (report.n_sink, report.n_recent, report.n_kept.sum()) == (8, 0, 24)
    assert len(greedy(llama, [*CONTEXT, *AFTER], 5)) == 5
    llama.kv_compressor = KVCompose(n_kept=20, n_sink=10, n_recent=3, min_tokens=100, keep_last=0)
    report = llama.compress(CONTEXT)
    assert (report.n_sink, report.n_recent) == (10, 3)


@pytest.mark.parametrize("ratio", [0.9, 0.99, 0.999])
def test_a_high_ratio_never_raises_in_the_middle_of_a_chat(make_llama, ratio):
    llama = make_llama(method=KVCompose(compression_ratio=ratio, min_tokens=1, keep_last=1))
    for n_tokens in (2, 3, 14, 60, 292):
        llama.reset()
        assert len(greedy(llama, CONTEXT[:n_tokens], 3)) == 3
        assert llama.kv_report.n_tokens == n_tokens - 1


def test_a_budget_that_buys_no_row_in_every_layer_is_refused_when_it_is_set(make_llama):
    with pytest.raises(ConfigError, match="max_kv_bytes=10 is less than one row"):
        make_llama(method=KVCompose(max_kv_bytes=10))
    llama = make_llama()
    with pytest.raises(ConfigError, match="max_kv_bytes=10 is less than one row"):
        llama.kv_compressor = KVCompose(max_kv_bytes=10)
    assert llama.kv_compressor is None


@pytest.mark.parametrize("spec", ["unstructured", "variant,fold=1.0", "variant,correct=0.5"])
def test_what_is_only_simulated_is_no_compressor(make_llama, spec):
    from kvcompose_gguf.methods import make_method

    with pytest.raises(UnsupportedError, match="only simulated"):
        make_llama(method=make_method(spec, compression_ratio=0.5))


def test_the_name_of_kvcomposes_own_rule_keeps_its_options():
    method = KVCompose(compression_ratio=0.5, allocation="global", agg_head="max", keep_token_lower_bound=8)
    assert method.rule() == method.default_allocation()
    with pytest.raises(ConfigError, match="allocation='globl'"):
        KVCompose(compression_ratio=0.5, allocation="globl")
