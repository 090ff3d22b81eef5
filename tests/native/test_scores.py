"""Compares captured attention with a numpy forward pass and llama.cpp's own softmax."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.tiny import NumpyLlama

from kvcompose_gguf import ConfigError, KVCompose
from kvcompose_gguf.llama_base import llama_cpp
from kvcompose_gguf.reading import attend
from kvcompose_gguf.scoring import requests
from kvcompose_gguf.scoring.requests import AttentionRequest, Repeat


def captured(llama: Any, context: list[int], chunk: int | None, agg: str = "max", **options: Any) -> Any:
    method = KVCompose(
        compression_ratio=0.5, scoring="repeat", scoring_chunk=chunk, agg_task=agg, in_place=False, **options
    )
    return np.stack(llama.observe(context, method).attention)


def check(got: np.ndarray, want: np.ndarray, flash_attn: bool) -> None:
    """Asserts that scores agree; flash attention rounds one key in a thousand to the other float16 neighbour."""
    error = np.abs(got - want)
    text = f"largest difference {error.max():.2e}, mean {error.mean():.2e}"
    assert error.max() <= (5e-4 if flash_attn else 1e-4), text
    assert error.mean() <= 1e-5, text


def attention_on_top(model: NumpyLlama, queries: list[int], n_tokens: int, gap: int = 0) -> np.ndarray:
    """Returns (n_layer, n_head, n_query, n_tokens) for queries after the context, which are removed again."""
    _, attention = model.forward(queries, gap)
    model.truncate(n_tokens)
    return np.stack(attention)[..., :n_tokens]


def expected(
    config: tiny.TinyConfig, context: list[int], chunk: int, agg: str = "max", flash: bool = False
) -> np.ndarray:
    model = NumpyLlama(config, stored=np.float16 if flash else np.float64)
    model.forward(context)
    seen = [
        attention_on_top(model, context[start : start + chunk], len(context)) for start in range(0, len(context), chunk)
    ]
    everything = np.concatenate(seen, axis=2)
    return everything.max(axis=2) if agg == "max" else everything.mean(axis=2)


@pytest.mark.parametrize("agg", ["max", "mean"])
@pytest.mark.parametrize("chunk", [300, 128, 70])
@pytest.mark.parametrize(
    ("config", "flash_attn"),
    [(tiny.GQA, False), (tiny.MHA, False), (tiny.GQA_QUIET, True), (tiny.MHA_QUIET, True)],
    ids=["grouped-query", "multi-head", "grouped-query-flash", "multi-head-flash"],
)
def test_scores_equal_a_numpy_forward_pass(make_llama, config, flash_attn, chunk, agg):
    context = tiny.tokens(config, 300)  # 300 cells: n_kv is padded to 512
    got = captured(make_llama(config, flash_attn=flash_attn), context, chunk, agg)
    want = expected(config, context, chunk, agg, flash_attn)
    check(got, want, flash_attn)
    assert want.max() > 4 * want.mean()  # peaked attention: a constant would not pass for it


@pytest.mark.parametrize("agg", ["max", "mean"])
@pytest.mark.parametrize("n_suffix", [0, 10, 40], ids=["in-the-context", "across-its-end", "behind-it"])
@pytest.mark.parametrize("flash_attn", [False, True], ids=["transposed-v", "flash"])
def test_window_scores_are_the_attention_of_the_prompts_last_tokens(make_llama, flash_attn, n_suffix, agg):
    config, n_window = tiny.GQA_QUIET, 25
    context, suffix = tiny.tokens(config, 300), tiny.tokens(config, n_suffix, seed=5)
    llama = make_llama(config, flash_attn=flash_attn)
    method = KVCompose(compression_ratio=0.5, scoring="window", window=n_window, agg_task=agg)
    got = np.stack(llama.observe(context, method, suffix).attention)
    _, attention = NumpyLlama(config, stored=np.float16 if flash_attn else np.float64).forward(context + suffix)
    window = np.stack(attention)[..., -n_window:, :300]
    n_seen = n_window - np.maximum(0, np.arange(300) - (300 + n_suffix - n_window))  # causal: fewer for the last tokens
    want = window.max(axis=2) if agg == "max" else window.sum(axis=2) / n_seen
    check(got, want, flash_attn)
    assert llama.n_tokens == llama.session.state().n_cells_used == 300


@pytest.mark.parametrize("agg", ["max", "mean"])
@pytest.mark.parametrize("flash_attn", [False, True], ids=["transposed-v", "flash"])
def test_prefill_scores_are_the_contexts_own_attention_per_query_that_could_see_it(make_llama, flash_attn, agg):
    config = tiny.GQA_QUIET
    context = tiny.tokens(config, 300)
    llama = make_llama(config, flash_attn=flash_attn, n_batch=128)
    llama.context.prefill(context[:100])  # what is there already has no scores
    method = KVCompose(compression_ratio=0.5, scoring="prefill", agg_task=agg)
    attention = attend(llama.context, context, method.attention_request)
    assert attention.n_prefilled == 300
    own = np.stack(NumpyLlama(config, stored=np.float16 if flash_attn else np.float64).forward(context)[1])
    want = own.max(axis=2) if agg == "max" else own.sum(axis=2) / (300 - np.arange(300))
    check(np.stack(attention.layers), want, flash_attn)


@pytest.mark.parametrize("flash_attn", [False, True], ids=["transposed-v", "flash"])
def test_scores_do_not_depend_on_the_memory_that_they_may_use(make_llama, flash_attn):
    context = tiny.tokens(tiny.GQA, 300)
    llama = make_llama(flash_attn=flash_attn)
    much = captured(llama, context, 128)
    for max_bytes in (1, 100_000):  # nothing is kept, or some tiles of products are
        assert np.abs(captured(llama, context, 128, max_score_bytes=max_bytes) - much).max() <= 1e-5


def test_a_fraction_of_the_repeat_asks_with_pieces_from_all_of_the_context(make_llama):
    context = tiny.tokens(tiny.GQA, 640)
    llama = make_llama()
    got = captured(llama, context, 512, scoring_fraction=0.3)
    model = NumpyLlama(tiny.GQA)
    model.forward(context)
    pieces = [token for start in (0, 288, 576) for token in context[start : start + 64]]
    want = attention_on_top(model, pieces, 640).max(axis=2)
    assert np.abs(got - want).max() <= 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize(("fraction", "chunk"), [(1.0, 128), (0.5, 512), (0.5, 40)])
def test_chunks_and_pieces_in_place_stand_where_the_whole_repeat_has_them(
    make_llama, monkeypatch, name, fraction, chunk
):
    config = tiny.ARCHITECTURES[name]
    context = tiny.tokens(config, 300)
    llama = make_llama(config)
    monkeypatch.setattr(requests, "PIECE", 50)
    queries = Repeat(chunk, fraction, in_place=True)
    got = attend(llama.context, context, AttentionRequest(queries, "max")).layers
    model = NumpyLlama(config)
    model.forward(context)
    pieces = [range(300)] if fraction == 1 else [range(start, start + 50) for start in (0, 125, 250)]
    places = [piece[first : first + chunk] for piece in pieces for first in range(0, len(piece), chunk)]
    seen = [attention_on_top(model, [context[i] for i in piece], 300, piece.start) for piece in places]
    want = np.concatenate(seen, axis=2).max(axis=2)
    full = [il for il in range(config.n_layer) if not config.is_swa(il)]
    assert np.abs(np.stack(got) - want[full]).max() <= 1e-4
    assert llama.context.tokens == context
    more = tiny.tokens(config, 5, seed=2)
    want = NumpyLlama(config).forward([*context, *more])[0][-5:]
    assert np.abs(llama.eval_logits(more) - want).max() <= 1e-3, "the next token does not follow the context"


def test_places_end_where_the_models_positions_end(make_llama):
    llama = make_llama()
    llama.context.n_ctx_train = 300 + 60
    context = tiny.tokens(tiny.GQA, 300)
    got = attend(llama.context, context, AttentionRequest(Repeat(50, in_place=True), "max")).layers
    model = NumpyLlama(tiny.GQA)
    model.forward(context)
    seen = [attention_on_top(model, context[s : s + 50], 300, min(s, 10)) for s in range(0, 300, 50)]
    assert np.abs(np.stack(got) - np.concatenate(seen, axis=2).max(axis=2)).max() <= 1e-4


def test_a_gap_that_does_not_exist_is_refused(make_llama):
    llama = make_llama()
    llama.prefill(tiny.tokens(tiny.GQA, 20))
    with pytest.raises(ConfigError, match="pos = 19, the last token is at 19"):
        llama.session.skip_to(19)
    llama.eval([5])


def test_the_whole_repeat_stays_visible_without_chunks(make_llama):
    context = tiny.tokens(tiny.GQA, 300)
    got = captured(make_llama(n_batch=64, n_ubatch=32), context, None)
    want = expected(tiny.GQA, context, len(context))
    assert np.abs(got - want).max() <= 1e-4


def test_scores_do_not_depend_on_how_decodes_are_split(make_llama):
    context = tiny.tokens(tiny.GQA, 200)
    whole = captured(make_llama(n_batch=512, n_ubatch=512), context, 200)
    split = captured(make_llama(n_batch=48, n_ubatch=16), context, 200)
    assert np.abs(whole - split).max() <= 1e-5


class SoftMaxTap:
    """Collects llama.cpp's kq_soft_max of every layer through the eval callback."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        lib.ggml_get_name.restype = ctypes.c_char_p
        lib.ggml_get_name.argtypes = [ctypes.c_void_p]
        lib.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self.lib = lib
        self.on = False
        self.seen: dict[int, list[np.ndarray]] = {}
        self.callback = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(self._call)  # kept alive here

    def _call(self, tensor: int, ask: bool, _user: Any) -> bool:
        name = self.lib.ggml_get_name(tensor).decode()
        if not (self.on and name.startswith("kq_soft_max-")):
            return not ask
        if not ask:
            ne = np.ctypeslib.as_array((ctypes.c_int64 * 4).from_address(tensor + 16))  # ggml_tensor.ne
            data = np.empty(tuple(ne[2::-1]), dtype=np.float32)  # (n_head, n_tokens, n_kv)
            self.lib.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)
            self.seen.setdefault(int(name.rsplit("-", 1)[1]), []).append(data)
        return True


