"""A chat as one JSON document, for other programs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from .answers import Answer
from .conversation import Conversation, Memory


def answer_json(answer: Answer, memory: Memory) -> dict[str, Any]:
    """An answer with its times and the memory after it."""
    return {
        "question": answer.question,
        "answer": answer.text.strip(),
        "thoughts": answer.thoughts,
        "end": answer.end,
        "n_prompt": answer.n_prompt,
        "n_tokens": answer.n_tokens,
        "first_seconds": answer.first_seconds,
        "seconds": answer.seconds,
        "tokens_per_second": answer.tokens_per_second,
        "memory": dataclasses.asdict(memory),
    }


def chat_json(conversation: Conversation, answers: list[dict[str, Any]]) -> str:
    """The whole chat as JSON: model, documents, method, the compression's figures, and the answers."""
    report = conversation.report
    figures = None
    if report is not None:
        figures = {
            **{field.name: getattr(report, field.name) for field in dataclasses.fields(report)},
            "compression_ratio": report.compression_ratio,
        }
    document = {
        "model": conversation.llm.model_path,
        "documents": conversation.documents,
        "method": repr(conversation.method),
        "n_ctx": conversation.llm.n_ctx(),
        "report": figures,
        "answers": answers,
    }
    return json.dumps(document, indent=2, default=_plain)


def _plain(value: Any) -> Any:
    """numpy's values as Python's."""
    return value.tolist()
