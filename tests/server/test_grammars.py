"""Grammars and schemas that must not reach llama.cpp, and those that must."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support import tiny

from kvcompose_gguf import ConfigError
from kvcompose_gguf.server.api.errors import ApiError
from kvcompose_gguf.server.api.grammars import check_grammar, grammar_of

GOOD = [
    'root ::= "a"{5,5}', 'root ::= [a-z]+ ("," [a-z]+)* # comment', 'root ::= "a" | "b" |\n  "c"\n', "root ::= x{2} x{1,}\nx ::= .",
    'root ::= item (\n  "," item\n)*\nitem ::= "x" | "(" root ")"', 'root ::= "x" root | ""', 'root ::= "\\"" [^"\\\\]* "\\""',
    'root ::= ("a"? "b")+ [\\]]', "root ::= a\na ::= b\nb ::= [0-9] a?",
]  # fmt: skip
BAD = {
    "repeats backwards": ('root ::= "a"{3,1}', "out of range"), "repeats for ever": ('root ::= "a"{1,99999999}', "out of range"),
    "parentheses": ("root ::= " + "(" * 5000, "parentheses"), "directly": ('root ::= root "a" | "b"', "left-recursive"),
    "behind what may be empty": ('root ::= b root "z" | "x"\nb ::= c\nc ::= "" | "y"', "left-recursive"),
    "by two rules": ('root ::= a\na ::= b "x"\nb ::= a | "y"', "left-recursive"), "in a group": ('root ::= ("a"? root) "b"', "left-recursive"),
    "behind a repetition": ('root ::= "a"{0,2} root', "left-recursive"),
    "a long chain": ("\n".join(["root ::= r0", *(f"r{i} ::= r{i + 1}" for i in range(2000)), 'r2000 ::= "x"']), "begin with each other"),
    "size": ("root ::= " + '"a" ' * 100000, "characters"), "nothing before": ("root ::= *", "nothing before"),
    "no rule": ("root", "expecting a rule"), "open": ('root ::= ("a"', "expecting '\\)'"), "sign": ("root ::= §", "unexpected"),
    "closed": ('root ::= "a")', "unexpected"), "braces": ('root ::= "a"{x}', "is no repetition"),
}  # fmt: skip


@pytest.mark.parametrize("grammar", GOOD)
def test_grammars_that_llama_cpp_reads_may_pass(make_llama, grammar):
    from kvcompose_gguf.server.slots.constraint import Constraint
    from kvcompose_gguf.server.slots.sampling import Sampler, Sampling

    check_grammar(grammar)
    Sampler(make_llama(tiny.GQA), Sampling(constraint=Constraint(grammar=grammar))).close()


@pytest.mark.parametrize("name", BAD)
def test_grammars_that_would_run_away_are_refused(name):
    grammar, words = BAD[name]
    with pytest.raises(ConfigError, match=words):
        check_grammar(grammar)


@pytest.mark.parametrize(
    "schema",
    [
        {}, True, {"type": "string", "maxLength": 10**9}, {"type": "array", "items": {"type": "integer"}, "maxItems": 10**6},
        {"type": "string", "minLength": 2, "maxLength": 400}, {"const": 'C:\\dir "x" 🙂'}, {"enum": ['a"b', "é"]},
        {"type": "object", "properties": {f"p{i}": {"type": "number"} for i in range(60)}},
        {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}}}},
        {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-z]{2,8}$"}]},
    ],
    ids=lambda schema: json.dumps(schema)[:40],
)  # fmt: skip
def test_grammars_of_schemas_may_pass(make_llama, schema):
    from kvcompose_gguf.server.slots.constraint import Constraint
    from kvcompose_gguf.server.slots.sampling import Sampler, Sampling

    grammar = grammar_of(schema)
    check_grammar(grammar)
    Sampler(make_llama(tiny.GQA), Sampling(constraint=Constraint(grammar=grammar))).close()


@pytest.mark.parametrize(
    "schema",
    [
        3, "x", None, {"type": 3}, {"type": "string", "minLength": 10**9}, {"type": "string", "pattern": "^a{1000000000}$"},
        {"type": "string", "pattern": "^a{99999999999999999999999}$"}, {"enum": [[[[]]] * 6000]}, {"$ref": "http://example.com/x"},
    ],
    ids=lambda schema: json.dumps(schema)[:40],
)  # fmt: skip
def test_schemas_that_cannot_be_are_refused(schema):
    with pytest.raises(ApiError, match="JSON schema conversion failed"):
        grammar_of(schema)


def test_a_deep_schema_is_refused():
    schema: dict[str, Any] = {}
    for _ in range(500):
        schema = {"items": schema}
    with pytest.raises(ApiError, match="levels deep"):
        grammar_of(schema)


def test_literals_are_what_json_says(make_llama):
    """The text of a constant, through llama.cpp's grammar, one byte after the other."""
    value = 'C:\\dir "x" 🙂é'
    grammar = grammar_of({"const": value})
    literal = grammar.split("root ::= ")[1].split("\n")[0]
    text = literal[literal.index('"') + 1 : literal.rindex('"')]
    assert json.loads(text.replace('\\"', '"').replace("\\\\", "\\")) == value