@pytest.fixture
def tap(monkeypatch: pytest.MonkeyPatch) -> SoftMaxTap:
    tap = SoftMaxTap(llama_cpp.llama_cpp._lib)
    default = llama_cpp.llama_context_default_params

    def with_callback() -> Any:
        params = default()
        params.cb_eval = tap.callback
        return params

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_context_default_params", with_callback)
    monkeypatch.setattr(llama_cpp, "llama_context_default_params", with_callback)
    return tap


@pytest.mark.parametrize("config", [tiny.GQA, tiny.MHA, tiny.WIDE], ids=["grouped-query", "multi-head", "wide"])
@pytest.mark.parametrize("chunk", [64, 33])
def test_scores_equal_llama_cpps_own_softmax(make_llama, tap, config, chunk):
    context = tiny.tokens(config, 260)
    llama = make_llama(config, flash_attn=False)
    llama.context.prefill(context)
    tap.on = True
    got = captured(llama, context, chunk)
    want = np.stack([np.concatenate([p[..., :260] for p in tap.seen[il]], axis=1).max(axis=1) for il in range(3)])
    assert sum(p.shape[1] for p in tap.seen[0]) == 260  # every query token was seen once
    error = np.abs(got - want).max()
    assert error <= 1e-4, f"largest difference {error:.2e}"


@pytest.mark.parametrize("type_kv", [1, 8], ids=["f16", "q8_0"])
def test_scores_of_smaller_cache_types_stay_close(make_llama, type_kv):
    context = tiny.tokens(tiny.WIDE, 300)
    want = expected(tiny.WIDE, context, 100)
    got = captured(make_llama(tiny.WIDE, flash_attn=True, type_k=type_kv, type_v=type_kv), context, 100)
    error = np.abs(got - want)
    assert error.max() < {1: 5e-3, 8: 0.1}[type_kv], f"median {np.median(error):.2e}, largest {error.max():.2e}"
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.99


def test_scoring_is_off_and_the_queries_are_gone_afterwards(make_llama):
    context = tiny.tokens(tiny.GQA, 300)
    llama = make_llama()
    captured(llama, context, 128)
    state = llama.session.state()
    assert not state.scoring
    assert state.n_cells_used == len(context)
