"""Grammars that begin with a tool call, and limits of the model's thoughts. Token numbers stand for themselves."""

from __future__ import annotations

import pytest
from support import tiny

from kvcompose_gguf.errors import ConfigError
from kvcompose_gguf.server.slots.constraint import Constraint, Guide, Thinking, Thoughts
from kvcompose_gguf.server.slots.sampling import Sampler, Sampling

#: <think> is 1 2, </think> is 3 4 or 9
THINKING = Thinking(mark=(1, 2), ends=((3, 4), (9,)))


def test_thoughts_begin_and_end_with_their_marks():
    thoughts, inside, marks = Thoughts(THINKING), [], []
    for token in (1, 5, 1, 2, 7, 3, 7, 3, 4, 8, 1, 2, 9, 8):
        marks.append(thoughts.accept(token))
        inside.append(thoughts.is_inside)
    assert inside == [False, False, False, True, True, True, True, True, False, False, False, True, False, False]
    assert [mark for mark in marks if mark] == [(3, 4), (9,)]


def test_a_prompt_may_begin_the_thoughts_or_end_them():
    assert Thoughts(Thinking(mark=(1, 2), ends=((3,),), begin=(5, 1, 2))).is_inside
    assert not Thoughts(Thinking(mark=(1, 2), ends=((3,),), begin=(5, 1, 2, 6, 3))).is_inside


@pytest.mark.parametrize("n_most", [0, 1, 3])
def test_a_model_that_has_thought_enough_says_what_ends_its_thoughts(n_most):
    thinking = Thinking(mark=(1,), ends=((3, 4),), n_most=n_most, closing=(7, 8, 3, 4))
    thoughts, said = Thoughts(thinking), []
    for token in (5, 1, *[6] * 10):
        forced = thoughts.forced
        said.append(token if forced is None else forced)
        thoughts.accept(said[-1])
    assert said == [5, 1, *[6] * n_most, 7, 8, 3, 4, *[6] * (6 - n_most)]
    assert not thoughts.is_inside


def test_thoughts_that_end_by_themselves_are_not_ended():
    thoughts = Thoughts(Thinking(mark=(1,), ends=((3,),), n_most=5, closing=(3,)))
    for token in (1, 6, 3, 6, 6, 6, 6, 6, 6):
        assert thoughts.forced is None
        thoughts.accept(token)


def told(guide: Guide, text: str) -> None:
    for token in tiny.of_bytes(text):
        guide.accept(token)


def allowed(guide: Guide, characters: str) -> str:
    return "".join(character for character in characters if guide.allows(tiny.of_bytes(character)[0]))


def test_a_grammar_holds_from_what_lets_it_begin(make_llama):
    llama = make_llama(tiny.GQA)
    guide = Guide(llama.model, Constraint(grammar='root ::= "<" "ab"+ ">"', patterns=("<",)), None)
    told(guide, "xab>")
    assert allowed(guide, "xab<>") == "xab<>"
    told(guide, "<")
    assert allowed(guide, "xab<>") == "a"
    told(guide, "ab")
    assert allowed(guide, "xab<>") == "a>"
    guide.close()


def test_a_grammar_does_not_begin_within_thoughts(make_llama):
    llama = make_llama(tiny.GQA)
    mark, end = (tuple(tiny.of_bytes(text)) for text in ("(", ")"))
    constraint = Constraint(grammar='root ::= "<>"', patterns=("<",))
    guide = Guide(llama.model, constraint, Thinking(mark=mark, ends=(end,), begin=mark, n_most=4, closing=end))
    told(guide, "a<b")
    assert allowed(guide, "x<>") == "x<>"
    assert guide.forced is None
    told(guide, "<")
    assert guide.forced == end[0]
    told(guide, ")x<")
    assert allowed(guide, "x<>") == ">"
    guide.close()


def test_a_grammar_describes_the_end_of_the_prompt_too(make_llama):
    llama = make_llama(tiny.GQA)
    begin = tuple(tiny.of_bytes("ab"))
    guide = Guide(llama.model, Constraint(grammar='root ::= "abc"', begin=begin), None)
    assert allowed(guide, "abc") == "c"
    guide.close()
    with pytest.raises(ConfigError, match="does not allow the beginning"):
        Sampler(llama, Sampling(constraint=Constraint(grammar='root ::= "axc"', begin=begin)))


def test_what_looked_like_a_call_and_is_none_leaves_the_answer_free(make_llama):
    llama = make_llama(tiny.GQA)
    guide = Guide(llama.model, Constraint(grammar='root ::= "<a>"', patterns=("<",)), None)
    for token in tiny.of_bytes("x<b"):  # as a token does that has more than the mark
        guide.accept(token)
    assert guide.is_free
    assert guide.allows(tiny.of_bytes("z")[0])
    guide.close()
