"""Edits in a cache: values are written and read again, biases count, and answers follow from both."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.arrays import assert_close
from support.edits import edits_of
from support.llamas import F32, PLAIN_TYPES, Q8_0, decode_one_by_one, stored_rows
from support.plans import random_plan

from kvcompose_gguf import CompositionPlan, ConfigError, StateError, UnsupportedError
from kvcompose_gguf.evaluation.trials import compressed
from kvcompose_gguf.methods.kvcompose import KVCompose
from kvcompose_gguf.methods.variant import Variant
from kvcompose_gguf.native.rows import cached_rows, read_rows, write_layer_values
from kvcompose_gguf.plan.trial import Trial

N = 80
CONTEXT = tiny.tokens(tiny.GQA, N)
QUERY = tiny.tokens(tiny.GQA, 24, seed=1)


class Edited(tiny.NumpyLlama):
    """The numpy model with a factor on the context's attention weights, ``(n_head_kv, N)`` per layer."""

    factors: list[np.ndarray] | None = None

    def _attend(self, q: np.ndarray, il: int, positions: np.ndarray) -> np.ndarray:
        p = super()._attend(q, il, positions)
        if self.factors is not None:
            p[:, :, :N] *= np.repeat(self.factors[il], 2, axis=0)[:, None]
        return p / p.sum(axis=2, keepdims=True)

    def compose(self, plan: CompositionPlan, values: Any = (), biases: Any = ()) -> None:
        """Hides what the plan evicts, and edits the composites' values and logits."""
        self.visible, self.factors = [], [np.ones((2, N)) for _ in plan.rows]
        for l, cells in enumerate(plan.rows):
            mask = np.zeros((2, N), dtype=bool)
            for h, kept in enumerate(cells):
                mask[h, kept] = True
                if len(values):
                    self.v[l][kept, h] = values[l][h]
                if len(biases):
                    self.factors[l][h, kept] = np.exp(biases[l][h].astype(np.float64))
            self.visible.append(mask)


def both(make_llama: Any, stored: type = np.float64, **kwargs: Any) -> tuple[Any, Edited]:
    """Returns the native and the numpy model after the same context."""
    llama = make_llama(tiny.GQA_SOFT, **({"n_threads": 1, "n_threads_batch": 1} | kwargs))
    llama.prefill(CONTEXT)
    model = Edited(tiny.GQA_SOFT, stored=stored)
    model.forward(CONTEXT)
    return llama, model


@pytest.mark.parametrize("n_kept", [[30, 80, 7], [0, 80, 1]], ids=str)
@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("name", PLAIN_TYPES)
def test_written_values_are_read_again_and_no_other_byte_is_changed(make_llama, name, flash_attn, n_kept):
    llama, _ = both(make_llama, type_k=PLAIN_TYPES[name], type_v=PLAIN_TYPES[name], flash_attn=flash_attn)
    session = llama.session
    assert session.layers[0].v_trans is not flash_attn
    llama.compose(random_plan(N, n_kept))
    llama.eval(QUERY)
    before = [[stored_rows(llama, l, which).copy() for which in "kv"] for l in range(3)]
    rng = np.random.default_rng(1)
    values = [rng.standard_normal((2, n, 32)).astype(np.float32) for n in n_kept]
    llama.write_values(values)
    relative = {"f32": 0, "f16": 2.0**-11, "bf16": 2.0**-8}[name]
    for l, n in enumerate(n_kept):
        if n:
            error = np.abs(read_rows(session, l, "v", n) - values[l])
            assert (error <= relative * np.abs(values[l]) + 2.0**-25).all(), f"the largest difference is {error.max()}"
        keys, rows = (stored_rows(llama, l, which) for which in "kv")
        np.testing.assert_array_equal(keys, before[l][0])
        np.testing.assert_array_equal(rows[:, n:], before[l][1][:, n:])


@pytest.mark.parametrize("flash_attn", [False, True])
def test_values_of_a_full_cache_are_replaced_in_the_first_rows_alone(make_llama, flash_attn):
    llama, _ = both(make_llama, flash_attn=flash_attn)
    before = stored_rows(llama, 1, "v").copy()
    values = np.random.default_rng(1).standard_normal((2, 5, 32)).astype(np.float32)
    write_layer_values(llama.session, 1, values)
    np.testing.assert_array_equal(cached_rows(llama.session, 1, "v", 5), values)
    np.testing.assert_array_equal(stored_rows(llama, 1, "v")[:, 5:], before[:, 5:])


