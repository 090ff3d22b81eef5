"""Runs the whole chain on architectures without a numpy twin; llama.cpp's own tensors say what is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import any_arch, tiny
from support.any_arch import AnyArch
from support.arch_list import COMPRESSED, NOT_JOINT, NOT_TRIED, REFUSED, SPECIAL
from support.llamas import F32, Q8_0, decode_one_by_one, last_logits, step
from support.plans import random_plan
from support.watching import watched

from kvcompose_gguf import CompositionPlan, KVCompose, Llama, StateError, UnsupportedError
from kvcompose_gguf.methods.streaming_llm import StreamingLLM
from kvcompose_gguf.native.joint import decode_joint
from kvcompose_gguf.native.rows import ContextRows, write_layer_values
from kvcompose_gguf.native.session import KVSession

N = 200
CONTEXT, AFTER = tiny.tokens(tiny.GQA, N), tiny.tokens(tiny.GQA, 16, seed=1)
#: positions are added to the tokens' vectors
KNOWS_POSITION = {"gpt2", "starcoder"}
#: a norm with weights follows the rotation
WEIGHTED = {"hunyuan-moe", "hunyuan-dense", "hunyuan_vl", "maincoder"}
QUESTIONS = tuple(tiny.tokens(tiny.GQA, n, seed) for seed, n in ((2, 90), (3, 12)))

every_arch = pytest.mark.parametrize("arch", COMPRESSED.values(), ids=COMPRESSED)
special = pytest.mark.parametrize("arch", SPECIAL.values(), ids=SPECIAL)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[AnyArch], Path]:
    folder, paths = tmp_path_factory.mktemp("any"), dict[str, Path]()

    def path(arch: AnyArch) -> Path:
        if arch.name not in paths:
            paths[arch.name] = any_arch.write(arch, folder / f"{arch.name}.gguf")
        return paths[arch.name]

    return path


@pytest.fixture
def make(model_of: Callable[[AnyArch], Path]) -> Iterator[Callable[..., Llama]]:
    made: list[Llama] = []

    def llama(arch: AnyArch, method: Any = None, **kwargs: Any) -> Llama:
        options: dict[str, Any] = {
            "n_ctx": 1024, "n_batch": 64, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1, "type_k": F32,
            "type_v": F32, "verbose": False, "flash_attn": False,
            "swa_full": False,
        }  # fmt: skip
        made.append(Llama(str(model_of(arch)), kv_compressor=method, **(options | kwargs)))
        return made[-1]

    yield llama
    for each in made:
        each.close()


def close(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(got - want).max() / max(1.0, np.abs(want).max()))


def some_plan(llama: Llama) -> CompositionPlan:
    """Keeps everything in the first layer that has a cache, and less than a half in the others."""
    n_kept = np.random.default_rng(3).integers(N // 10, N // 2, len(llama.kv_layers)).tolist()
    return random_plan(N, [N, *n_kept[1:]] if len(n_kept) > 1 else n_kept, llama.kv_layers[0].n_head_kv)


@every_arch
def test_scores_are_the_attention_of_the_same_decodes(make, arch):
    with watched("kq_soft_max") as watcher:
        llama = make(arch)
        llama.context.prefill(CONTEXT)
        watcher.on = True
        got = llama.observe(CONTEXT, KVCompose(n_kept=50, scoring_chunk=128)).attention
    for scores, layer in zip(got, llama.kv_layers, strict=True):
        readers = [il for il, owner in arch.owners.items() if owner == layer.il] + [layer.il]
        seen = [each[:, :, :N].max(axis=1) for il in readers for each in watcher.seen[il]]
        assert np.abs(scores - np.max(seen, axis=0)).max() <= 1e-4
        assert scores.max() > 2 * scores.min()


@special
def test_scores_of_a_composed_cache_are_the_attention_to_its_rows(make, arch):
    with watched("kq_soft_max") as watcher:
        llama = make(arch)
        llama.context.prefill(CONTEXT)
        llama.session.compose(some_plan(llama))
        llama.context.extend(AFTER)
        n_rows = llama.session.n_rows_used()
        watcher.on = True
        with llama.session.scoring("max", llama.session.state().n_cells_used, 1 << 20):
            decode_one_by_one(llama, AFTER[:3])
            got = llama.session.scores()
    for scores, n, layer in zip(got, n_rows, llama.kv_layers, strict=True):
        readers = [il for il, owner in arch.owners.items() if owner == layer.il] + [layer.il]
        seen = [each[:, :, :n].max(axis=1) for il in readers for each in watcher.seen[il]]
        assert scores.shape == (layer.n_head, n)
        assert np.abs(scores - np.max(seen, axis=0)).max() <= 1e-4
        assert scores[:, -len(AFTER) :].max() > 0


@every_arch
def test_a_masked_model_equals_a_compacted_one(make, arch):
    llama, masked, full = (make(arch) for _ in range(3))
    for each in (llama, masked, full):
        each.context.prefill(CONTEXT)
    plan = some_plan(llama)
    before = llama.context.partial_state()
    llama.session.compose(plan)
    assert llama.context.partial_state() == before  # what is recurrent stays as it is, bit for bit
    assert [llama.kv_cells(i).n_rows_used for i in range(len(plan.rows))] == plan.n_kept.tolist()
    biases = [np.full((len(rows), N), -np.inf, np.float32) for rows in plan.rows]
    for bias, kept in zip(biases, plan.rows, strict=True):
        np.put_along_axis(bias, kept, 0, axis=1)
    got, unmasked = decode_one_by_one(llama, AFTER), decode_one_by_one(full, AFTER)
    with masked.session.biased(biases):
        want = decode_one_by_one(masked, AFTER)
    error, effect = close(got, want), close(unmasked, want)
    assert error <= 1e-3
    assert effect > 10 * error, "the test could not fail"


@every_arch
def test_keys_are_rotated_back_to_where_they_do_not_know_their_position(make, arch):
    """All tokens are the same, so attention returns the same value everywhere, and keys differ by their rotation alone."""
    llama = make(arch)
    llama.context.prefill([CONTEXT[0]] * 48)
    rows = ContextRows(llama.session, 48)
    layer, places = llama.kv_layers[0].il, np.arange(48, dtype=np.int32)
    keys = rows.keys(0)[0]
    plain = rows.unrotate(0, keys, places)
    np.testing.assert_allclose(rows.rotate(0, plain, places), keys, atol=1e-4)
    if layer == 0 and arch.name not in KNOWS_POSITION | WEIGHTED:
        np.testing.assert_allclose(plain, np.broadcast_to(plain[0], plain.shape), atol=2e-3)


@pytest.mark.parametrize("flash_attn", [False, True])
def test_the_values_of_latent_attention_are_the_first_elements_of_its_keys(make, flash_attn):
    arch = COMPRESSED["deepseek2"]
    llama, tapped = make(arch, flash_attn=flash_attn), {}
    for what in ("queries", "outputs"):
        llama.context.prefill(CONTEXT[:-1])
        with llama.session.taps(what, 1):
            llama.context.prefill(CONTEXT)
            tapped[what] = [llama.session.tapped(what, l, 1)[0] for l in range(len(llama.kv_layers))]
    rows = ContextRows(llama.session, N)
    for l, layer in enumerate(llama.kv_layers):
        keys, values = rows.keys(l)[0], rows.values(l)[0]
        np.testing.assert_array_equal(values, keys[:, : layer.n_embd_head_v])
        assert layer.n_bytes_row == layer.n_embd_head_k * 4
        logits = tapped["queries"][l] @ keys.T
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        want = p @ values / p.sum(axis=1, keepdims=True)
        assert close(tapped["outputs"][l], want) <= (5e-3 if flash_attn else 1e-4)
    with pytest.raises(UnsupportedError, match="latent"):
        write_layer_values(llama.session, 0, rows.values(0))


@pytest.mark.parametrize(("type_kv", "flash_attn"), [(F32, False), (Q8_0, True)], ids=["f32", "q8_0"])
@special
def test_keeping_everything_changes_nothing(make, arch, type_kv, flash_attn):
    logits = []
    for compose in (False, True):
        llama = make(arch, type_k=type_kv, type_v=type_kv, flash_attn=flash_attn)
        llama.context.prefill(CONTEXT)
        if compose:
            llama.session.compose(CompositionPlan.keep_all(N, [layer.n_head_kv for layer in llama.kv_layers]))
        logits.append(decode_one_by_one(llama, AFTER))
    assert close(logits[1], logits[0]) <= 1e-3


@pytest.mark.parametrize("scoring", ["repeat", "window", "prefill"])
@special
def test_questions_in_any_order_are_answered_as_if_each_were_the_first(make, arch, scoring):
    method = KVCompose(n_kept=60, min_tokens=100, keep_last=0, scoring=scoring)
    llama = make(arch, method)
    first, second = QUESTIONS
    want = []
    for question in QUESTIONS:
        fresh = make(arch, method)
        fresh.compress(CONTEXT)
        next(fresh.generate(CONTEXT + question, temp=0.0))
        want.append(last_logits(fresh))
    llama.compress(CONTEXT)
    for question, logits in ((first, want[0]), (second, want[1]), (first, want[0])):
        next(llama.generate(CONTEXT + question, temp=0.0))
        assert close(last_logits(llama), logits) <= 1e-3
    assert llama.session.state().n_composed == N
    assert close(want[0], want[1]) > 0.01


@special
def test_a_saved_session_goes_on_where_it_was(make, arch, tmp_path):
    method = KVCompose(n_kept=60, min_tokens=100, keep_last=0)
    llama = make(arch, method)
    llama.compress(CONTEXT)
    llama.save_session(tmp_path / "one.kvc")
    next(llama.generate(CONTEXT + QUESTIONS[0], temp=0.0))
    other = make(arch, method)
    other.load_session(tmp_path / "one.kvc")
    next(other.generate(CONTEXT + QUESTIONS[0], temp=0.0))
    # a window's rows may come in another order, which moved gemma4 by 0.003 on one machine; other rows move it by 0.4
    assert close(last_logits(other), last_logits(llama)) <= 0.02


@special
def test_a_long_prompt_is_read_below_a_ceiling(make, arch):
    llama = make(
        arch, StreamingLLM(n_kept=64, chunk=128, n_fresh=0, n_answer=32, min_tokens=100, keep_last=0), n_ctx=2048
    )
    tokens, most = tiny.tokens(tiny.GQA, 1500, seed=5), 0
    for first in range(0, 1500, 50):
        llama.eval(tokens[first : first + 50])
        most = max(most, *(llama.kv_cells(i).n_rows_used for i in range(len(llama.kv_layers))))
    assert llama.n_tokens == 1500
    assert 64 < most <= 512  # a full cache is composed at a multiple of 256 cells, not below 512
    assert np.isfinite(last_logits(llama)).all()


@special
def test_a_model_learns_from_what_it_reads(make, arch, folder, monkeypatch):
    monkeypatch.setenv("KVCOMPOSE_LEARN", "on")
    llama = make(arch, KVCompose(compression_ratio=0.5, min_tokens=100, keep_last=0, scoring="learned"), n_ctx=2048)
    for seed in range(4):
        llama.compress(tiny.tokens(tiny.GQA, 600, seed=20 + seed))
    assert llama.kv_report.scoring.startswith("predicted")
    llama.kv_compressor = KVCompose(n_kept=150, chunk=64, min_tokens=100, keep_last=0, scoring="learned")
    checked, decode = [], llama.context.decode
    monkeypatch.setattr(llama.context, "decode", lambda tokens, pos: (checked.append(pos), decode(tokens, pos)))
    report = llama.compress(tiny.tokens(tiny.GQA, 600, seed=30))
    assert report.n_composed > 1
    assert sum(pos > 600 + 256 for pos in checked) >= report.n_composed - 1  # of each later part a piece
    assert report.n_kept.sum() == 150 * len(llama.kv_layers)


@pytest.mark.parametrize("compressed", [False, True], ids=["full", "compressed"])
def test_recurrent_layers_that_were_interrupted_are_not_read_on_from_a_wrong_state(make, compressed):
    """Ctrl-C may come between a decode and the note of its tokens. Recurrent layers cannot take them back."""
    llama = make(COMPRESSED["lfm2"], KVCompose(n_kept=60, min_tokens=100, keep_last=0) if compressed else None)
    llama.compress(CONTEXT) if compressed else llama.eval(CONTEXT)
    llama.context.decoder.decode(AFTER, N, "none")
    with pytest.raises(StateError, match="read all again"):
        llama.eval(AFTER)
    assert llama.n_tokens == 0
    llama.eval(CONTEXT)
    fresh = make(COMPRESSED["lfm2"])
    fresh.eval(CONTEXT)
    np.testing.assert_array_equal(last_logits(llama), last_logits(fresh))


@pytest.mark.parametrize(("arch", "word"), REFUSED.values(), ids=REFUSED)
def test_others_are_refused_with_a_sentence(make, arch, word):
    with pytest.raises(UnsupportedError, match=word):
        KVSession(make(arch).ctx)


def test_the_documentation_has_every_architecture():
    table = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text("utf-8")
    assert [name for name in (*COMPRESSED, *REFUSED, *NOT_TRIED) if f"`{name}`" not in table] == []


@every_arch
def test_steps_of_two_contexts_at_once_are_those_of_each_alone(make, arch):
    group = [make(arch)]
    group.append(make(arch, weights_of=group[0]))
    for llama, n in zip(group, (20, 50), strict=True):
        llama.eval(CONTEXT[:n])
    try:
        decode_joint([step(llama, AFTER[0]) for llama in group])
    except UnsupportedError:
        assert arch.name in NOT_JOINT
        joint = None
    else:
        assert arch.name not in NOT_JOINT
        joint = [last_logits(llama) for llama in group]
        assert close(*joint) > 0.01, "the test could not fail"
    for number, llama in enumerate(group):
        (alone,) = decode_one_by_one(llama, AFTER[:1])
        if joint is not None:
            np.testing.assert_allclose(joint[number], alone, atol=1e-3 * np.abs(alone).max())
