"""Routes about the server: health, properties, models, metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from ...native.model_info import model_info
from ..api.errors import invalid, not_supported
from ..api.state import brief_settings
from ..server import Serving
from ..slots.steps import Generation

router = APIRouter()


@router.get("/health")
@router.get("/v1/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/props")
async def props(server: Serving) -> dict[str, Any]:
    options = server.options
    bos, eos = (server.reader.text(token) for token in (server.llama.token_bos(), server.llama.token_eos()))
    return {
        "default_generation_settings": {
            "params": brief_settings(Generation(tokens=(), sampling=options.sampling)),
            "n_ctx": server.llama.n_ctx(),
        },
        "total_slots": len(server.engine.slots), "model_alias": options.model_name,
        "model_path": str(options.model_path),
        "modalities": {"vision": False, "video": False, "audio": False}, "media_marker": "",
        "endpoint_slots": options.endpoint_slots, "endpoint_props": False,
        "endpoint_metrics": options.endpoint_metrics, "ui": options.ui, "ui_settings": {},
        "chat_template": server.template.source, "chat_template_caps": server.template.caps,
        "bos_token": bos, "eos_token": eos,
        "build_info": server.fingerprint, "is_sleeping": False, "cors_proxy_enabled": False,
        "kv_compress": repr(options.method) if options.method is not None else None,
    }  # fmt: skip


@router.post("/props")
async def post_props() -> None:
    raise not_supported("This server does not support changing global properties.")


@router.get("/models")
@router.get("/v1/models")
async def models(server: Serving) -> dict[str, Any]:
    options, llama = server.options, server.llama
    model = model_info(llama.model)
    meta = {
        "vocab_type": model.vocab_type, "n_vocab": llama.n_vocab(), "n_ctx": llama.n_ctx(),
        "n_ctx_train": llama.n_ctx_train, "n_embd": llama.n_embd(), "n_params": model.n_params,
        "size": model.n_bytes, "ftype": model.description,
    }  # fmt: skip
    details = {
        "parent_model": "", "format": "gguf", "family": "", "families": [""], "parameter_size": "",
        "quantization_level": "",
    }  # fmt: skip
    name = options.model_name
    return {
        "models": [{
            "name": name, "model": name, "modified_at": "", "size": "", "digest": "", "type": "model",
            "description": "", "tags": [""], "capabilities": ["completion"], "parameters": "", "details": details,
        }],
        "object": "list",
        "data": [{
            "id": name, "aliases": options.aliases, "tags": options.all_tags, "object": "model",
            "created": server.created, "owned_by": "llamacpp", "meta": meta,
        }],
    }  # fmt: skip


@router.get("/metrics", response_class=Response)
async def metrics(server: Serving) -> Response:
    if not server.options.endpoint_metrics:
        raise not_supported("This server does not support metrics endpoint. Start it with `--metrics`")
    start = {"Process-Start-Time-Unix": str(server.created_us)}
    return Response(server.metrics.text(), media_type="text/plain; version=0.0.4", headers=start)


@router.get("/lora-adapters")
async def lora_adapters() -> list[dict[str, Any]]:
    """An empty list: this server does not load LoRA adapters."""
    return []


@router.post("/lora-adapters")
async def scale_lora_adapters(adapters: list[Any]) -> dict[str, bool]:
    if adapters:
        raise invalid("this server has no LoRA adapters: send an empty list")
    return {"success": True}
