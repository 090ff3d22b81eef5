"""The chat templates of models: Jinja that turns messages into a prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import ConfigError, KVComposeError

CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)

#: the text that Hermes models and Qwen write before a tool call
CALL_BEGIN = "<tool_call>"


class TemplateError(KVComposeError):
    """A chat template refuses the messages, or fails with them."""


class ChatTemplate:
    """A chat template in Jinja, as models contain it.

    Args:
        source: the template's text, or ``"chatml"`` for the ChatML template.
        bos, eos: texts of the tokens that begin and end a text.
        bos_is_added: the tokenizer adds the BOS token, so ``render`` removes it from the text.
    Raises:
        ConfigError: Jinja cannot parse the template.
    """

    def __init__(self, source: str, bos: str = "", eos: str = "", bos_is_added: bool = True) -> None:
        self.source = CHATML if source == "chatml" else source
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._begins_with = bos if bos_is_added else ""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
            undefined=_Nothing,
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template cannot be read: {error}") from error

    @property
    def has_tools(self) -> bool:
        """Whether the template shows tools to the model."""
        return bool(re.search(r"\btools\b", self.source))

    @property
    def tags_calls(self) -> bool:
        """Whether tool calls are between ``<tool_call>`` and ``</tool_call>``. If not, the whole answer is JSON."""
        return CALL_BEGIN in self.source

    @property
    def names_parameters(self) -> bool:
        """Whether a tool call has ``parameters``, as with Llama 3, and not ``arguments``."""
        return '"parameters": ' in self.source and '"arguments": ' not in self.source

    def render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the prompt for ``messages``.

        Args:
            variables: additional variables for the template.
        Raises:
            TemplateError: the template raises an error.
        """
        try:
            known = {"messages": messages, "add_generation_prompt": add_generation_prompt, **self._tokens}
            text = self._template.render({**(variables or {}), **known})
        except Exception as error:  # a template can raise any exception
            raise TemplateError(f"Failed to apply the chat template: {error}") from error
        return text.removeprefix(self._begins_with)


class _Nothing(jinja2.Undefined):
    """An undefined variable: an empty text, also in an addition, as in llama.cpp's own Jinja."""

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __add__


class _GenerationTag(jinja2.ext.Extension):
    """Ignores ``{% generation %}``, which marks the text that a model was trained on."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 expects a class attribute)

    def parse(self, parser: Any) -> Any:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
