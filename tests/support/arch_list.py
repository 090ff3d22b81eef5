"""Every architecture of the pinned llama.cpp, with the metadata of its tiny model, by what compression can do with it."""

from __future__ import annotations

from typing import Any

from support.any_arch import N_HEAD, N_HEAD_KV, AnyArch

Metadata = dict[str, Any]

_HEADS: Metadata = {
    "attention.head_count": [N_HEAD, 0, N_HEAD, 0],
    "attention.head_count_kv": [N_HEAD_KV, 0, N_HEAD_KV, 0],
}
_ALL_HEADS: Metadata = {"attention.head_count_kv": N_HEAD}
_DELTA_NET: Metadata = {"ssm.inner_size": 128}
_NEMOTRON: Metadata = {**_HEADS, "feed_forward_length": [0, 0, 0, 96]}
_WINDOWS: Metadata = {"attention.sliding_window": 32, "attention.sliding_window_pattern": 2}
_WINDOWS_LISTED: Metadata = {
    "attention.sliding_window": 32,
    "attention.sliding_window_pattern": [True, False, True, False],
}
_LATENT: Metadata = {
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 64,
    "attention.key_length": 96,
    "attention.value_length": 64,
    "attention.head_count_kv": 1,
    "rope.dimension_count": 32,
    "attention.key_length_mla": 64,
    "attention.value_length_mla": 32,
    "expert_weights_scale": 1.0,
}
_KIMI: Metadata = {**_LATENT, **_HEADS, "attention.head_count_kv": [1, 0, 1, 0], "kda.head_dim": 32}
_HYPER: Metadata = {
    "hyper_connection.count": 4,
    "hyper_connection.epsilon": 1e-6,
    "hyper_connection.magnitude": 1.0,
    "hyper_connection.sinkhorn_iterations": 2,
}
_INDEXED: Metadata = {
    "attention.indexer.head_count": 4,
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 64,
}
#: latent projections, but keys and values of every head in the cache
_UNFOLDED: Metadata = {
    **_LATENT,
    "attention.head_count_kv": N_HEAD,
    "attention.key_length": 64,
    "attention.value_length": 32,
}


def _list(*archs: AnyArch) -> dict[str, AnyArch]:
    return {arch.name: arch for arch in archs}


#: recurrent layers beside those with attention, positions of several dimensions, layers that read another's rows, latent
#: attention, whose rows have no values
SPECIAL = _list(
    AnyArch("deepseek2", _LATENT),
    AnyArch("mistral4", _LATENT),
    AnyArch("hy_v4", {**_LATENT, **_HYPER}),  # a file of it with an index is refused, as those below
    AnyArch("kimi-linear", _KIMI),
    AnyArch(
        "kimi-k3",
        {**_KIMI, "attn_res.block_size": 2, "activation.situ_beta": 1.0, "activation.situ_linear_beta": 1.0},
    ),
    AnyArch("bailingmoe3", {**_KIMI, "kda.gate_lower_bound": -5.0}),
    AnyArch("qwen3next", _DELTA_NET),
    AnyArch("qwen35", _DELTA_NET),
    AnyArch("qwen35moe", _DELTA_NET),
    AnyArch("granitehybrid", _HEADS),
    AnyArch("lfm2", _HEADS),
    AnyArch("lfm2moe", _HEADS),
    AnyArch("nemotron_h", _NEMOTRON),
    AnyArch("nemotron_h_moe", _NEMOTRON),
    AnyArch("falcon-h1"),
    AnyArch("jamba", _HEADS),
    AnyArch("plamo2", {**_HEADS, "ssm.group_count": 0}),
    AnyArch("minimax-01"),
    AnyArch("qwen2vl"),
    AnyArch("qwen3vl"),
    AnyArch("qwen3vlmoe"),
    AnyArch("paddleocr"),
    AnyArch(
        "gemma3n",
        {**_WINDOWS, "block_count": 22, "embedding_length": 64, "attention.head_count": 2, "attention.head_count_kv": 1},
        owners={21: 19},
    ),
    AnyArch(
        "gemma4",
        {
            "attention.sliding_window": 32, "attention.sliding_window_pattern": [True, False] * 3, "block_count": 6,
            "attention.shared_kv_layers": 2, "embedding_length_per_layer_input": 16, "attention.key_length_swa": 32,
            "attention.value_length_swa": 32, "rope.freq_base_swa": 10000.0, "expert_count": 0, "expert_used_count": 0,
        },
        owners={5: 3},
    ),
)  # fmt: skip

