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

from kvcompose_gguf import ConfigError, ContextLengthError, KVCompose, Llama, NativeError, StateError

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


@each_cache
def test_more_tokens_than_the_context_has_cells_are_refused_before_anything_changes(
    make_llama: Any, compressed: bool
) -> None:
    llama = filled(make_llama, "llama", compressed)
    untouched = filled(make_llama, "llama", compressed)
    many = tiny.tokens(tiny.GQA, llama.n_ctx() - llama.n_tokens + 1, seed=9)
    for call in (llama.eval, llama.eval_logits):
        with pytest.raises(ContextLengthError, match="do not fit into n_ctx"):
            call(many)
    assert llama.context.tokens == [*CONTEXT, *MORE]
    np.testing.assert_array_equal(llama.eval_logits(OTHER), untouched.eval_logits(OTHER))


def with_image(make_llama: Any) -> Llama:
    """Returns a Llama in whose cache the bindings have put five tokens themselves, as their image handlers do."""
    llama = make(make_llama, "llama")
    llama.prefill(CONTEXT)
    llama.context.decoder.decode(OTHER[:5], N, "none")
    llama.n_tokens = N + 5
    return llama


def test_a_prompt_with_an_image_is_never_read_again_and_so_not_compressed(make_llama: Any) -> None:
    llama = with_image(make_llama)
    llama.eval(MORE)  # text after the image
    assert llama.context.has_images
    next(llama.generate(llama.context.tokens, reset=True))
    assert llama.context.composed is None
    state = llama.save_state()
    llama.reset()
    assert not llama.context.has_images
    llama.load_state(state)
    assert llama.context.has_images
    llama.truncate(N - 10)
    assert not llama.context.has_images
    llama.eval(MORE)
    assert not llama.context.has_images


def test_a_session_remembers_that_it_has_an_image(make_llama: Any, tmp_path: Path) -> None:
    llama = with_image(make_llama)
    llama.save_session(tmp_path / "a.kvc")
    llama.reset()
    llama.load_session(tmp_path / "a.kvc")
    assert llama.context.has_images


def test_a_model_that_cannot_be_compressed_goes_back_to_nothing(make_llama: Any) -> None:
    llama = make_llama(tiny.REFUSED["mamba"])
    llama.eval(CONTEXT)
    assert not llama.can_truncate
    assert llama.context.rewind(10) == 0
    llama.eval(CONTEXT)
    with pytest.raises(StateError, match="call reset"):
        llama.truncate(10)


def test_after_an_error_while_it_goes_back_the_cache_counts_as_empty(
    make_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = filled(make_llama, "gemma3", False)

    def refuse(state: bytes) -> None:
        raise NativeError("no windows")

    monkeypatch.setattr(llama.context.decoder, "load_partial_state", refuse)
    for block in (llama.context.undone, llama.context.on_top):
        with pytest.raises(NativeError, match="no windows"), block():
            pass
        assert llama.n_tokens == 0


def test_after_an_interrupted_decode_the_last_logits_count_as_gone(make_llama: Any) -> None:
    llama = filled(make_llama, "llama", False)
    assert not llama.context.needs_eval

    def interrupt(decode: Callable[[], None], n_tokens: int) -> None:
        decode()
        raise KeyboardInterrupt

    llama.context.through = interrupt
    with pytest.raises(KeyboardInterrupt):
        llama.eval(OTHER)
    assert llama.context.needs_eval


def test_an_error_of_a_decode_is_one_of_the_packages_classes(make_llama: Any) -> None:
    llama = filled(make_llama, "llama", False)
    with pytest.raises(NativeError, match=f"3 tokens at position {N + 40}"):
        llama.eval([1, 2, 1 << 30])


def test_weights_of_another_file_are_refused(make_llama: Any, tiny_model: Callable[..., Path]) -> None:
    owner = make_llama(tiny.GQA)
    with pytest.raises(ConfigError, match="share weights of one file"):
        Llama(str(tiny_model(tiny.ARCHITECTURES["qwen3"])), weights_of=owner)
    with pytest.raises(AttributeError, match="input_ids cannot be replaced"):
        owner.input_ids = np.zeros(3, np.int32)
