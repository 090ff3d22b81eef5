"""Makes prompts for /infill, where the middle of a text is missing (format_prompt_infill in server-common.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...native.model_info import infill_token
from ..slots.slot_llama import SlotLlama
from .errors import invalid, not_supported
from .reader import Reader

#: separates files, for models without a token for that
SNIPPET = "\n\n--- snippet ---\n\n"


def infill_prompt(
    llama: SlotLlama, reader: Reader, prefix: str, suffix: str, extra: Sequence[Any], prompt: str, n_predict: int
) -> tuple[int, ...]:
    """Returns the tokens of a prompt with the text before and after the gap, and as much of other files as fits.

    Args:
        prefix, suffix: the text before and after the gap.
        extra: other files, each ``{"filename", "text"}``.
        prompt: the beginning of the missing text.
        n_predict: maximum number of tokens to generate.
    Raises:
        ApiError: the model has no infill tokens, or ``extra`` is invalid.
    """
    fim = {name: infill_token(llama.model, name) for name in ("pre", "suf", "mid", "rep", "sep")}
    names = {"pre": "prefix", "suf": "suffix", "mid": "middle"}
    if missing := [f"{name} token is missing. " for short, name in names.items() if fim[short] is None]:
        raise not_supported(f"Infill is not supported by this model: {''.join(missing)}")

    def tokens(text: str) -> list[int]:
        return list(reader.tokens(text, special=False, begin=False))

    before = [] if fim["rep"] is None else [fim["rep"], *tokens("myproject\n")]
    for name, text in map(_checked, extra):
        before += tokens(SNIPPET) if fim["sep"] is None else [fim["sep"], *tokens(f"{name}\n")]
        before += tokens(text)
    if fim["sep"] is not None:
        before += [fim["sep"], *tokens("filename\n")]

    begun, quarter = tokens(prompt), llama.n_batch // 4
    left, right = tokens(prefix)[-3 * quarter :], tokens(suffix)[: max(0, quarter - 2 - len(begun))]
    n_before = max(0, llama.n_ctx() - llama.n_batch - 2 * max(0, n_predict))
    bos = [llama.token_bos()] if llama.adds_bos else []
    whole = [
        *before[max(0, len(before) - n_before) :], *bos, fim["pre"], *left, *begun, fim["suf"], *right, fim["mid"]
    ]  # fmt: skip
    return tuple(int(token) for token in whole if token is not None)


def _checked(chunk: Any) -> tuple[str, str]:
    if not isinstance(chunk, dict):
        raise invalid('"input_extra" must be an array of {"filename": string, "text": string}')
    text, name = chunk.get("text"), chunk.get("filename", "tmp")
    if not isinstance(text, str):
        raise invalid('extra_context chunk must contain a "text" field with a string value')
    if not isinstance(name, str):
        raise invalid('extra_context chunk\'s "filename" field must be a string')
    return name, text
