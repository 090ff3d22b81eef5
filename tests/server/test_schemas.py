"""Every answer to a JSON schema is JSON, and is what the schema says."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from support import tiny
from support.schemas import SCHEMAS
from support.serving import post

from kvcompose_gguf.server.api.errors import ApiError
from kvcompose_gguf.server.api.grammars import check_grammar, grammar_of
from kvcompose_gguf.server.slots.constraint import Constraint
from kvcompose_gguf.server.slots.sampling import Sampler, Sampling

#: characters that end strings, lists and objects, so that a model of random weights comes to an end
ENDS = '"]}'


def answer(llama: Any, schema: Any, seed: int, n: int = 300) -> str | None:
    """A random answer; None: it had no end after ``n`` characters."""
    grammar = grammar_of(schema)
    check_grammar(grammar)
    closing = [(token, 6.0) for token in range(llama.n_vocab()) if llama.piece(token) in [end.encode() for end in ENDS]]
    llama.reset()
    llama.eval(llama.tokenize(b"JSON: "))
    sampler, said = (
        Sampler(
            llama,
            Sampling(constraint=Constraint(grammar=grammar), seed=seed, temperature=1.0, logit_bias=tuple(closing)),
        ),
        b"",
    )
    for _ in range(n):
        token = sampler.sample().token
        if llama.is_end(token):
            sampler.close()
            return said.decode()
        said += llama.piece(token)
        llama.eval([token])
    sampler.close()
    return None


def test_there_are_two_hundred():
    assert len(SCHEMAS) >= 200
    for schema in SCHEMAS:
        Draft202012Validator.check_schema(schema)


def test_answers_of_a_random_model_are_what_their_schemas_say(make_llama):
    llama, n_whole = make_llama(tiny.GQA), 0
    for number, schema in enumerate(SCHEMAS):
        text = answer(llama, schema, number)
        if text is not None:
            n_whole += 1
            wrong = list(Draft202012Validator(schema).iter_errors(json.loads(text)))
            assert not wrong, (schema, text)
    assert n_whole > 0.9 * len(SCHEMAS)


@pytest.mark.parametrize("pattern", ["^[^x]{3}$", "^.{3}$", "^a.c", "^\\d\\w$", "^x"])
def test_texts_of_patterns_are_json(make_llama, pattern):
    """llama.cpp's classes of "all but these" have line ends and quotes, too."""
    llama, n_whole = make_llama(tiny.GQA), 0
    for seed in range(12):
        text = answer(llama, {"type": "string", "pattern": pattern}, seed, n=600)
        if text is not None:
            n_whole += 1
            assert re.search(pattern, json.loads(text))
    assert n_whole


@pytest.mark.parametrize("pattern", ['^a"$', "^\\n$", "^\\\\$"])
def test_patterns_that_json_escapes_are_refused(pattern):
    with pytest.raises(ApiError, match="JSON escapes"):
        grammar_of({"type": "string", "pattern": pattern})


@pytest.mark.parametrize(
    ("schema", "allowed"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 5}, {1, 2, 3, 4, 5}),
        ({"type": "object", "properties": {"x": {"type": ["string", "null"], "enum": ["a", "b", None]}}, "required": ["x"]}, None),
        ({"$ref": "#/$defs/colour", "$defs": {"colour": {"enum": ["red", "green"]}}}, {"red", "green"}),
    ],
    ids=["bounds", "an-enum-of-several-types", "a-reference-at-the-top"],
)  # fmt: skip
def test_strict_schemas_hold_over_http(start, schema, allowed):
    client = start(chat_template="chatml")
    for seed in range(4):
        form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
        body = post(
            client, "/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}], response_format=form, max_tokens=60,
            seed=seed, temperature=1.5,
        )  # fmt: skip
        value = json.loads(body["choices"][0]["message"]["content"])
        assert value in allowed if allowed is not None else value["x"] in ("a", "b", None)
