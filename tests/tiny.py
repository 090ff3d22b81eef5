"""Seeded tiny GGUF models, and the same models in numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np


@dataclass(frozen=True)
class TinyConfig:
    """A llama-architecture model that is small enough to be computed in numpy.

    Query and key weights are scaled up so that attention is peaked: with flat attention every plan looks alike.
    """

    n_layer: int = 3
    n_head: int = 4
    n_head_kv: int = 2
    n_embd_head: int = 32
    n_ff: int = 96
    n_ctx: int = 4096
    qk_scale: float = 1.7
    output_scale: float = 1.0
    seed: int = 7

    @property
    def n_embd(self) -> int:
        return self.n_head * self.n_embd_head

    @property
    def n_vocab(self) -> int:
        return 3 + 256  # <unk>, <s>, </s> and one token a byte


GQA = TinyConfig()
MHA = TinyConfig(n_head_kv=4, seed=8)
# flash attention rounds keys and values to f16: with small attention outputs its error stays out of deeper layers
GQA_QUIET = TinyConfig(output_scale=0.01)
GQA_SOFT = TinyConfig(output_scale=0.1)  # what attention sees still matters, its rounding less
MHA_SOFT = TinyConfig(n_head_kv=4, output_scale=0.1, seed=8)
MHA_QUIET = TinyConfig(n_head_kv=4, output_scale=0.01, seed=8)
WIDE = TinyConfig(n_head=4, n_head_kv=2, n_embd_head=64, seed=9)  # heads of 64: quantized rows are Hadamard-rotated


def weights(config: TinyConfig) -> dict[str, np.ndarray]:
    """float32 tensors by GGUF name, each (out, in)."""
    rng = np.random.default_rng(config.seed)
    n_kv = config.n_head_kv * config.n_embd_head

    def matrix(n_out: int, n_in: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((n_out, n_in)) * scale / np.sqrt(n_in)).astype(np.float32)

    def norm(n: int) -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(n)).astype(np.float32)

    out = {"token_embd.weight": matrix(config.n_vocab, config.n_embd, np.sqrt(config.n_embd))}
    for il in range(config.n_layer):
        out |= {
            f"blk.{il}.attn_norm.weight": norm(config.n_embd),
            f"blk.{il}.attn_q.weight": matrix(config.n_embd, config.n_embd, config.qk_scale),
            f"blk.{il}.attn_k.weight": matrix(n_kv, config.n_embd, config.qk_scale),
            f"blk.{il}.attn_v.weight": matrix(n_kv, config.n_embd),
            f"blk.{il}.attn_output.weight": matrix(config.n_embd, config.n_embd, config.output_scale),
            f"blk.{il}.ffn_norm.weight": norm(config.n_embd),
            f"blk.{il}.ffn_gate.weight": matrix(config.n_ff, config.n_embd),
            f"blk.{il}.ffn_up.weight": matrix(config.n_ff, config.n_embd),
            f"blk.{il}.ffn_down.weight": matrix(config.n_embd, config.n_ff),
        }
    out |= {"output_norm.weight": norm(config.n_embd), "output.weight": matrix(config.n_vocab, config.n_embd)}
    return out


def write(config: TinyConfig, path: Path) -> Path:
    """Write the model as a GGUF file; returns ``path``."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head_kv)
    writer.add_rope_dimension_count(config.n_embd_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.n_vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    writer.add_token_scores([0.0] * config.n_vocab)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256])
    writer.add_add_space_prefix(False)
    for name, tensor in weights(config).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokens(config: TinyConfig, n: int, seed: int = 0) -> list[int]:
    """Seeded token ids without control tokens."""
    return np.random.default_rng(seed).integers(3, config.n_vocab, n).tolist()


@dataclass
class NumpyLlama:
    """The forward pass in float64 with a cache, one token at a time or many.

    ``visible[l]``, if given, is bool ``(n_head_kv, N)``: which of the first N positions head h of layer l may see
    from position N on. It is what compression means, done by masking.
    """

    config: TinyConfig
    visible: list[np.ndarray] | None = None
    k: list[np.ndarray] = field(default_factory=list)
    v: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.w = {name: tensor.astype(np.float64) for name, tensor in weights(self.config).items()}
        shape = (0, self.config.n_head_kv, self.config.n_embd_head)
        self.k = [np.zeros(shape) for _ in range(self.config.n_layer)]
        self.v = [np.zeros(shape) for _ in range(self.config.n_layer)]

    def forward(self, ids: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Append ``ids``; returns logits (n, n_vocab) and for each layer attention (n_head, n, n_kv)."""
        c, w = self.config, self.w
        n, past = len(ids), len(self.k[0])
        positions = np.arange(past, past + n)
        x = w["token_embd.weight"][ids]
        attention = []
        for il in range(c.n_layer):
            h = _rms_norm(x, w[f"blk.{il}.attn_norm.weight"])
            q = _rope((h @ w[f"blk.{il}.attn_q.weight"].T).reshape(n, c.n_head, c.n_embd_head), positions)
            k = _rope((h @ w[f"blk.{il}.attn_k.weight"].T).reshape(n, c.n_head_kv, c.n_embd_head), positions)
            v = (h @ w[f"blk.{il}.attn_v.weight"].T).reshape(n, c.n_head_kv, c.n_embd_head)
            self.k[il] = np.concatenate([self.k[il], k])
            self.v[il] = np.concatenate([self.v[il], v])
            p = self._attend(q, il, positions)
            attention.append(p)
            values = np.repeat(self.v[il], c.n_head // c.n_head_kv, axis=1)
            out = np.einsum("hqk,khd->qhd", p, values).reshape(n, c.n_embd)
            x = x + out @ w[f"blk.{il}.attn_output.weight"].T
            h = _rms_norm(x, w[f"blk.{il}.ffn_norm.weight"])
            gate = h @ w[f"blk.{il}.ffn_gate.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w[f"blk.{il}.ffn_up.weight"].T)) @ w[f"blk.{il}.ffn_down.weight"].T
        return _rms_norm(x, w["output_norm.weight"]) @ w["output.weight"].T, attention

    def truncate(self, n: int) -> None:
        """Forget everything from position ``n`` on."""
        self.k = [k[:n] for k in self.k]
        self.v = [v[:n] for v in self.v]

    def _attend(self, q: np.ndarray, il: int, positions: np.ndarray) -> np.ndarray:
        n_group = self.config.n_head // self.config.n_head_kv
        keys = np.repeat(self.k[il], n_group, axis=1)
        logits = np.einsum("qhd,khd->hqk", q, keys) / np.sqrt(self.config.n_embd_head)
        allowed = np.broadcast_to(np.arange(len(keys))[None, None] <= positions[None, :, None], logits.shape).copy()
        if self.visible is not None:
            kept = np.repeat(self.visible[il], n_group, axis=0)
            late = positions >= kept.shape[1]
            allowed[:, late, : kept.shape[1]] &= kept[:, None]
        logits = np.where(allowed, logits, -np.inf)
        p = np.exp(logits - logits.max(axis=2, keepdims=True))
        return p / p.sum(axis=2, keepdims=True)


def _rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * weight


def _rope(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """llama's own order: pairs of neighbouring elements rotate together."""
    d = x.shape[-1]
    angle = positions[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return out