def test_values_that_were_read_can_be_written_back(make_llama):
    for name, flash_attn in itertools.product(PLAIN_TYPES, (False, True)):
        llama, _ = both(make_llama, type_k=PLAIN_TYPES[name], type_v=PLAIN_TYPES[name], flash_attn=flash_attn)
        llama.compose(random_plan(N, [30, 80, 7]))
        before = [stored_rows(llama, l, "v").copy() for l in range(3)]
        llama.write_values([read_rows(llama.session, l, "v", n) for l, n in enumerate((30, 80, 7))])
        for l in range(3):
            np.testing.assert_array_equal(stored_rows(llama, l, "v"), before[l], err_msg=f"{name} {flash_attn}")
        llama.close()


@pytest.mark.parametrize("shape", [(1, 5, 32), (2, 5, 31), (2, 31, 32), (5, 32)], ids=str)
def test_values_of_another_shape_are_not_written(make_llama, shape):
    llama, _ = both(make_llama)
    llama.compose(random_plan(N, [30, 80, 7]))
    before = stored_rows(llama, 0, "v").copy()
    with pytest.raises(ConfigError, match=r"values of layer 0 are .*; \(2, at most 30, 32\) is needed"):
        write_layer_values(llama.session, 0, np.zeros(shape, np.float32))
    np.testing.assert_array_equal(stored_rows(llama, 0, "v"), before)


def test_evidence_of_a_context_that_is_not_in_the_cache_any_more_cannot_be_read(make_llama):
    llama, _ = both(make_llama)
    evidence = llama.observe(CONTEXT, KVCompose(n_kept=30))
    want = evidence.keys(0)
    llama.eval(QUERY)
    np.testing.assert_array_equal(evidence.keys(0), want)
    llama.truncate(N)
    llama.compose(random_plan(N, [30, 80, 7]))
    with pytest.raises(StateError, match="80 compressed tokens now: the 80 tokens of the full cache"):
        evidence.keys(0)
    llama.reset()
    llama.prefill(CONTEXT[:40])
    with pytest.raises(StateError, match="40 tokens now"):
        evidence.values(0)


def test_values_of_a_quantized_cache_are_not_replaced(make_llama):
    llama = make_llama(tiny.WIDE, flash_attn=True, type_k=Q8_0, type_v=Q8_0)
    llama.prefill(CONTEXT)
    before = stored_rows(llama, 0, "v").copy()
    with pytest.raises(UnsupportedError, match="quantized"):
        llama.write_values([np.zeros((2, 5, 64), np.float32)])
    np.testing.assert_array_equal(stored_rows(llama, 0, "v"), before)


def test_values_may_be_replaced_where_only_keys_are_quantized(make_llama):
    llama = make_llama(tiny.WIDE, flash_attn=True, type_k=Q8_0, type_v=F32)
    llama.prefill(CONTEXT)
    values = np.random.default_rng(1).standard_normal((2, 5, 64)).astype(np.float32)
    llama.write_values([values])
    np.testing.assert_array_equal(cached_rows(llama.session, 0, "v", 5), values)


@pytest.mark.parametrize("n_kept", [[30, 80, 7], [0, 80, 1]], ids=str)
@pytest.mark.parametrize(("name", "flash_attn"), [("f32", False), ("f16", False), ("f16", True), ("f32", True)])
def test_answers_follow_from_the_written_values(make_llama, name, flash_attn, n_kept):
    stored = np.float64 if (name, flash_attn) == ("f32", False) else np.float16
    llama, model = both(make_llama, stored, type_k=PLAIN_TYPES[name], type_v=PLAIN_TYPES[name], flash_attn=flash_attn)
    plan = random_plan(N, n_kept)
    values = [np.random.default_rng(l).standard_normal((2, n, 32)).astype(np.float32) for l, n in enumerate(n_kept)]
    unchanged = Edited(tiny.GQA_SOFT)
    unchanged.forward(CONTEXT)
    unchanged.compose(plan)
    model.compose(plan, [v.astype(stored) for v in values])
    want = model.forward(QUERY)[0]
    llama.compose(plan)
    llama.write_values(values)
    tolerance = 1e-3 if stored is np.float64 else 1e-2
    assert np.abs(unchanged.forward(QUERY)[0] - want).max() > 20 * tolerance, "the values change nothing"
    assert_close(llama.eval_logits(QUERY), want, tolerance)
    llama.truncate(N)
    assert_close(decode_one_by_one(llama, QUERY), want, tolerance)


