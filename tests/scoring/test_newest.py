"""The attention that a piece of the newest tokens pays to them, behind older tokens that may be composites."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import tiny
from support.plans import random_plan

from kvcompose_gguf import CompositionPlan
from kvcompose_gguf.scoring.newest import attention_to_newest

CONFIG = tiny.GQA
TOKENS = tiny.tokens(CONFIG, 400, seed=5)


@pytest.mark.parametrize("flash_attn", [False, True])
def test_new_tokens_behind_a_composed_cache_are_scored_as_behind_a_full_one(make_llama: Any, flash_attn: bool) -> None:
    llama = make_llama(CONFIG, None, n_ctx=4096, flash_attn=flash_attn)
    llama.context.prefill(TOKENS[:300])
    llama.compose(CompositionPlan.keep_all(300, [2, 2, 2]))
    llama.context.extend(TOKENS[300:])
    got = attention_to_newest(llama.context, TOKENS, 100, 20, 900, 1 << 20)
    assert llama.context.tokens == TOKENS
    llama.context.reset()
    llama.context.prefill(TOKENS)
    with llama.session.scoring("max", 400, 1 << 20):
        with llama.context.on_top(900 + 340 - 400):  # the middle of the new tokens, behind all 900
            llama.context.decode(TOKENS[340:360], 900 + 340)
        want = [scores[:, 300:] for scores in llama.session.scores()]
    for a, b in zip(got, want, strict=True):
        assert a.shape == (CONFIG.n_head, 100)
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert b.max() > 1e-3


def test_layers_of_different_lengths_and_small_batches_give_the_same_scores(make_llama: Any) -> None:
    plan = random_plan(300, [300, 40, 150], CONFIG.n_head_kv)
    got = []
    for options in ({"flash_attn": False}, {"flash_attn": True}, {"flash_attn": True, "n_batch": 8, "n_ubatch": 8}):
        llama = make_llama(CONFIG, None, n_ctx=4096, **options)
        llama.context.prefill(TOKENS[:300])
        llama.compose(plan)
        llama.context.extend(TOKENS[300:])
        got.append(attention_to_newest(llama.context, TOKENS, 100, 20, 900, 1 << 20))
    for plain, flash, in_batches in zip(*got, strict=True):
        np.testing.assert_allclose(flash, plain, atol=5e-3)
        np.testing.assert_allclose(in_batches, plain, atol=5e-3)
        assert plain.max() > 5e-2


def test_a_piece_beyond_what_the_model_was_trained_for_comes_as_near_as_it_may(make_llama: Any) -> None:
    llama = make_llama(CONFIG, None, n_ctx=4096)
    llama.context.prefill(TOKENS)
    decoded: list[int] = []
    decode = llama.context.decode
    llama.context.decode = lambda tokens, pos: (decoded.append(pos), decode(tokens, pos))
    most = llama.context.n_ctx_train
    attention_to_newest(llama.context, TOKENS, 100, 20, most, 1 << 20)
    assert decoded == [most - 20]


def test_only_the_rows_of_the_scored_cells_are_scored_whatever_the_cache_becomes(make_llama: Any) -> None:
    llama = make_llama(CONFIG, None, n_ctx=4096)
    llama.context.prefill(TOKENS[:300])
    llama.compose(random_plan(300, [300, 40, 150], CONFIG.n_head_kv))
    with llama.session.scoring("max", 200, 1 << 20):  # a layer of 40 rows has them in cells 260 to 299
        with llama.context.on_top():
            llama.context.decode(TOKENS[300:310], 300)
        scores = llama.session.scores()
        assert [of_layer.shape for of_layer in scores] == [(CONFIG.n_head, n) for n in (200, 0, 50)]
        assert min(scores[0].max(), scores[2].max()) > 0
        llama.context.reset()
        llama.context.prefill(TOKENS[:300])  # the layers have other rows now
        assert [of_layer.shape[1] for of_layer in llama.session.scores()] == [200, 0, 50]
