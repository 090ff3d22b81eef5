"""Tiny models as GGUF files: metadata, and tensors in llama.cpp's names and layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from support.tiny import RMS_EPS, TinyConfig, weights

Metadata = dict[str, int | float | list[int]]
Shapes = dict[str, tuple[int, ...]]


def write(config: TinyConfig, path: Path) -> Path:
    """Writes the model as a GGUF file; returns ``path``."""
    writer = gguf.GGUFWriter(path, config.arch)
    metadata, tensors = _metadata(config), {}
    if config.arch in _ONLY_LOADED:
        more, shapes = _ONLY_LOADED[config.arch](config)
        metadata |= more
        tensors = _random(config, shapes)
    for name, value in metadata.items():
        key = f"{config.arch}.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    writer.add_token_scores([0.0] * config.n_vocab)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256])
    writer.add_add_space_prefix(False)
    for name, tensor in (tensors or _on_disk(config)).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


#
# models without a numpy twin: metadata and shapes from src/models/*.cpp, arbitrary values
#


def _random(config: TinyConfig, shapes: Shapes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(config.seed)
    out = {}
    for name, shape in shapes.items():
        tensor = rng.standard_normal(shape) / np.sqrt(shape[-1])
        tensor = 1 + tensor if "norm.weight" in name else -np.abs(tensor) if name.endswith("ssm_a") else tensor
        out[name] = tensor.astype(np.float32)
    return out


def _model(config: TinyConfig, layers: list[Shapes], norm: str = "output_norm") -> Shapes:
    out: Shapes = {"token_embd.weight": (config.n_vocab, config.n_embd), f"{norm}.weight": (config.n_embd,)}
    return out | {f"blk.{il}.{name}": shape for il, layer in enumerate(layers) for name, shape in layer.items()}


def _feed_forward(config: TinyConfig) -> Shapes:
    n, n_ff = config.n_embd, config.n_ff
    shapes = {"ffn_gate": (n_ff, n), "ffn_up": (n_ff, n), "ffn_down": (n, n_ff), "ffn_norm": (n,)}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def _bloom(config: TinyConfig) -> tuple[Metadata, Shapes]:
    n, n_ff = config.n_embd, config.n_ff
    matrices = {"attn_qkv": (3 * n, n), "attn_output": (n, n), "ffn_up": (n_ff, n), "ffn_down": (n, n_ff)}
    layer: Shapes = {}
    for name, shape in matrices.items():
        layer |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in ("attn_norm", "ffn_norm"):
        layer |= {f"{name}.weight": (n,), f"{name}.bias": (n,)}
    extra: Shapes = {"token_embd_norm.weight": (n,), "token_embd_norm.bias": (n,), "output_norm.bias": (n,)}
    return {"attention.layer_norm_epsilon": 1e-5}, _model(config, [layer] * config.n_layer) | extra


def _mamba(config: TinyConfig) -> tuple[Metadata, Shapes]:
    n, n_inner, n_state, n_dt, n_conv = config.n_embd, 2 * config.n_embd, 8, 8, 4
    metadata: Metadata = {
        "ssm.conv_kernel": n_conv,
        "ssm.inner_size": n_inner,
        "ssm.state_size": n_state,
        "ssm.time_step_rank": n_dt,
        "attention.head_count": 0,
        "feed_forward_length": 0,
    }
    layer: Shapes = {
        "attn_norm.weight": (n,),
        "ssm_in.weight": (2 * n_inner, n),
        "ssm_conv1d.weight": (n_inner, n_conv),
        "ssm_conv1d.bias": (n_inner,),
        "ssm_x.weight": (n_dt + 2 * n_state, n_inner),
        "ssm_dt.weight": (n_inner, n_dt),
        "ssm_dt.bias": (n_inner,),
        "ssm_a": (n_inner, n_state),
        "ssm_d": (n_inner,),
        "ssm_out.weight": (n, n_inner),
    }
    return metadata, _model(config, [layer] * config.n_layer)


def _deepseek2(config: TinyConfig) -> tuple[Metadata, Shapes]:
    n, n_head, n_q, n_kv, n_rot = config.n_embd, config.n_head, 48, 32, 16
    n_nope = config.n_embd_head - n_rot
    metadata: Metadata = {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": n_q,
        "attention.kv_lora_rank": n_kv,
        "attention.key_length": n_kv + n_rot,
        "attention.value_length": n_kv,
        "attention.key_length_mla": config.n_embd_head,
        "attention.value_length_mla": config.n_embd_head,
        "rope.dimension_count": n_rot,
        "leading_dense_block_count": config.n_layer,
        "expert_feed_forward_length": config.n_ff,
        "expert_shared_count": 0,
    }
    layer: Shapes = _feed_forward(config) | {
        "attn_norm.weight": (n,),
        "attn_q_a.weight": (n_q, n),
        "attn_q_a_norm.weight": (n_q,),
        "attn_q_b.weight": (n_head * config.n_embd_head, n_q),
        "attn_kv_a_mqa.weight": (n_kv + n_rot, n),
        "attn_kv_a_norm.weight": (n_kv,),
        "attn_k_b.weight": (n_head, n_kv, n_nope),
        "attn_v_b.weight": (n_head, config.n_embd_head, n_kv),
        "attn_output.weight": (n, n_head * config.n_embd_head),
    }
    return metadata, _model(config, [layer] * config.n_layer)


_ONLY_LOADED: dict[str, Callable[[TinyConfig], tuple[Metadata, Shapes]]] = {
    "bloom": _bloom,
    "mamba": _mamba,
    "deepseek2": _deepseek2,
}
