"""Decodes a token for each of several contexts at once: each has the logits and the cache of a decode of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.llamas import F16, F32, Q8_0, decode_one_by_one, greedy, last_logits, step, stored_rows

from kvcompose_gguf import ConfigError, KVCompose, Llama, StateError, UnsupportedError
from kvcompose_gguf.native.decoder import Decode
from kvcompose_gguf.native.joint import decode_joint

CONFIG = tiny.GQA_SOFT
METHOD = KVCompose(compression_ratio=0.5, scoring="repeat", min_tokens=50)
CACHES = [
    pytest.param({"type_k": F32, "type_v": F32, "flash_attn": False}, id="f32-transposed-v"),
    pytest.param({"type_k": F16, "type_v": F16, "flash_attn": True}, id="f16-flash"),
    pytest.param({"type_k": Q8_0, "type_v": Q8_0, "flash_attn": True}, id="q8_0"),
]


@pytest.fixture
def make_group(make_llama) -> Callable[..., list[Llama]]:
    """Contexts of one model, with other texts: the first is full, the second composed, the third has another length."""

    def make(config: tiny.TinyConfig = CONFIG, n: int = 3, **options: Any) -> list[Llama]:
        group: list[Llama] = []
        for number in range(n):
            llama = make_llama(config, weights_of=group[0] if group else None, **options)
            llama.kv_compressor = METHOD if number % 2 else None
            next(llama.generate(tiny.tokens(config, 100 + 70 * number, seed=number), temp=0.0))
            group.append(llama)
        return group

    return make


def decode_together(group: list[Llama], tokens: list[int]) -> list[np.ndarray]:
    """Evaluates a token in each context, and notes it there as ``eval`` does; returns each context's logits."""
    decode_joint([step(llama, token) for llama, token in zip(group, tokens, strict=True)])
    for llama, token in zip(group, tokens, strict=True):
        llama.context.note_new([token])
    return [last_logits(llama) for llama in group]


@pytest.mark.parametrize("cache", CACHES)
def test_logits_and_caches_are_those_of_decodes_alone(make_group, cache):
    """40 steps: graphs are reused, and the caches grow past their first 256 rows."""
    together, alone = make_group(**cache), make_group(**cache)
    for number in range(40):
        tokens = tiny.tokens(CONFIG, 3, seed=number)
        got = decode_together(together, tokens)
        for llama, token, logits in zip(alone, tokens, got, strict=True):
            (want,) = decode_one_by_one(llama, [token])
            np.testing.assert_allclose(logits, want, atol=2e-3 if cache["type_k"] == Q8_0 else 1e-4)
    assert [llama.session.state().n_cells_used for llama in together] == [
        llama.session.state().n_cells_used for llama in alone
    ]
    if cache["type_k"] == F32:
        for one, other in zip(together, alone, strict=True):
            for il in range(CONFIG.n_layer):
                a, b = (stored_rows(llama, il, "k").view(np.float32) for llama in (one, other))
                np.testing.assert_allclose(a, b, atol=1e-4)


def test_contexts_of_other_texts_give_other_logits(make_group):
    group = make_group()
    one, two, three = decode_together(group, [5, 5, 5])
    assert np.abs(one - two).max() > 0.01 < np.abs(two - three).max()


def test_members_may_come_and_go(make_group):
    """A graph of other contexts, of the same number and sizes, is not taken for this one's."""
    group, alone = make_group(n=4), make_group(n=4)
    for members in ([0, 1], [0, 3], [2, 1], [0, 1], [3, 1, 0], [2]):
        tokens = tiny.tokens(CONFIG, len(members), seed=len(members))
        got = decode_together([group[number] for number in members], tokens)
        for number, token, logits in zip(members, tokens, got, strict=True):
            np.testing.assert_allclose(logits, decode_one_by_one(alone[number], [token])[0], atol=1e-4)
    # each goes on alone from where it is
    for one, other in zip(group, alone, strict=True):
        np.testing.assert_allclose(decode_one_by_one(one, [9, 8]), decode_one_by_one(other, [9, 8]), atol=1e-4)


def test_a_context_that_was_composed_anew_can_join(make_group):
    group, alone = make_group(), make_group()
    decode_together(group, [1, 2, 3])
    for members in (group, alone):
        greedy(members[1], tiny.tokens(CONFIG, 300, seed=7), 1)
    for llama, token in ((alone[0], 1), (alone[2], 3)):
        decode_one_by_one(llama, [token])
    got = decode_together(group, [4, 5, 6])
    for llama, token, logits in zip(alone, [4, 5, 6], got, strict=True):
        np.testing.assert_allclose(logits, decode_one_by_one(llama, [token])[0], atol=1e-4)


def bad(group: list[Llama], what: str) -> list[Decode]:
    first, second = step(group[0], 1), step(group[1], 1)
    return {
        "twice": [first, second, first],
        "position": [first, Decode(second.decoder, [1], second.pos + 1, "last")],
        "token": [first, Decode(second.decoder, [CONFIG.n_vocab], second.pos, "last")],
    }[what]


@pytest.mark.parametrize(("what", "says"), [("twice", "twice"), ("position", "last token is at"), ("token", "vocabul")])
def test_bad_input_is_refused_and_changes_nothing(make_group, what, says):
    group, alone = make_group(), make_group()
    with pytest.raises(ConfigError, match=says):
        decode_joint(bad(group, what))
    for one, other in zip(group, alone, strict=True):
        np.testing.assert_array_equal(decode_one_by_one(one, [3]), decode_one_by_one(other, [3]))


def test_contexts_of_different_models_are_refused(make_group, make_llama):
    other = make_llama(tiny.MHA_SOFT)
    other.eval([1, 2])
    with pytest.raises(ConfigError, match="different models"):
        decode_joint([step(make_group()[0], 1), step(other, 1)])


def test_a_full_cache_is_refused_and_no_context_has_the_token(make_llama):
    full = make_llama(CONFIG, n_ctx=256)
    other = make_llama(CONFIG, weights_of=full)
    full.eval(tiny.tokens(CONFIG, 256))
    other.eval([1, 2])
    with pytest.raises(StateError, match="is full"):
        decode_joint([step(other, 1), step(full, 1)])
    assert other.session.state().n_cells_used == 2
    other.eval([1])


def test_a_context_that_collects_scores_is_refused(make_group):
    group = make_group()
    with group[1].session.scoring("max", 100, 1 << 20), pytest.raises(StateError, match="scores"):
        decode_joint([step(llama, 1) for llama in group])


@pytest.mark.parametrize("config", [tiny.ARCHITECTURES["gemma3"], tiny.REFUSED["mamba"]], ids=["gemma3", "mamba"])
def test_other_memories_are_refused(make_llama, config):
    one = make_llama(config)
    two = make_llama(config, weights_of=one)
    for llama in (one, two):
        llama.eval([1, 2, 3])
    with pytest.raises(UnsupportedError, match=r"plain cache|recurrent"):
        decode_joint([step(llama, 1) for llama in (one, two)])
