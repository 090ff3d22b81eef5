"""Seeded tiny models of several architectures, computed in numpy; tiny_gguf.py writes the same models as GGUF files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

RMS_EPS = 1e-5


@dataclass(frozen=True)
class TinyConfig:
    """A model small enough to compute in numpy, by default of the llama architecture.

    Query and key weights are scaled up so that attention is peaked: with flat attention every plan looks alike.
    """

    arch: str = "llama"
    n_layer: int = 3
    n_head: int = 4
    n_head_kv: int = 2
    n_embd_head: int = 32
    n_ff: int = 96
    n_ctx: int = 4096
    qk_scale: float = 1.7
    output_scale: float = 1.0
    seed: int = 7
    # differences between architectures; a feature that is off changes no other weight
    width: int = 0  # n_embd where it is not n_head * n_embd_head
    neox: bool = False  # RoPE rotates the two halves of a head, not neighbouring elements
    rope_base: float = 10000.0
    bias: Literal["none", "qkv", "all"] = "none"
    qk_norm: bool = False
    fused: bool = False  # one tensor of queries, keys and values, one of gate and up: on disk only
    activation: Literal["silu", "gelu", "swiglu_oai"] = "silu"
    n_expert: int = 0
    n_expert_used: int = 0
    post_norm: bool = False  # norms after attention and after the feed-forward network
    tied: bool = False  # the head is the embedding, whose rows are multiplied by sqrt(n_embd) when looked up
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    n_swa: int = 0  # a token sees itself and n_swa - 1 before it, in all but every swa_period-th layer
    swa_period: int = 0
    rope_base_swa: float = 10000.0
    sinks: bool = False  # a logit a head that takes part in the softmax and belongs to no token
    attn_temp_scale: float = 0.0  # queries grow with log(position / n_ctx_orig)
    n_ctx_orig: int = 0

    @property
    def n_embd(self) -> int:
        return self.width or self.n_head * self.n_embd_head

    @property
    def n_vocab(self) -> int:
        return 3 + 256  # <unk>, <s>, </s> and one token a byte

    def is_swa(self, il: int) -> bool:
        """Returns whether layer ``il`` has a sliding window: llama-hparams.cpp, set_swa_pattern."""
        return self.n_swa > 0 and il % self.swa_period < self.swa_period - 1


def of_bytes(text: str) -> list[int]:
    """Returns the tokens of a text, one for each of its bytes. (The tokenizer writes a space as another character.)"""
    return [3 + byte for byte in text.encode()]


GQA = TinyConfig()
MHA = TinyConfig(n_head_kv=4, seed=8)
# flash attention rounds keys and values to f16: with small attention outputs its error stays out of deeper layers
GQA_QUIET = TinyConfig(output_scale=0.01)
GQA_SOFT = TinyConfig(output_scale=0.1)  # what attention sees still matters, its rounding less
MHA_SOFT = TinyConfig(n_head_kv=4, output_scale=0.1, seed=8)
MHA_QUIET = TinyConfig(n_head_kv=4, output_scale=0.01, seed=8)
WIDE = TinyConfig(n_head=4, n_head_kv=2, n_embd_head=64, seed=9)  # heads of 64: quantized rows are Hadamard-rotated

#: models with a numpy twin, by what llama.cpp calls the architecture; mistral and mixtral files are of arch llama
ARCHITECTURES: dict[str, TinyConfig] = {
    "llama": GQA,
    "mistral": TinyConfig(width=96, rope_base=1e6, seed=11),
    "mixtral": TinyConfig(n_expert=4, n_expert_used=2, seed=12),
    "mistral3": TinyConfig("mistral3", attn_temp_scale=0.2, n_ctx_orig=64, seed=13),
    "qwen2": TinyConfig("qwen2", neox=True, bias="qkv", seed=14),
    "qwen3": TinyConfig("qwen3", neox=True, qk_norm=True, rope_base=1e6, seed=15),
    "qwen3moe": TinyConfig("qwen3moe", neox=True, qk_norm=True, n_expert=8, n_expert_used=3, n_ff=48, seed=16),
    "phi3": TinyConfig("phi3", neox=True, fused=True, seed=17),
    "gemma2": TinyConfig(
        "gemma2", n_layer=4, neox=True, activation="gelu", post_norm=True, tied=True, attn_softcap=10.0,
        final_softcap=5.0, n_swa=64, swa_period=2, seed=18,
    ),
    "gemma3": TinyConfig(
        "gemma3", n_layer=6, neox=True, activation="gelu", post_norm=True, tied=True, qk_norm=True, n_swa=64,
        swa_period=3, rope_base=1e6, rope_base_swa=10000.0, seed=19,
    ),
    "gpt-oss": TinyConfig(
        "gpt-oss", n_layer=4, neox=True, activation="swiglu_oai", bias="all", sinks=True, n_expert=4, n_expert_used=2,
        n_swa=64, swa_period=2, seed=20,
    ),
}  # fmt: skip

#: models that llama.cpp runs and that cannot be compressed; their other weights are in tiny_gguf.py
REFUSED: dict[str, TinyConfig] = {
    "bloom": TinyConfig("bloom", n_head_kv=4),  # ALiBi
    "mamba": TinyConfig("mamba"),  # recurrent
}


def weights(config: TinyConfig) -> dict[str, np.ndarray]:
    """Returns float32 tensors by GGUF name, each (out, in) or (expert, out, in); norm, bias, sink (n,) or (expert, n)."""
    c = config
    rng = np.random.default_rng(c.seed)
    n_q, n_kv = c.n_head * c.n_embd_head, c.n_head_kv * c.n_embd_head
    out: dict[str, np.ndarray] = {}

    def matrix(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * scale / np.sqrt(shape[-1])).astype(np.float32)

    def norm(n: int) -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(n)).astype(np.float32)

    def extra(name: str, *shape: int, mean: float = 0.0, std: float = 0.3) -> None:
        own = np.random.default_rng([c.seed, *name.encode()])  # so that no other tensor depends on its being there
        out[name] = (mean + std * own.standard_normal(shape)).astype(np.float32)

    experts, kind = ((c.n_expert,), "_exps") if c.n_expert else ((), "")
    out["token_embd.weight"] = matrix(c.n_vocab, c.n_embd, scale=1.0 if c.tied else np.sqrt(c.n_embd))
    for il in range(c.n_layer):
        blk = f"blk.{il}."
        out |= {
            f"{blk}attn_norm.weight": norm(c.n_embd),
            f"{blk}attn_q.weight": matrix(n_q, c.n_embd, scale=c.qk_scale),
            f"{blk}attn_k.weight": matrix(n_kv, c.n_embd, scale=c.qk_scale),
            f"{blk}attn_v.weight": matrix(n_kv, c.n_embd),
            f"{blk}attn_output.weight": matrix(c.n_embd, n_q, scale=c.output_scale),
            f"{blk}ffn_norm.weight": norm(c.n_embd),
            f"{blk}ffn_gate{kind}.weight": matrix(*experts, c.n_ff, c.n_embd),
            f"{blk}ffn_up{kind}.weight": matrix(*experts, c.n_ff, c.n_embd),
            f"{blk}ffn_down{kind}.weight": matrix(*experts, c.n_embd, c.n_ff),
        }
        if c.n_expert:
            extra(f"{blk}ffn_gate_inp.weight", c.n_expert, c.n_embd, std=2 / np.sqrt(c.n_embd))
        if c.qk_norm:
            for name in ("attn_q_norm", "attn_k_norm"):
                extra(f"{blk}{name}.weight", c.n_embd_head, mean=c.qk_scale, std=0.1 * c.qk_scale)
        if c.post_norm:
            extra(f"{blk}post_attention_norm.weight", c.n_embd, mean=c.output_scale, std=0.1 * c.output_scale)
            # small: llama.cpp rounds gelu to float16, so arguments that differ in float32 may be one step apart
            extra(f"{blk}post_ffw_norm.weight", c.n_embd, mean=0.1, std=0.01)
        if c.bias != "none":
            for name, n in (("attn_q", n_q), ("attn_k", n_kv), ("attn_v", n_kv)):
                extra(f"{blk}{name}.bias", n)
        if c.bias == "all":
            extra(f"{blk}attn_output.bias", c.n_embd)
            extra(f"{blk}ffn_gate_inp.bias", c.n_expert)
            for name, n in (("ffn_gate", c.n_ff), ("ffn_up", c.n_ff), ("ffn_down", c.n_embd)):
                extra(f"{blk}{name}{kind}.bias", *experts, n)
        if c.sinks:
            extra(f"{blk}attn_sinks.weight", c.n_head, mean=6.0, std=1.0)
    out["output_norm.weight"] = norm(c.n_embd)
    if not c.tied:
        out["output.weight"] = matrix(c.n_vocab, c.n_embd)
    return out


def tokens(config: TinyConfig, n: int, seed: int = 0) -> list[int]:
    """Returns seeded token ids without control tokens."""
    return [int(token) for token in np.random.default_rng(seed).integers(3, config.n_vocab, n)]


@dataclass
class NumpyLlama:
    """The forward pass in float64 with a cache, for one token at a time or many.

    ``visible[l]``, if given, is bool ``(n_head_kv, N)``: which of the first N positions head h of layer l may see from
    position N on. This simulates compression by masking. None marks a layer that is not compressed, e.g. one with a
    sliding window. Norms and biases without a tensor are skipped, as in llama.cpp. ``stored`` is the type that keys and
    values are rounded to; llama.cpp's flash attention rounds to float16.
    """

    config: TinyConfig
    visible: list[np.ndarray | None] | None = None
    stored: type = np.float64
    k: list[np.ndarray] = field(default_factory=list)
    v: list[np.ndarray] = field(default_factory=list)
    #: of the latest forward(), for each layer: rotated queries and attention outputs, (n, n_head, n_embd_head)
    q: dict[int, np.ndarray] = field(default_factory=dict)
    o: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.w = {name: tensor.astype(np.float64) for name, tensor in weights(self.config).items()}
        shape = (0, self.config.n_head_kv, self.config.n_embd_head)
        self.k = [np.zeros(shape) for _ in range(self.config.n_layer)]
        self.v = [np.zeros(shape) for _ in range(self.config.n_layer)]

    def forward(self, ids: list[int], gap: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
        """Appends ``ids``; returns logits (n, n_vocab) and for each layer attention (n_head, n, n_kv).

        Args:
            gap: number of positions to skip before them.
        """
        c, w = self.config, self.w
        n, past = len(ids), len(self.k[0]) + gap
        positions = np.arange(past, past + n)
        x = w["token_embd.weight"][ids] * (np.sqrt(c.n_embd) if c.tied else 1)
        attention = []
        for il in range(c.n_layer):
            blk = f"blk.{il}."
            p = self._append(il, self._norm(f"{blk}attn_norm", x), positions)
            attention.append(p)
            values = np.repeat(self.v[il], c.n_head // c.n_head_kv, axis=1)
            self.o[il] = np.einsum("hqk,khd->qhd", p, values)
            out = self._linear(f"{blk}attn_output", self.o[il].reshape(n, -1))
            x = x + self._norm(f"{blk}post_attention_norm", out)
            out = self._feed_forward(blk, self._norm(f"{blk}ffn_norm", x))
            x = x + self._norm(f"{blk}post_ffw_norm", out)
        logits = self._norm("output_norm", x) @ w["token_embd.weight" if c.tied else "output.weight"].T
        return _soft_cap(logits, c.final_softcap), attention

    def truncate(self, n: int) -> None:
        """Removes everything from position ``n`` on."""
        self.k = [k[:n] for k in self.k]
        self.v = [v[:n] for v in self.v]

    def _append(self, il: int, h: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Caches keys and values of ``h`` (n, n_embd); returns the attention of its queries, (n_head, n, n_kv)."""
        c, n, blk = self.config, len(h), f"blk.{il}."
        base = c.rope_base_swa if c.is_swa(il) else c.rope_base
        q = self._linear(f"{blk}attn_q", h).reshape(n, c.n_head, c.n_embd_head)
        k = self._linear(f"{blk}attn_k", h).reshape(n, c.n_head_kv, c.n_embd_head)
        v = self._linear(f"{blk}attn_v", h).reshape(n, c.n_head_kv, c.n_embd_head)
        q = _rope(self._norm(f"{blk}attn_q_norm", q), positions, base, c.neox)
        k = _rope(self._norm(f"{blk}attn_k_norm", k), positions, base, c.neox)
        if c.attn_temp_scale:  # llama-graph.cpp, llm_graph_input_attn_temp
            q = q * (1 + c.attn_temp_scale * np.log(1 + positions // c.n_ctx_orig))[:, None, None]
        self.q[il] = q
        self.k[il] = np.concatenate([self.k[il], k.astype(self.stored)])
        self.v[il] = np.concatenate([self.v[il], v.astype(self.stored)])
        return self._attend(q, il, positions)

    def _attend(self, q: np.ndarray, il: int, positions: np.ndarray) -> np.ndarray:
        c = self.config
        n_group = c.n_head // c.n_head_kv
        keys = np.repeat(self.k[il], n_group, axis=1)
        logits = _soft_cap(np.einsum("qhd,khd->hqk", q, keys) / np.sqrt(c.n_embd_head), c.attn_softcap)
        cached = np.concatenate([np.arange(len(keys) - len(positions)), positions])  # these tokens come after a gap
        distance = positions[:, None] - cached
        allowed = distance >= 0
        if c.is_swa(il):  # llama-hparams.h, is_masked_swa
            allowed &= distance < c.n_swa
        allowed = np.broadcast_to(allowed, logits.shape).copy()
        if self.visible is not None and (visible := self.visible[il]) is not None:
            kept = np.repeat(visible, n_group, axis=0)
            late = positions >= kept.shape[1]
            allowed[:, late, : kept.shape[1]] &= kept[:, None]
        logits = np.where(allowed, logits, -np.inf)
        sink = self.w.get(f"blk.{il}.attn_sinks.weight", np.full(c.n_head, -np.inf))[:, None, None]
        top = np.maximum(logits.max(axis=2, keepdims=True), sink)
        p = np.exp(logits - top)
        return p / (p.sum(axis=2, keepdims=True) + np.exp(sink - top))

    def _feed_forward(self, blk: str, h: np.ndarray) -> np.ndarray:
        c = self.config
        kind = "_exps" if c.n_expert else ""
        gate, up = self._linear(f"{blk}ffn_gate{kind}", h), self._linear(f"{blk}ffn_up{kind}", h)
        out = self._linear(f"{blk}ffn_down{kind}", _activate(c.activation, gate, up))
        if not c.n_expert:
            return out
        # out is (n_expert, n, n_embd), for every expert
        # softmax over all, the best normalized to 1 (qwen3moe) = softmax over the best (gpt-oss)
        router = self._linear(f"{blk}ffn_gate_inp", h)
        worst_used = np.sort(router, axis=1)[:, -c.n_expert_used, None]
        share = np.where(router >= worst_used, np.exp(router - router.max(axis=1, keepdims=True)), 0)
        return np.einsum("ne,end->nd", share / share.sum(axis=1, keepdims=True), out)

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        bias = self.w.get(f"{name}.bias", np.zeros(1))
        return x @ self.w[f"{name}.weight"].swapaxes(-1, -2) + bias[..., None, :]

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        weight = self.w.get(f"{name}.weight")
        return x if weight is None else x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + RMS_EPS) * weight


def _activate(kind: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    if kind == "silu":
        return gate / (1 + np.exp(-gate)) * up
    if kind == "gelu":  # ggml-cpu/vec.h looks it up in a table of float16
        x = gate.astype(np.float16).astype(np.float64)
        gelu = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return gelu.astype(np.float16) * up
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)  # ggml_swiglu_oai
    return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)


def _soft_cap(x: np.ndarray, cap: float) -> np.ndarray:
    return cap * np.tanh(x / cap) if cap else x


def _rope(x: np.ndarray, positions: np.ndarray, base: float, neox: bool) -> np.ndarray:
    d = x.shape[-1]
    angle = positions[:, None] * base ** (-np.arange(0, d, 2) / d)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = (np.s_[..., : d // 2], np.s_[..., d // 2 :]) if neox else (np.s_[..., 0::2], np.s_[..., 1::2])
    out = np.empty_like(x)
    out[a] = x[a] * cos - x[b] * sin
    out[b] = x[a] * sin + x[b] * cos
    return out
