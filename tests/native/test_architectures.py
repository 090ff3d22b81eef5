"""Runs the whole chain on every attention variant of llama.cpp: scores, keep-all, masked = compacted, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support import tiny
from support.llamas import last_logits
from support.plans import random_plan
from support.tiny import ARCHITECTURES, REFUSED, NumpyLlama

from kvcompose_gguf import CompositionPlan, KVCompose, UnsupportedError
from kvcompose_gguf.native.session import KVSession

N = 200
#: small batches: a window's cache is then smaller than the context and evicts old cells
SMALL = {"n_ctx": 1024, "n_batch": 64, "n_ubatch": 64, "swa_full": False}

both_ways = pytest.mark.parametrize("flash_attn", [False, True], ids=["no-flash", "flash"])
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def setup(name: str, flash_attn: bool) -> tuple[tiny.TinyConfig, NumpyLlama]:
    # flash attention rounds keys and values to float16: small attention outputs keep its error out of deeper layers
    config = replace(ARCHITECTURES[name], output_scale=0.01) if flash_attn else ARCHITECTURES[name]
    return config, NumpyLlama(config, stored=np.float16 if flash_attn else np.float64)


def full_layers(config: tiny.TinyConfig) -> list[int]:
    return [il for il in range(config.n_layer) if not config.is_swa(il)]


def some_plan(config: tiny.TinyConfig) -> CompositionPlan:
    """Returns a random plan that keeps everything in the first layer, and less than a half in the others."""
    n_kept = np.random.default_rng(3).integers(N // 10, N // 2, len(full_layers(config)))
    return random_plan(N, [N, *n_kept[1:]], config.n_head_kv)


def visible_of(plan: CompositionPlan, config: tiny.TinyConfig) -> list[np.ndarray | None]:
    visible: list[np.ndarray | None] = [None] * config.n_layer
    for il, cells in zip(full_layers(config), plan.rows, strict=True):
        seen = np.zeros((config.n_head_kv, N), dtype=bool)
        np.put_along_axis(seen, cells, True, axis=1)
        visible[il] = seen
    return visible


@both_ways
@every_architecture
def test_scores_equal_numpy(make_llama, name, flash_attn):
    config, model = setup(name, flash_attn)
    context = tiny.tokens(config, N)
    llama = make_llama(config, flash_attn=flash_attn, **SMALL)
    got = llama.observe(context, KVCompose(n_kept=50, scoring_chunk=128)).attention
    assert [layer.il for layer in llama.session.layers] == full_layers(config)
    model.forward(context)
    for ikv, il in enumerate(full_layers(config)):
        seen = []
        for start in range(0, N, 128):
            seen.append(model.forward(context[start : start + 128])[1][il][..., :N])
            model.truncate(N)
        error = np.abs(got[ikv] - np.concatenate(seen, axis=1).max(axis=1))
        # tolerates single rounded keys, and their effect on the deepest layers
        assert error.max() <= (2e-3 if flash_attn else 1e-4), f"layer {il}: {error.max():.2e}, mean {error.mean():.2e}"
        assert error.mean() <= 2e-5


@both_ways
@every_architecture
def test_a_masked_model_equals_a_compacted_one_and_scoring_leaves_no_trace(make_llama, name, flash_attn):
    config, model = setup(name, flash_attn)
    context, after = tiny.tokens(config, N), tiny.tokens(config, 24, seed=1)
    plan = some_plan(config)
    llama = make_llama(config, flash_attn=flash_attn, **SMALL)
    llama.observe(context, KVCompose(n_kept=50, scoring_chunk=100))
    llama.session.compose(plan)
    model.forward(context)
    full = NumpyLlama(config)
    full.forward(context)
    unmasked = full.forward(after)[0]
    model.visible = visible_of(plan, config)
    errors, scale, effect = [], 0.0, 0.0
    for i, token in enumerate(after):
        want = model.forward([token])[0][-1]
        llama.eval([token])
        errors.append(np.abs(last_logits(llama) - want).max())
        scale = max(scale, np.abs(want).max())
        effect = max(effect, np.abs(unmasked[i] - want).max())
    text = f"largest difference {max(errors):.2e} of logits up to {scale:.1f}, compression changes them by {effect:.2e}"
    print(text)
    assert max(errors) <= 1e-3 * max(1.0, scale), text
    assert effect > 10 * max(errors), f"{text}: the test could not fail"


@both_ways
@every_architecture
def test_keeping_everything_changes_nothing(make_llama, name, flash_attn):
    config, _ = setup(name, flash_attn)
    context, after = tiny.tokens(config, N), tiny.tokens(config, 8, seed=1)
    logits = []
    for compose in (False, True):
        llama = make_llama(config, flash_attn=flash_attn, **SMALL)
        llama.context.prefill(context)
        if compose:
            llama.session.compose(CompositionPlan.keep_all(N, [config.n_head_kv] * len(full_layers(config))))
        for token in after:
            llama.eval([token])
        logits.append(last_logits(llama))
    assert np.abs(logits[0] - logits[1]).max() <= 1e-3 * max(1.0, np.abs(logits[0]).max())


@pytest.mark.parametrize("scoring", ["repeat", "window", "prefill"])
@pytest.mark.parametrize(
    "name", [name for name, config in ARCHITECTURES.items() if len(full_layers(config)) < config.n_layer]
)
def test_a_second_question_finds_the_windows_of_sliding_layers_as_they_were(make_llama, name, scoring):
    config = ARCHITECTURES[name]
    context, first, second = (tiny.tokens(config, n, seed) for n, seed in ((N, 0), (90, 1), (12, 2)))
    method = KVCompose(n_kept=60, min_tokens=100, keep_last=0, scoring=scoring)
    llama = make_llama(config, method, **SMALL)
    llama.compress(context)
    logits = []
    for question in (second, first, second):
        next(llama.generate(context + question, temp=0.0))
        logits.append(last_logits(llama))
    assert llama.session.state().n_composed == N
    assert np.abs(logits[0] - logits[2]).max() <= 1e-3
    assert np.abs(logits[0] - logits[1]).max() > 0.1


@pytest.mark.parametrize(
    "method", [KVCompose(n_kept=60, min_tokens=100, keep_last=0), None], ids=["method", "method-off"]
)
def test_a_loaded_state_brings_the_windows_with_it(make_llama, method):
    config = ARCHITECTURES["gemma3"]
    context, first, second = (tiny.tokens(config, n, seed) for n, seed in ((N, 0), (90, 1), (12, 2)))
    llama = make_llama(config, KVCompose(n_kept=60, min_tokens=100, keep_last=0), **SMALL)
    llama.compress(context)
    state = llama.save_state()
    next(llama.generate(context + second, temp=0.0))
    want = last_logits(llama)
    llama.reset()
    llama.kv_compressor = method  # what is loaded is continued under the method of now
    llama.load_state(state)
    for question in (first, second):
        next(llama.generate(context + question, temp=0.0))
    assert np.abs(last_logits(llama) - want).max() <= 1e-3


MESSAGES = {"bloom": "ALiBi", "mamba": "recurrent"}


@pytest.mark.parametrize("name", REFUSED)
def test_other_architectures_are_refused_with_a_sentence_and_still_answer(make_llama, name):
    config = REFUSED[name]
    llama = make_llama(config, n_ctx=512)
    llama.eval(tiny.tokens(config, 20))
    assert np.isfinite(last_logits(llama)).all()
    with pytest.raises(UnsupportedError, match=MESSAGES[name]):
        KVSession(llama.ctx)
    with pytest.raises(UnsupportedError, match=MESSAGES[name]):
        make_llama(config, KVCompose(n_kept=10), n_ctx=512)
