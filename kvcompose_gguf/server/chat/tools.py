"""Checks the tools of a chat before llama.cpp gets them."""

from __future__ import annotations

from typing import Any

from ...native.chat_library import ChatTemplate
from ..api.errors import invalid, not_supported
from ..api.grammars import bounded_schema


def check_tools(tools: Any, tool_choice: Any, template: ChatTemplate) -> tuple[list[dict[str, Any]], str]:
    """Returns the tools that may be called, and the choice: ``"auto"``, ``"none"`` or ``"required"``.

    Raises:
        ApiError: the tools do not fit OpenAI's API, or the model's template does not support tools.
    """
    if not tools:
        return [], "none"
    for tool in tools if isinstance(tools, list) else [None]:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid('Failed to parse tools: [{"type": "function", "function": {"name": ...}}] is needed')
    choice = tool_choice or "auto"
    if isinstance(choice, dict):
        function = choice.get("function")
        choice = function.get("name") if isinstance(function, dict) else None
        if choice not in [tool["function"]["name"] for tool in tools]:
            raise invalid(f"Invalid tool_choice: {choice}")
        tools = [tool for tool in tools if tool["function"]["name"] == choice]
        choice = "required"
    if choice not in ("auto", "none", "required"):
        raise invalid(f"Invalid tool_choice: {choice}")
    if not template.caps["supports_tools"]:
        if choice == "none":
            return [], choice
        raise not_supported("tools are not supported: the model's chat template does not use them")
    return [_checked(tool) for tool in tools], choice


def _checked(tool: dict[str, Any]) -> dict[str, Any]:
    function = {name: value for name, value in tool["function"].items() if value is not None}
    if "parameters" in function:
        function["parameters"] = bounded_schema(function["parameters"])
    return {**tool, "function": function}
