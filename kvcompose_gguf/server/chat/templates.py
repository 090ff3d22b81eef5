"""Chat templates that llama.cpp has by name. Those of models are ``models.templates.ChatTemplate``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...models.templates import TemplateError
from ...native import chat_formats


class BuiltinTemplate:
    """A chat format that llama.cpp has by name (llama_chat_apply_template), for example ``--chat-template llama3``."""

    has_tools = tags_calls = names_parameters = False

    def __init__(self, name: str) -> None:
        self.source = name

    def render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the prompt, as ``ChatTemplate.render`` does. Ignores ``variables``.

        Raises:
            TemplateError: llama.cpp cannot apply the format.
        """
        pairs = [(message["role"], message["content"]) for message in messages]
        prompt = chat_formats.render(self.source, pairs, add_generation_prompt)
        if prompt is None:
            raise TemplateError(f"Failed to apply the chat template {self.source}")
        return prompt
