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
    "attention.key_length": 80,
    "attention.value_length": 64,
    "attention.head_count_kv": 1,
    "rope.dimension_count": 16,
    "attention.key_length_mla": 48,
    "attention.value_length_mla": 32,
    "expert_weights_scale": 1.0,
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


#: recurrent layers beside those with attention, positions of several dimensions, layers that read another's rows
SPECIAL = _list(
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
    *(AnyArch(name, _ALL_HEADS) for name in ("olmoe", "dots1")),
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
    "deepseek2": (AnyArch("deepseek2", _LATENT), "MLA"),
    "mistral4": (AnyArch("mistral4", _LATENT), "MLA"),
    "kimi-linear": (
        AnyArch("kimi-linear", {**_LATENT, **_HEADS, "attention.head_count_kv": [1, 0, 1, 0], "kda.head_dim": 32}),
        "MLA",
    ),
    **{name: (AnyArch(name), "no KV cache") for name in ("dream", "llada", "llada-moe", "rnd1")},
}

_RECURRENT = "recurrent, as mamba is"
_LATENT_TOO = "latent attention, as deepseek2 has"
_INDEX = "its cache has an index beside it (sparse attention), a kind of memory that is refused"
_NO_TEXT = "no generation of text: an encoder, a part of another model, or a voice"

#: not tried with a model, and why
NOT_TRIED: dict[str, str] = {
    **dict.fromkeys(("rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"), _RECURRENT),
    **dict.fromkeys(("deepseek2-ocr", "kimi-k3", "bailingmoe3"), _LATENT_TOO),
    **dict.fromkeys(
        ("deepseek32", "deepseek4", "glm-dsa", "glm5-next", "dots3note", "hy_v4", "minimax-m3", "qwen4exp"), _INDEX
    ),
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
