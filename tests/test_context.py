"""The owner of the cache: its verbs on full and compressed caches, with and without sliding windows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.llamas import F32, greedy

from kvcompose_gguf import KVCompose, Llama, StateError

N = 300
METHOD = KVCompose(compression_ratio=0.5, min_tokens=100, keep_last=8, scoring="repeat")
CONFIGS = {"llama": tiny.GQA, "gemma3": tiny.ARCHITECTURES["gemma3"]}
CONTEXT, MORE, OTHER = (tiny.tokens(tiny.GQA, n, seed=seed) for seed, n in enumerate((N, 40, 30)))

each_config = pytest.mark.parametrize("name", CONFIGS)
each_cache = pytest.mark.parametrize("compressed", [False, True], ids=["full", "compressed"])


def make(make_llama: Any, name: str) -> Llama:
    """Returns an empty Llama; sliding windows keep only what they need."""
    llama: Llama = make_llama(CONFIGS[name], METHOD, swa_full=False)
    return llama


def filled(make_llama: Any, name: str, compressed: bool) -> Llama:
    """Returns a Llama whose cache holds CONTEXT and MORE."""
    llama = make(make_llama, name)
    if compressed:
        llama.compress(CONTEXT)
    else:
        llama.prefill(CONTEXT)
    llama.eval(MORE)
    return llama


@each_config
@each_cache
def test_what_is_undone_leaves_no_trace(make_llama: Any, name: str, compressed: bool) -> None:
    untouched, llama = (filled(make_llama, name, compressed) for _ in range(2))
    want = untouched.eval_logits(OTHER)
    with llama.context.undone():
        llama.eval(tiny.tokens(tiny.GQA, 60, seed=7))
        assert llama.n_tokens == N + 100
    assert llama.context.tokens == [*CONTEXT, *MORE]
    assert llama.context.needs_eval
    np.testing.assert_allclose(llama.eval_logits(OTHER), want, rtol=0, atol=1e-4)  # windows come back in other cells


@pytest.mark.parametrize(
    ("name", "compressed", "to", "left"),
    [
        ("llama", False, N + 10, N + 10), ("llama", False, 10, 10), ("llama", False, 0, 0),
        ("llama", True, N + 10, N + 10), ("llama", True, N, N), ("llama", True, N - 1, 0),
        ("gemma3", False, N + 40, N + 40), ("gemma3", False, N + 10, 0),
        ("gemma3", True, N + 40, N + 40), ("gemma3", True, N + 10, N), ("gemma3", True, N, N), ("gemma3", True, 5, 0),
    ],
)  # fmt: skip
def test_a_cache_goes_back_as_far_as_it_must_and_then_answers_as_one_that_was_never_longer(
    make_llama: Any, name: str, compressed: bool, to: int, left: int
) -> None:
    llama, other = filled(make_llama, name, compressed), make(make_llama, name)
    assert llama.context.rewind(to) == llama.n_tokens == left
    assert llama.n_context == (N if compressed and left else 0)
    if left and compressed:
        other.compress(CONTEXT)
    other.eval([*CONTEXT, *MORE][other.n_tokens : left])
    np.testing.assert_allclose(llama.eval_logits(OTHER), other.eval_logits(OTHER), rtol=0, atol=1e-4)


def test_nobody_but_the_verbs_can_write_the_state(make_llama: Any) -> None:
    context = make_llama(method=METHOD).context
    for name in ("n_tokens", "composed", "needs_eval", "tokens", "n_context"):
        with pytest.raises(AttributeError):
            setattr(context, name, getattr(context, name))


def test_a_closed_context_refuses_every_verb(make_llama: Any) -> None:
    llama = make_llama(method=METHOD)
    context = llama.context
    calls = [context.reset, lambda: context.eval([1]), lambda: context.rewind(0), context.save, lambda: context.session]
    llama.close()
    for call in calls:
        with pytest.raises(StateError, match="closed"):
            call()


def test_weights_are_shared_only_with_the_llama_that_asks(tiny_model: Callable[..., Path]) -> None:
    path = str(tiny_model(tiny.GQA))
    options: dict[str, Any] = {"n_ctx": 512, "verbose": False, "type_k": F32, "type_v": F32}
    owner = Llama(path, **options)
    made: list[Llama] = []
    loader = threading.Thread(target=lambda: made.append(Llama(path, **options)))
    loader.start()
    borrower = Llama(path, weights_of=owner, **options)
    loader.join()
    assert borrower.model == owner.model
    assert made[0].model != owner.model
    want = greedy(made[0], CONTEXT, 4)
    assert greedy(borrower, CONTEXT, 4) == want
    borrower.close()
    assert greedy(owner, CONTEXT, 4) == want, "closing the borrower freed the owner's weights"
    for llama in (owner, made[0]):
        llama.close()


def test_evidence_is_still_read_by_name_with_a_warning(make_llama: Any) -> None:
    llama = make_llama(method=METHOD)
    evidence = llama.observe(CONTEXT, METHOD)
    keys, pos = evidence.keys(0)[0], np.arange(N, dtype=np.int32)
    with pytest.warns(DeprecationWarning, match=r"evidence\.keys\(l\)"):
        np.testing.assert_array_equal(evidence.read("keys", 0)[0], keys)
    with pytest.warns(DeprecationWarning, match="unrotate"):
        np.testing.assert_array_equal(evidence.read("unrotate", 0)(keys, pos), evidence.unrotate(0, keys, pos))
