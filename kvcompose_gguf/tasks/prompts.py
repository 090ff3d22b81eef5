"""Converts samples to tokens in the model's chat format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .ruler import make_sample
from .samples import Sample
from .texts import Texts

if TYPE_CHECKING:
    from ..llama import Llama

_MARK = "\x02user\x02"


def chat_frame(llama: Llama) -> tuple[str, str]:
    """Returns the chat template's text before and after a user message; two empty texts without a template."""
    template = llama.metadata.get("tokenizer.chat_template")
    if not template:
        return "", ""
    from ..native import library

    formatter = library.load().llama_chat_format.Jinja2ChatFormatter(
        template, eos_token=_piece(llama, llama.token_eos()), bos_token=_piece(llama, llama.token_bos())
    )
    before, _, after = formatter(messages=[{"role": "user", "content": _MARK}]).prompt.partition(_MARK)
    return before, after


def sample_for(
    llama: Llama, task: str, n_tokens: int, index: int, seed: int, texts: Texts, depth: float | None = None
) -> Sample:
    """Returns sample ``index`` of a task, as long as fits into ``n_tokens`` of the model's tokens (``make_sample``)."""
    return make_sample(
        task, n_tokens, index, seed, lambda text: len(llama.tokenize(text.encode(), add_bos=False)), texts, depth=depth
    )


def prompt_tokens(llama: Llama, sample: Sample, frame: tuple[str, str]) -> tuple[list[int], list[int]]:
    """Returns the tokens of the context, and the tokens after it.

    The two parts are tokenized separately, because the context is compressed alone. A trailing space of the answer
    prefix is dropped: word tokens start with their own space.
    """
    before, after = frame
    text = before + sample.context
    if llama.adds_bos:
        text = text.removeprefix(_piece(llama, llama.token_bos()))
    context = llama.tokenize(text.encode(), add_bos=True, special=True)
    question = f"{sample.question}{after}{sample.answer_prefix}".rstrip(" ")
    return context, llama.tokenize(question.encode(), add_bos=False, special=True)


def _piece(llama: Llama, token: int) -> str:
    return llama.detokenize([token], special=True).decode("utf-8", errors="replace") if token >= 0 else ""
