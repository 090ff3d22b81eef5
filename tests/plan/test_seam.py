"""Tests seam.join with a toy tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompose_gguf.plan.seam import MAX_SEAM, common_prefix, join

CONTROL = 0  # <eos> and the like: a token without text
MERGES = [b"..", b".\n", b"\n\n", b"ab", b"abc", b" a", "é".encode()]
PIECES = [b"", *(bytes([i]) for i in range(256)), *MERGES]
IDS = {text: token for token, text in enumerate(PIECES) if text}


def piece(token: int) -> bytes:
    return PIECES[token]


def tokenize(text: bytes) -> list[int]:
    """Tokenizes greedily, longest match first."""
    tokens = []
    while text:
        part = next(text[:n] for n in range(3, 0, -1) if text[:n] in IDS)
        tokens.append(IDS[part])
        text = text[len(part) :]
    return tokens


def tokenize_with_space(text: bytes) -> list[int]:
    return tokenize(b" " + text)


def text_of(tokens: list[int]) -> bytes:
    return b"".join(piece(token) for token in tokens)


def ids(*texts: bytes) -> list[int]:
    return [IDS[text] for text in texts]


def test_common_prefix_counts_the_leading_tokens_that_agree() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([1, 2], [3, 2]) == 0
    assert common_prefix([], [1]) == 0


def test_a_prompt_that_begins_with_the_context_is_returned_unchanged() -> None:
    context = tokenize(b"xab.")
    prompt = [*context, *tokenize(b"Wxy")]
    joined = join(context, prompt, piece, tokenize)
    assert joined == prompt
    assert joined is not prompt


def test_a_prompt_equal_to_the_context_is_returned_unchanged() -> None:
    assert join(tokenize(b"xab."), tokenize(b"xab."), piece, tokenize) == tokenize(b"xab.")


def test_an_empty_context_is_continued_by_anything() -> None:
    assert join([], tokenize(b"xy"), piece, tokenize) == tokenize(b"xy")


@pytest.mark.parametrize("prompt", [b"", b"x", b"xab", b"xabc", b"xa"])
def test_a_prompt_shorter_than_the_context_does_not_continue_it(prompt: bytes) -> None:
    assert join(tokenize(b"xabcy."), tokenize(prompt), piece, tokenize) is None


@pytest.mark.parametrize("prompt", [b"xaby.\nW", b"yabc.", b"xabc,\nW", b"xabc\nW"])
def test_a_prompt_of_another_text_does_not_continue_the_context(prompt: bytes) -> None:
    assert join(tokenize(b"xabc."), tokenize(prompt), piece, tokenize) is None


def test_a_merge_at_the_seam_is_undone() -> None:
    context = ids(b"x", b".")
    prompt = tokenize(b"x.\nWhat?")
    assert prompt[:2] == ids(b"x", b".\n")
    joined = join(context, prompt, piece, tokenize)
    assert joined == ids(b"x", b".", b"\n", b"W", b"h", b"a", b"t", b"?")


def test_a_context_that_ends_inside_of_a_character_is_continued() -> None:
    first, second = (bytes([byte]) for byte in "é".encode())
    assert tokenize("xé!".encode()) == ids(b"x", "é".encode(), b"!")
    assert join(ids(b"x", first), tokenize("xé!".encode()), piece, tokenize) == ids(b"x", first, second, b"!")


def test_two_context_tokens_that_became_one_are_kept_as_two() -> None:
    assert join(ids(b"x", b".", b"."), ids(b"x", b"..", b"W"), piece, tokenize) == ids(b"x", b".", b".", b"W")


def test_two_context_tokens_and_a_beginning_of_the_next_are_split() -> None:
    assert join(ids(b"x", b"a", b"b"), ids(b"x", b"abc", b"W"), piece, tokenize) == ids(b"x", b"a", b"b", b"c", b"W")


def test_one_context_token_that_became_two_is_kept_as_one() -> None:
    assert join(ids(b"x", b"ab"), ids(b"x", b"a", b"b", b"W"), piece, tokenize) == ids(b"x", b"ab", b"W")


def test_two_context_tokens_against_two_prompt_tokens_are_joined() -> None:
    # a|b. against ab|.\n
    joined = join(ids(b"x", b"a", b"b", b"."), ids(b"x", b"ab", b".\n", b"W"), piece, tokenize)
    assert joined == ids(b"x", b"a", b"b", b".", b"\n", b"W")


def test_the_rest_of_the_seam_may_take_more_than_one_token() -> None:
    assert join(ids(b"x", b"a"), ids(b"x", b"abc", b"W"), piece, tokenize) == ids(b"x", b"a", b"b", b"c", b"W")


def test_tokens_behind_the_seam_are_the_prompts_own() -> None:
    # tokenize() never returns "ab" as two tokens, so they must stay
    prompt = [*ids(b"x", b".\n", b"a", b"b"), CONTROL, *ids(b"W")]
    assert join(ids(b"x", b"."), prompt, piece, tokenize) == [*ids(b"x", b".", b"\n", b"a", b"b"), CONTROL, *ids(b"W")]


def test_control_tokens_before_the_seam_are_kept() -> None:
    joined = join([CONTROL, *ids(b"x", b".")], [CONTROL, *ids(b"x", b".\n")], piece, tokenize)
    assert joined == [CONTROL, *ids(b"x", b".", b"\n")]


@pytest.mark.parametrize(
    ("context", "prompt"),
    [
        ([*ids(b"x", b"."), CONTROL], ids(b"x", b".\n")),
        ([*ids(b"x"), CONTROL, *ids(b".")], ids(b"x", b".\n")),
        (ids(b"x", b"a", b"b"), [*ids(b"x"), CONTROL, *ids(b"abc")]),
        (ids(b"x", b"a", b"b"), [*ids(b"x", b"a"), CONTROL, *ids(b"b")]),
        ([*ids(b"x"), CONTROL], ids(b"x", b"W")),
        ([CONTROL, *ids(b"x", b".")], ids(b"x", b".\n")),
    ],
    ids=["end of the context", "in the context", "before the prompt's seam", "in the prompt", "only", "missing BOS"],
)
def test_control_tokens_are_never_merged(context: list[int], prompt: list[int]) -> None:
    assert join(context, prompt, piece, tokenize) is None


def test_a_tokenizer_that_puts_a_space_before_every_text_is_not_trusted() -> None:
    assert join(ids(b"x", b"."), ids(b"x", b".\n", b"W"), piece, tokenize_with_space) is None


def test_a_tokenizer_is_not_needed_if_the_seam_ends_where_the_context_does() -> None:
    def unusable(text: bytes) -> list[int]:
        raise AssertionError(f"tokenize({text!r}) was called")

    assert join(ids(b"x", b".", b"."), ids(b"x", b"..", b"W"), piece, unusable) == ids(b"x", b".", b".", b"W")


@pytest.mark.parametrize(("n_seam", "joins"), [(MAX_SEAM - 1, True), (MAX_SEAM, True), (MAX_SEAM + 1, False)])
def test_only_a_seam_of_at_most_max_seam_tokens_is_joined(n_seam: int, joins: bool) -> None:
    context = ids(b"x", *[b"a", b"b"] * (n_seam // 2), *[b"c"] * (n_seam % 2))
    assert len(context) == 1 + n_seam
    prompt = ids(b"x", *[b"ab"] * (n_seam // 2), *[b"c"] * (n_seam % 2), b"W")
    assert join(context, prompt, piece, tokenize) == ([*context, *ids(b"W")] if joins else None)


texts = st.lists(st.sampled_from([b"a", b"b", b"c", b".", b"\n", b" ", "é".encode()])).map(b"".join)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(texts, texts)
def test_a_continued_text_keeps_its_text_and_the_contexts_tokens(context: bytes, rest: bytes) -> None:
    before = tokenize(context)
    joined = join(before, tokenize(context + rest), piece, tokenize)
    # a greedy token that crosses the end replaces at most two of the context's tokens
    assert joined is not None
    assert joined[: len(before)] == before
    assert text_of(joined) == context + rest


@settings(deadline=None, derandomize=True, max_examples=100)
@given(texts, texts)
def test_whatever_is_joined_begins_with_the_context_and_has_the_prompts_text(context: bytes, prompt: bytes) -> None:
    before = tokenize(context)
    joined = join(before, tokenize(prompt), piece, tokenize)
    assert (joined is not None) == prompt.startswith(context)
    if joined is not None:
        assert joined[: len(before)] == before
        assert text_of(joined) == prompt