@pytest.mark.parametrize("n_room", [256, 1], ids=["with room", "a cache that grows"])
@pytest.mark.parametrize("flash_attn", [False, True])
def test_a_bias_of_log_two_is_the_composite_twice(make_llama, flash_attn, n_room):
    stored = np.float16 if flash_attn else np.float64
    llama, model = both(make_llama, stored, flash_attn=flash_attn)
    plan, rng = random_plan(N, [30, 80, 7]), np.random.default_rng(1)
    biases = [np.where(rng.random(cells.shape) < 0.5, np.log(2), 0).astype(np.float32) for cells in plan.rows]
    llama.compose(plan, n_room)
    model.compose(plan, biases=biases)
    plain = Edited(tiny.GQA_SOFT, stored=stored)
    plain.forward(CONTEXT)
    plain.compose(plan)
    want, unbiased = model.forward(QUERY)[0], plain.forward(QUERY)[0]
    tolerance = 5e-3 if flash_attn else 1e-3
    assert np.abs(want - unbiased).max() > 10 * tolerance, "the bias changes nothing"
    with llama.session.biased(biases):
        assert_close(decode_one_by_one(llama, QUERY), want, tolerance, "one by one")
        llama.truncate(N)
        assert_close(llama.eval_logits(QUERY), want, tolerance, "at once")
    llama.truncate(N)
    assert_close(llama.eval_logits(QUERY), unbiased, tolerance, "without it again")


def test_tokens_behind_the_composites_get_no_bias(make_llama):
    """Adds the same number to all composites and nothing to later rows: only the share of the two changes."""
    llama, model = both(make_llama)
    plan = random_plan(N, [30, 80, 7])
    llama.compose(plan)
    model.compose(plan)
    llama.eval(QUERY[:-1])
    model.forward(QUERY[:-1])
    with llama.session.biased([np.full(cells.shape, np.log(5), np.float32) for cells in plan.rows]), llama.session.taps("outputs", 1):  # fmt: skip
        llama.eval(QUERY[-1:])
        got = llama.session.tapped("outputs", 0, 1)[0]
    _, attention = model.forward(QUERY[-1:])
    p = attention[0][:, 0].copy()
    p[:, :N] *= 5
    p /= p.sum(axis=1, keepdims=True)
    assert_close(got, np.einsum("hk,khd->hd", p, np.repeat(model.v[0], 2, axis=1)), 1e-5)


def test_a_layer_that_keeps_nothing_takes_an_empty_bias(make_llama):
    llama, model = both(make_llama)
    plan = random_plan(N, [0, 80, 7])
    biases = [np.full(cells.shape, 0.7, np.float32) for cells in plan.rows]
    llama.compose(plan)
    model.compose(plan, biases=biases)
    with llama.session.biased(biases):
        assert_close(llama.eval_logits(QUERY), model.forward(QUERY)[0], 1e-3)


@pytest.mark.parametrize("options", [{"fold": 1.0}, {"correct": 0.5}, {"fold": 0.5, "correct": 1.0}], ids=str)
@pytest.mark.parametrize("flash_attn", [False, True])
def test_an_edited_plan_is_evaluated_as_it_says(make_llama, flash_attn, options):
    llama, model = both(make_llama, np.float16 if flash_attn else np.float64, flash_attn=flash_attn)
    method = Variant(compression_ratio=0.8, keep_token_lower_bound=1, **options)
    evidence = llama.observe(CONTEXT, method)
    plan, edited = edits_of(method, evidence, method.scores(evidence))
    state = llama.save_state()
    model.compose(plan, edited.values, edited.biases)
    want = model.forward(QUERY)[0]
    tolerance = 1e-2 if flash_attn else 1e-3
    with compressed(llama, state, Trial(plan)):
        effect = np.abs(llama.eval_logits(QUERY) - want).max()
    assert effect > 5 * tolerance, f"the edits change the logits by {effect:.2g} only"
    with compressed(llama, state, edited) as restore:
        assert_close(llama.eval_logits(QUERY), want, tolerance)
        restore()
        assert_close(llama.eval_logits(QUERY), want, tolerance, "once more")
    with compressed(llama, state, Trial(CompositionPlan.keep_all(N, [2] * 3))):
        plain = Edited(tiny.GQA_SOFT)
        plain.forward(CONTEXT)
        assert_close(llama.eval_logits(QUERY), plain.forward(QUERY)[0], tolerance, "nothing is left of them")
