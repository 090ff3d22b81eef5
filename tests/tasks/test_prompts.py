"""Prompts of samples, with and without a chat template."""

from __future__ import annotations

from kvcompose_gguf.tasks import prompts
from kvcompose_gguf.tasks.samples import Sample


def sample(context: str = "It is here.", question: str = "\nWhere is it?", prefix: str = " It is ") -> Sample:
    return Sample(
        task="t", index=0, context=context, question=question, answer_prefix=prefix, references=("here",), max_tokens=4,
        metric="string_match_all", n_tokens=9,
    )  # fmt: skip


def text_of(llama, tokens: list[int]) -> str:
    return llama.detokenize(tokens).decode().replace("\u2581", " ")


def test_a_prompt_without_a_template_is_context_and_question(make_llama):
    llama = make_llama()
    assert prompts.chat_frame(llama) == ("", "")
    context, question = prompts.prompt_tokens(llama, sample(), ("", ""))
    assert context == llama.tokenize(b"It is here.", add_bos=True)
    assert text_of(llama, question) == "\nWhere is it? It is"  # no space at the end


def test_a_template_goes_around_both(make_llama):
    llama = make_llama()
    llama.metadata["tokenizer.chat_template"] = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    frame = prompts.chat_frame(llama)
    assert frame == ("<s>[user]", "[end][assistant]")
    context, question = prompts.prompt_tokens(llama, sample(), frame)
    assert context.count(llama.token_bos()) == 1
    assert text_of(llama, context) == "[user]It is here."
    assert text_of(llama, question) == "\nWhere is it?[end][assistant] It is"
