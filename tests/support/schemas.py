"""Two hundred JSON schemas, of the keywords that llama.cpp converts."""

from __future__ import annotations

import itertools
from typing import Any

STRING, INTEGER = {"type": "string", "maxLength": 6}, {"type": "integer", "minimum": -9, "maximum": 99}


def _object(required: tuple[str, ...] = (), more: Any = False, **properties: Any) -> dict[str, Any]:
    out: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": more}
    return out | ({"required": list(required)} if required else {})


def _numbers() -> list[dict[str, Any]]:
    pairs = [(1, 5), (0, 9), (-3, 3), (10, 99), (7, 7), (-100, -50), (1, 12), (1900, 2099), (0, 255), (-1, 1000)]
    out: list[dict[str, Any]] = [{"type": "integer", "minimum": low, "maximum": high} for low, high in pairs]
    out += [
        {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high} for low, high in pairs if high - low > 1
    ]
    return [
        *out,
        {"type": "integer", "minimum": 5, "maximum": 5},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "number"},
    ]


def _strings() -> list[dict[str, Any]]:
    lengths: list[dict[str, Any]] = [
        {"type": "string", "minLength": a, "maxLength": a + b} for a, b in itertools.product((0, 1, 3, 8), (0, 2, 5))
    ]
    patterns = [
        "^[a-z]{2,5}$", "^\\d{3}-\\d{4}$", "^(red|green|blue)$", "^#[0-9a-f]{6}$", "^[A-Z][a-z]*$", "^a?b+c{2}$", "^[^\"\\\\]{3}$",
        "^(ab|cd){2}$", "^x\\.y$", "^[0-9]+\\.[0-9]{2}$",
    ]  # fmt: skip
    formats = ["date", "time", "date-time", "uuid"]
    return [
        *lengths, *({"type": "string", "pattern": pattern} for pattern in patterns),
        *({"type": "string", "format": form} for form in formats),
    ]  # fmt: skip


def _values() -> list[Any]:
    values: list[Any] = ["a", "", 'say "x"', "C:\\dir", "é🙂", "\n\t", 3, -2.5, True, None, [1, "a"], {"k": [1]}]
    return [
        *({"const": value} for value in values), *({"enum": values[n : n + 3]} for n in range(len(values) - 2)),
        {"type": ["string", "null"], "enum": ["a", "b", None]}, {"type": ["integer", "null"]}, {"type": ["boolean", "null"]},
    ]  # fmt: skip


def _arrays() -> list[dict[str, Any]]:
    items: list[Any] = [INTEGER, STRING, {"type": "boolean"}, {"enum": ["x", "y"]}, _object(("n",), n=INTEGER)]
    bounds = [{"maxItems": 2}, {"minItems": 1, "maxItems": 3}, {"minItems": 2, "maxItems": 2}, {"maxItems": 0}]
    out = [{"type": "array", "items": item, **bound} for item, bound in itertools.product(items, bounds)]
    nested = {"type": "array", "items": {"type": "array", "items": INTEGER, "maxItems": 2}, "maxItems": 2}
    return [
        *out,
        nested,
        {"type": "array", "prefixItems": [INTEGER, {"type": "boolean"}], "minItems": 2, "maxItems": 2},
    ]


def _objects() -> list[dict[str, Any]]:
    fields: dict[str, Any] = {
        "name": STRING, "age": INTEGER, "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}, "ok": {"type": "boolean"},
        "a b": {"const": 1}, 'quote"d': {"type": "null"}, "é": {"enum": [1, 2]},
    }  # fmt: skip
    out = []
    for n in (1, 2, 3):
        for names in itertools.islice(itertools.combinations(fields, n), 18):
            chosen = {name: fields[name] for name in names}
            out += [_object(tuple(chosen), **chosen), _object(tuple(chosen)[:1], **chosen)]
    deep = _object(("in",), **{"in": _object(("x",), x=_object(("y",), y=INTEGER))})
    return [*out, deep, _object((), **fields)]


def _joined() -> list[dict[str, Any]]:
    parts = [INTEGER, {"type": "boolean"}, {"const": "x"}, _object(("a",), a=INTEGER), {"type": "null"}]
    pairs = list(itertools.combinations(parts, 2))
    tree = {
        "$defs": {"tree": _object(("v",), v=INTEGER, l={"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]})},
        "$ref": "#/$defs/tree",
    }
    colour = {"$ref": "#/$defs/colour", "$defs": {"colour": {"enum": ["red", "green"]}}}
    reused = {**_object(("a", "b"), a={"$ref": "#/$defs/n"}, b={"$ref": "#/$defs/n"}), "$defs": {"n": INTEGER}}
    both = {"allOf": [_object(("a",), True, a=INTEGER), _object(("b",), True, b={"type": "boolean"})]}
    return [
        *({"anyOf": list(pair)} for pair in pairs),
        *({"oneOf": list(pair)} for pair in pairs),
        tree,
        colour,
        reused,
        both,
    ]


def all_schemas() -> list[Any]:
    return [*_numbers(), *_strings(), *_values(), *_arrays(), *_objects(), *_joined()]


SCHEMAS = all_schemas()
