"""Tiny models as GGUF files: metadata, and tensors in llama.cpp's names and layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from support import any_arch
from support.arch_list import REFUSED
from support.gguf_file import write_file
from support.tiny import RMS_EPS, TinyConfig, weights

Metadata = dict[str, int | float | list[int]]


def write(config: TinyConfig, path: Path) -> Path:
    """Writes the model as a GGUF file; returns ``path``."""
    if config.arch in REFUSED:
        return any_arch.write(REFUSED[config.arch][0], path)
    return write_file(path, config.arch, _metadata(config), _on_disk(config))


def _metadata(config: TinyConfig) -> Metadata:
    c = config
    out: Metadata = {
        "context_length": c.n_ctx,
        "embedding_length": c.n_embd,
        "block_count": c.n_layer,
        "feed_forward_length": c.n_ff,
        "attention.head_count": c.n_head,
        "attention.head_count_kv": c.n_head_kv,
        "attention.key_length": c.n_embd_head,
        "attention.value_length": c.n_embd_head,
        "attention.layer_norm_rms_epsilon": RMS_EPS,
        "rope.dimension_count": c.n_embd_head,
        "rope.freq_base": c.rope_base,
        "vocab_size": c.n_vocab,
    }
    if c.n_expert:
        out |= {"expert_count": c.n_expert, "expert_used_count": c.n_expert_used, "expert_feed_forward_length": c.n_ff}
    if c.attn_softcap:
        out["attn_logit_softcapping"] = c.attn_softcap
    if c.final_softcap:
        out["final_logit_softcapping"] = c.final_softcap
    if c.n_swa:
        out |= {"attention.sliding_window": c.n_swa, "attention.sliding_window_pattern": c.swa_period}
        out["rope.freq_base_swa"] = c.rope_base_swa
    if c.attn_temp_scale:
        out |= {"attention.temperature_scale": c.attn_temp_scale, "rope.scaling.original_context_length": c.n_ctx_orig}
    return out


def _on_disk(config: TinyConfig) -> dict[str, np.ndarray]:
    """Returns the weights in the architecture's own layout."""
    out = weights(config)
    for blk in (f"blk.{il}." for il in range(config.n_layer)):
        if config.fused:
            for fused, parts in (("attn_qkv", ("attn_q", "attn_k", "attn_v")), ("ffn_up", ("ffn_gate", "ffn_up"))):
                out[f"{blk}{fused}.weight"] = np.concatenate([out.pop(f"{blk}{part}.weight") for part in parts])
        if config.arch == "gpt-oss":
            out[f"{blk}post_attention_norm.weight"] = out.pop(f"{blk}ffn_norm.weight")
    return out
