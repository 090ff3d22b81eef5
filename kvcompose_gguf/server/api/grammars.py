"""Checks grammars, and makes grammars of JSON schemas, before llama.cpp gets them.

llama-grammar.cpp recurses for every parenthesis and every chain of rules, expands repetitions without a limit, and
detects only direct left recursion. An exception or a stack overflow there would end the process.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

from ...errors import ConfigError
from ...native import chat_library
from .errors import invalid

#: limits of a grammar: characters, nested parentheses, rules, counted repetitions
MAX_CHARS, MAX_DEPTH, MAX_RULES, MAX_REPEAT = 1 << 18, 450, 20000, 1000

#: limits of a schema: values, nesting, counted repetitions (a longer maximum is treated as none)
MAX_VALUES, MAX_SCHEMA_DEPTH, MAX_COUNT = 5000, 60, 400

TOKENS = re.compile(
    r"""(?P<space>[ \t]+|\#[^\n]*)|(?P<newline>\r?\n)|(?P<define>::=)|(?P<name>[a-zA-Z0-9-]+)
    |(?P<text>"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|\.|!?<(?:[^>\\]|\\.)*>)|(?P<braces>\{[^}]*\})|(?P<sign>[()|*+?])""",
    re.VERBOSE | re.DOTALL,
)
BRACES = re.compile(r"\{\s*(\d+)\s*(?:(,)\s*(\d*)\s*)?\}")

#: part of an alternative: the name of a rule (None: a text), and whether its own operator lets it be empty
Item = tuple[str | None, bool]
Alternatives = list[list[Item]]


def check_grammar(grammar: str) -> None:
    """Check the size, the repetitions and the left recursion of a grammar. llama.cpp reports other mistakes itself.

    Raises:
        ConfigError: llama.cpp could not handle ``grammar``.
    """
    if len(grammar) > MAX_CHARS:
        raise ConfigError(f"failed to parse grammar: it has more than {MAX_CHARS} characters")
    rules = _Parser(grammar).rules()
    if len(rules) > MAX_RULES:
        raise ConfigError(f"failed to parse grammar: it has more than {MAX_RULES} rules")
    nullable = _nullable(rules)
    edges = {name: _first_rules(alternatives, nullable) for name, alternatives in rules.items()}
    _check_chains(edges)


class _Parser:
    """Parses as much of GBNF as is needed to find the rules that can be first in a rule."""

    def __init__(self, grammar: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(grammar):
            found = TOKENS.match(grammar, at)
            if found is None:
                raise ConfigError(f"failed to parse grammar: unexpected {grammar[at : at + 20]!r}")
            if found.lastgroup != "space":
                self._tokens.append((str(found.lastgroup), found[0]))
            at = found.end()
        self._at = 0
        self._rules: dict[str, Alternatives] = {}

    def rules(self) -> dict[str, Alternatives]:
        """Returns all rules by name. A group is a rule with the name ``(``n."""
        rules = self._rules
        while self._at < len(self._tokens):
            if self._peek() == "newline":
                self._at += 1
                continue
            if self._peek() != "name" or self._peek(1) != "define":
                raise ConfigError(f"failed to parse grammar: expecting a rule at {self._tokens[self._at][1]!r}")
            name = self._tokens[self._at][1]
            self._at += 2
            rules[name] = self._alternatives(0)
            if self._at < len(self._tokens) and self._peek() != "newline":
                raise ConfigError(f"failed to parse grammar: unexpected {self._tokens[self._at][1]!r}")
        return rules

    def _peek(self, n: int = 0) -> str:
        at = self._at + n
        return self._tokens[at][0] if at < len(self._tokens) else ""

    def _alternatives(self, depth: int) -> Alternatives:
        if depth > MAX_DEPTH:
            raise ConfigError(f"failed to parse grammar: more than {MAX_DEPTH} nested parentheses")
        found: Alternatives = [[]]
        while self._at < len(self._tokens):
            kind, text = self._tokens[self._at]
            if kind == "sign" and text == ")":
                break
            if kind == "newline" and not depth and self._ends_rule():
                break
            self._at += 1
            if kind == "name":
                found[-1].append((text, False))
            elif kind == "text":
                found[-1].append((None, text == '""'))
            elif text == "(":
                name = f"({self._at}"
                self._rules[name] = self._alternatives(depth + 1)
                found[-1].append((name, False))
                if self._at >= len(self._tokens):
                    raise ConfigError("failed to parse grammar: expecting ')'")
                self._at += 1
            elif text == "|":
                found.append([])
            elif kind == "braces" or text in "*+?":
                self._repeat(found[-1], text)
        return found

    def _ends_rule(self) -> bool:
        """Returns whether a newline ends the rule: not before or after ``|``, and not after ``::=``."""
        following = next((token for token in self._tokens[self._at :] if token[0] != "newline"), ("", ""))
        return following[1] != "|" and self._tokens[self._at - 1][1] not in ("|", "::=")

    def _repeat(self, items: list[Item], text: str) -> None:
        if not items:
            raise ConfigError(f"failed to parse grammar: nothing before {text!r}")
        what, may_be_empty = items.pop()
        if text.startswith("{"):
            found = BRACES.fullmatch(text)
            if found is None:
                raise ConfigError(f"failed to parse grammar: {text!r} is no repetition")
            least, most = int(found[1]), int(found[3] or found[1])
            if max(least, most) > MAX_REPEAT or (found[3] and most < least):
                raise ConfigError(
                    f"failed to parse grammar: {text!r} is out of range, at most {MAX_REPEAT} are counted"
                )
            may_be_empty |= least == 0
        else:
            may_be_empty |= text in "*?"
        items.append((what, may_be_empty))


def _nullable(rules: dict[str, Alternatives]) -> set[str]:
    """Returns the rules that can match the empty text."""
    users: dict[str, set[str]] = {}
    for name, alternatives in rules.items():
        for what, _ in itertools.chain(*alternatives):
            if what is not None:
                users.setdefault(what, set()).add(name)
    nullable: set[str] = set()
    left = list(rules)
    while left:
        name = left.pop()
        if name in nullable or name not in rules:
            continue
        if any(all(empty or what in nullable for what, empty in alternative) for alternative in rules[name]):
            nullable.add(name)
            left += users.get(name, ())
    return nullable


def _first_rules(alternatives: Alternatives, nullable: set[str]) -> set[str]:
    """Returns the rules that can be first in these alternatives."""
    found: set[str] = set()
    for alternative in alternatives:
        for what, empty in alternative:
            if what is not None:
                found.add(what)
            if not empty and what not in nullable:
                break
    return found


def _check_chains(edges: dict[str, set[str]]) -> None:
    """Raise ConfigError if a rule can begin with itself, or if a chain of first rules is too long."""
    depth: dict[str, int] = {}
    for start in edges:
        path: list[tuple[str, Any]] = [(start, iter(edges[start]))] if start not in depth else []
        on_path = {start}
        while path:
            name, following = path[-1]
            child = next((one for one in following if one in edges and one not in depth), None)
            if child is not None:
                if child in on_path:
                    raise ConfigError(f"failed to parse grammar: {child} is left-recursive")
                path.append((child, iter(edges[child])))
                on_path.add(child)
                continue
            depth[name] = 1 + max((depth.get(one, 0) for one in edges[name]), default=0)
            if depth[name] > MAX_DEPTH:
                raise ConfigError(f"failed to parse grammar: more than {MAX_DEPTH} rules begin with each other")
            path.pop()
            on_path.discard(name)


#
# JSON schemas
#


def grammar_of(schema: Any) -> str:
    """Returns a GBNF grammar for a JSON schema.

    Raises:
        ApiError: the schema is invalid, or cannot be converted.
    """
    bounded = bounded_schema(schema)
    try:
        return json_safe(chat_library.grammar_of_schema({"type": "object"} if bounded in ({}, True) else bounded))
    except ConfigError as error:
        raise invalid(f"JSON schema conversion failed:\n{error}") from error


#: rules of JSON strings in the grammars of chats; other rules describe text around the JSON
JSON_RULES = re.compile(r"(dot|char|string|json-string|double-quoted-string|.*response-format.*|.*-schema.*) ::= ")
#: a text, or a class of all characters but some
EXCEPT = re.compile(r'"(?:[^"\\]|\\.)*"|\[\^(?:[^\]\\]|\\.)*\]')


def json_safe(grammar: str, is_chat: bool = False) -> str:
    """Returns llama.cpp's grammar of a schema without the characters that cannot be in a JSON string as they are.

    Its classes of "all characters but some" allow quotes, backslashes and control characters.

    Args:
        is_chat: the grammar has rules of other texts, too.
    """

    def safe(rule: str) -> str:
        if is_chat and not JSON_RULES.match(rule):
            return rule
        return EXCEPT.sub(lambda found: found[0][:-1] + '"\\\\\\x00-\\x1F]' if found[0][0] == "[" else found[0], rule)

    return "\n".join(map(safe, grammar.split("\n")))


def plain_pattern(pattern: str) -> str:
    """Returns a regular expression that llama.cpp's converter knows: anchored, and without \\d and \\w.

    Raises:
        ConfigError: it has characters that JSON escapes.
    """
    bare = re.sub(r"\[\^(?:[^\]\\]|\\.)*\]", "", pattern)
    if re.search(r'["\x00-\x1f]|\\["ntrfv\\]', bare):
        raise ConfigError(f"pattern={pattern[:40]!r} has characters that JSON escapes: no grammar can say that")
    out, in_class = "", False
    for part in re.findall(r"\\.|.", pattern, re.DOTALL):
        in_class = part == "[" or (in_class and part != "]")
        digits = {"\\d": "0-9", "\\w": "A-Za-z0-9_"}.get(part)
        out += part if digits is None else digits if in_class else f"[{digits}]"
    begins, ends = out.startswith("^"), out.endswith("$") and not out.endswith("\\$")
    inner = out[begins : len(out) - ends]
    if (begins and ends) or re.search(r"(?<!\\)[$]|(?<![\\\[])\^", inner):
        return out
    return f"^{'' if begins else '.*'}(?:{inner}){'' if ends else '.*'}$"


def bounded_schema(schema: Any) -> Any:
    """Returns a JSON schema without long maxima, which llama.cpp would expand one by one.

    Raises:
        ApiError: it is no schema, too large or too deep, or has a minimum or a pattern that is too long.
    """
    if not isinstance(schema, (dict, bool)):
        raise invalid(f"JSON schema conversion failed:\n{json.dumps(schema)[:100]} is not a schema")
    try:
        return _bounded(schema, [0])
    except ConfigError as error:
        raise invalid(f"JSON schema conversion failed:\n{error}") from error


def _bounded(value: Any, n_seen: list[int], depth: int = 0) -> Any:
    n_seen[0] += 1
    if n_seen[0] > MAX_VALUES or depth > MAX_SCHEMA_DEPTH:
        raise ConfigError(f"it has more than {MAX_VALUES} values, or is more than {MAX_SCHEMA_DEPTH} levels deep")
    if isinstance(value, list):
        return [_bounded(item, n_seen, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    out = {}
    for name, item in value.items():
        is_count = isinstance(item, int) and not isinstance(item, bool) and item > MAX_COUNT
        if name in ("maxLength", "maxItems") and is_count:
            continue
        if name in ("minLength", "minItems") and is_count:
            raise ConfigError(f"{name}={item} is more than {MAX_COUNT}")
        if name == "pattern" and isinstance(item, str):
            if len(item) > MAX_COUNT or any(int(n) > MAX_COUNT for n in re.findall(r"\d+", item) if len(n) < 20):
                raise ConfigError(f"pattern={item[:40]!r} is too long, or counts beyond {MAX_COUNT}")
            if re.search(r"\d{20}", item):
                raise ConfigError(f"pattern={item[:40]!r} counts beyond {MAX_COUNT}")
            item = plain_pattern(item)
        out[name] = _bounded(item, n_seen, depth + 1)
    return out