#: caches of keys and values for every head, perhaps with sliding windows in other layers
PLAIN = _list(
    *map(
        AnyArch,
        [
            "llama", "deci", "falcon", "gpt2", "gptneox", "baichuan", "starcoder", "stablelm", "qwen", "qwen2",
            "qwen2moe", "qwen3", "qwen3moe", "phi2", "phi3", "phimoe", "plamo", "plamo3", "codeshell", "orion",
            "internlm2", "minicpm", "gemma", "gemma3", "starcoder2", "xverse", "command-r", "olmo", "olmo2", "openelm",
            "arctic", "deepseek", "chatglm", "glm4", "glm4moe", "bitnet", "jais", "jais2", "nemotron", "exaone",
            "exaone4", "granite", "granitemoe", "bailingmoe", "bailingmoe2", "arcee", "ernie4_5", "ernie4_5-moe",
            "hunyuan-moe", "hunyuan-dense", "hunyuan_vl", "hy_v3", "smollm3", "smallthinker", "seed_oss", "grovemoe",
            "minimax-m2", "cogvlm", "pangu-embedded", "mistral3", "maincoder", "talkie", "mellum", "nanbeige",
        ],
    ),
    *(
        AnyArch(name, _WINDOWS)
        for name in ("llama4", "gemma2", "cohere2", "exaone-moe", "gpt-oss", "afmoe", "laguna")
    ),
    *(
        AnyArch(name, _WINDOWS_LISTED)
        for name in ("cohere2moe", "muse-glimmer", "granite_swa", "mimo2", "step35", "spark2_5")
    ),
    *(AnyArch(name, _ALL_HEADS) for name in ("olmoe", "dots1", "deepseek2-ocr")),
    AnyArch("minicpm3", _UNFOLDED),
    AnyArch("plm", {**_LATENT, **_ALL_HEADS}),
    AnyArch("maple", {**_WINDOWS_LISTED, "swiglu_clamp_exp": 7.0}),
    AnyArch("dbrx", {"attention.clamp_kqv": 8.0}),
    AnyArch("hrm_text", {"block_count": 6, "hrm.layers_per_stack": 1, "hrm.h_cycles": 2, "hrm.l_cycles": 2}),
    AnyArch(
        "apertus",
        {f"xielu.{name}": [1.0] * 4 for name in ("alpha_n", "alpha_p", "beta")} | {"xielu.eps": [1e-7] * 4},
    ),
)  # fmt: skip

COMPRESSED = SPECIAL | PLAIN

#: refused, and a word of the sentence that says why
REFUSED: dict[str, tuple[AnyArch, str]] = {
    "bloom": (AnyArch("bloom"), "ALiBi"),
    "mpt": (AnyArch("mpt", {"attention.max_alibi_bias": 8.0}), "ALiBi"),
    "refact": (AnyArch("refact"), "ALiBi"),
    "grok": (AnyArch("grok"), "grok"),
    "mamba": (AnyArch("mamba"), "recurrent"),
    "mamba2": (AnyArch("mamba2"), "recurrent"),
    **{
        name: (AnyArch(name, {**_INDEXED, **more}), "index")
        for name, more in {
            "deepseek32": _LATENT,
            "glm-dsa": _LATENT,
            "dots3note": {
                **_LATENT,
                **_WINDOWS_LISTED,
                "attention.kv_lora_rank_swa": 64,
                "attention.key_length_mla_swa": 64,
                "attention.value_length_mla_swa": 32,
                "rope.freq_base_swa": 10000.0,
                "attention.indexer.types": [True] * 4,
            },
            "minimax-m3": {"attention.indexer.block_size": 32, "attention.indexer.local_blocks": 1},
            "qwen4exp": {
                **_DELTA_NET,
                **_HYPER,
                "hyper_connection.low_rank": 16,
                "rope.dimension_sections": [8, 4, 4, 0],
            },
            "glm5-next": {
                **_KIMI,
                **_HYPER,
                "kda.gate_lower_bound": -5.0,
                "attention.indexer.kpool": 2,
                "rope.dimension_count": 0,
                "attention.key_length": 64,
                "attention.key_length_mla": 32,
            },
            "deepseek4": {
                **_HYPER,
                "attention.sliding_window": 32,
                "attention.q_lora_rank": 32,
                "attention.head_count_kv": 1,
                "expert_weights_scale": 1.0,
                "expert_weights_norm": True,
                "expert_gating_func": 4,
                "swiglu_clamp_exp": 7.0,
                "attention.output_group_count": 2,
                "attention.output_lora_rank": 32,
                "attention.compress_rope_freq_base": 10000.0,
                "hash_layer_count": 0,
                "attention.compress_ratios": [0, 4, 0, 4],
            },
        }.items()
    },
    **{name: (AnyArch(name), "no KV cache") for name in ("dream", "llada", "llada-moe", "rnd1")},
}

_RECURRENT = "recurrent, as mamba is"
_NO_TEXT = "no generation of text: an encoder, a part of another model, or a voice"

#: not tried with a model, and why
NOT_TRIED: dict[str, str] = {
    **dict.fromkeys(("rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"), _RECURRENT),
    **dict.fromkeys(
        (
            "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3",
            "eurobert", "gemma-embedding", "llama-embed", "t5", "t5encoder", "clip", "eagle3", "dflash",
            "gemma4-assistant", "wavtokenizer-dec", "qwen3tts", "pockettts",
        ),
        _NO_TEXT,
    ),
    **dict.fromkeys(("gptj", "chameleon"), "llama.cpp itself does not run it to the end"),
    "graniteswitch": "its router layer needs adapters, for which there is no tiny model",
}  # fmt: skip

#: architectures of COMPRESSED whose contexts decode one at a time: sliding windows, recurrent layers, latent attention, M-RoPE
NOT_JOINT = {
    "afmoe", "bailingmoe3", "cohere2", "cohere2moe", "deepseek2", "exaone-moe", "falcon-h1", "gemma2", "gemma3n",
    "gemma4", "glm4", "glm4moe", "gpt-oss", "granite_swa", "granitehybrid", "hunyuan_vl", "hy_v4", "jamba",
    "kimi-k3", "kimi-linear", "laguna", "lfm2", "lfm2moe", "llama4", "maple", "mimo2", "minimax-01", "mistral4",
    "muse-glimmer", "nemotron_h", "nemotron_h_moe", "paddleocr", "plamo2", "qwen2vl", "qwen35", "qwen35moe",
    "qwen3next", "qwen3vl", "qwen3vlmoe", "spark2_5", "step35",
}  # fmt: skip
