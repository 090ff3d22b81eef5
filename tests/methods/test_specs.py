"""Methods by their names: options in a text, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from kvcompose_gguf import ConfigError
from kvcompose_gguf.methods import Method, make_method
from kvcompose_gguf.methods.expected_attention import ExpectedAttention
from kvcompose_gguf.methods.kvcompose import KVCompose
from kvcompose_gguf.methods.kvzip import KVzip
from kvcompose_gguf.methods.pyramidkv import PyramidKV
from kvcompose_gguf.methods.random_tokens import RandomTokens
from kvcompose_gguf.methods.snapkv import SnapKV
from kvcompose_gguf.methods.tova import TOVA
from kvcompose_gguf.scoring.requests import AttentionRequest, Prompts


def test_a_spec_sets_options() -> None:
    assert make_method("snapkv,window=32,pooling=max", n_kept=9) == SnapKV(n_kept=9, window=32, pooling="max")
    assert make_method("pyramidkv, beta = 7.5,n_kept=9") == PyramidKV(n_kept=9, beta=7.5)
    assert make_method("kvzip,scoring_chunk=None,n_sink=0", n_kept=9) == KVzip(n_kept=9, scoring_chunk=None, n_sink=0)
    assert make_method("random,seed=5", n_kept=9) == RandomTokens(n_kept=9, seed=5)
    assert make_method("expected-attention,use_vnorm=False", n_kept=9) == ExpectedAttention(n_kept=9, use_vnorm=False)
    assert make_method("kvcompose_gguf.methods.tova:TOVA", n_kept=9) == TOVA(n_kept=9)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"a, b=c"', "a, b=c"), (' "a" ', "a"), ("'a\\n,'", "a\n,"), ("the last, of=it", None), ("a b", "a b"),
        ("/a/b'c", "/a/b'c"), ("[x", "[x"), ("", ""), ("f(1)", "f(1)"),
    ],
)  # fmt: skip
def test_texts_of_a_spec_have_commas_if_they_are_quoted(text: str, value: str | None) -> None:
    if value is None:
        with pytest.raises(ConfigError, match="unexpected keyword argument 'of'"):
            make_method(f"kvcompose,instruction={text},n_kept=9")
        return
    got = make_method(f"kvcompose,n_sink=1,instruction={text},window=3", n_kept=9)
    assert got == KVCompose(n_kept=9, n_sink=1, instruction=value, window=3)


def test_lists_in_a_spec_have_commas() -> None:
    method = make_method('kvcompose,prompts=["a, b", "c"],scoring=prompts,scoring_chunk=None', n_kept=9)
    assert method == KVCompose(n_kept=9, scoring="prompts", prompts=["a, b", "c"], scoring_chunk=None)
    assert hash(method.attention_request) == hash(AttentionRequest(Prompts(("a, b", "c"), None)))


def test_an_error_inside_of_a_method_is_not_taken_for_a_wrong_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**options: Any) -> Method:
        raise TypeError("a bug")

    monkeypatch.setattr("kvcompose_gguf.methods.METHODS", {"broken": broken})
    with pytest.raises(TypeError, match="a bug"):
        make_method("broken,n_kept=3")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("snap-kv", "method='snap-kv' is none of kvcompose, .*snapkv"),
        ("snapkv,window", "'window' is not option=value"),
        ("snapkv,windows=3", "unexpected keyword argument 'windows'; its options are .*n_sink.*, window, kernel"),
        ("snapkv,window=0", "window=0 is not positive"),
        ("snapkv,window=1.5", "window=1.5 is not an integer"),
        ("snapkv,kernel=4", "kernel=4 is not odd"),
        ("snapkv,kernel=-1", "kernel=-1 is not positive"),
        ("snapkv,pooling=median", "pooling='median' is none of 'mean', 'max'"),
        ("pyramidkv,beta=0.5", "beta=0.5 is below 1"),
        ("pyramidkv,beta=steep", "beta='steep' is not a number"),
        ("pyramidkv,window=0", "window=0 is not positive"),
        ("expected-attention,n_queries=0", "n_queries=0 is not positive"),
        ("expected-attention,n_future=0", "n_future=0 is not positive"),
        ("expected-attention,epsilon=-1", "epsilon=-1 is negative"),
        ("expected-attention,epsilon=1e999", "epsilon=inf is negative or not finite"),
        ("expected-attention,use_vnorm=no", "use_vnorm='no' is neither True nor False"),
        ("expected-attention,use_covariance=1", "use_covariance=1 is neither"),
        ("kvzip,scoring_chunk=0", "scoring_chunk=0 is not positive"),
        ("kvzip,scoring_chunk=1.5", "scoring_chunk=1.5 is not an integer"),
        ("random,seed=-1", "seed=-1 is negative"),
        ("random,seed=x", "seed='x' is not an integer"),
        ("streaming-llm,n_sink=-1", "n_sink=-1 is negative"),
        ("tova,n_kept=3", "exactly one of .* 2 given"),
        ("kvcompose_gguf.methods.tova:Tova", "cannot be imported"),
        ("argparse:Namespace", "is not a Method"),
        ("builtins:dict", "does not name a Python class or function"),
        ("math:pi", "does not name a Python class or function"),
        (":X", "is none of .*, nor module:attribute"),
        ("math:", "is none of .*, nor module:attribute"),
        (".math:pi", "is none of .*, nor module:attribute"),
        ("snapkv,window=3,window=3", "window is given twice"),
        ("snapkv,compression_ratio=0.5", "compression_ratio is given twice"),
        ("snapkv,window=3,", "'' is not option=value"),
    ],
)
def test_a_spec_out_of_range_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method(spec, compression_ratio=0.5)
