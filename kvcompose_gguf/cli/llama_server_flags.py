"""llama-server's command-line flags that ``kvcompose serve`` does not have, so that existing start scripts work."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConfigError

#: flags that change no answer here, with the number of their values
IGNORED = {
    **dict.fromkeys((
        "--mlock", "--mmap", "--no-mmap", "--warmup", "--no-warmup", "-cb", "--cont-batching", "-nocb",
        "--no-cont-batching", "-kvu", "--kv-unified", "-no-kvu", "--no-kv-unified", "--perf", "--no-perf", "--swa-full",
        "--repack", "-nr", "--no-repack", "--no-host", "--check-tensors", "--op-offload", "--no-op-offload", "-kvo",
        "--kv-offload", "--log-disable", "--log-prefix", "--no-log-prefix", "--log-timestamps", "--no-log-timestamps",
        "--log-jsonl", "--no-log-jsonl", "--offline", "-bs", "--backend-sampling", "--cache-idle-slots",
        "--no-cache-idle-slots", "--no-context-shift", "--reuse-port", "--props", "--no-mmproj", "--no-mmproj-auto",
        "--prefill-assistant", "--escape", "-e", "--no-escape", "--webui", "--no-agent", "-no-ag",
        "--reasoning-preserve", "--cors-credentials", "--no-cors-credentials", "--ui-mcp-proxy", "--no-ui-mcp-proxy",
    ), 0),
    **dict.fromkeys((
        "--numa", "--prio", "--prio-batch", "--poll", "--poll-batch", "-C", "--cpu-mask", "-Cr", "--cpu-range",
        "--cpu-strict", "-Cb", "--cpu-mask-batch", "-Crb", "--cpu-range-batch", "--cpu-strict-batch", "--keep", "-dt",
        "--defrag-thold", "-lm", "--load-mode", "-lzm", "--lazy-mode", "-fit", "--fit", "-fitt", "--fit-target",
        "-fitc", "--fit-ctx", "--log-file", "--log-colors", "-lv", "--verbosity", "--log-verbosity", "-ctxcp",
        "--ctx-checkpoints", "--swa-checkpoints", "-cms", "--checkpoint-min-step",
        "--cache-reuse", "--threads-http", "--sse-ping-interval", "-sps", "--slot-prompt-similarity", "--draft",
        "--draft-n", "--draft-max", "--draft-min", "--draft-n-min", "-md", "--model-draft", "--spec-draft-model",
        "-ngld", "--n-gpu-layers-draft", "--spec-type", "--kv-unified-per-slot", "--cors-methods", "--cors-headers",
        "--ui-config", "--ui-config-file", "--log-prompts-dir", "--sleep-idle-seconds", "--media-path",
    ), 1),
}  # fmt: skip

_IN_REQUESTS = "send it in the body of a request"
_NOT_HERE = "this server does not have it"

#: flags that would change answers or addresses, with what to do instead
INSTEAD = {
    **dict.fromkeys(("--grammar", "--grammar-file"), f"grammar: {_IN_REQUESTS}"),
    **dict.fromkeys(("-j", "--json-schema", "-jf", "--json-schema-file"), f"json_schema: {_IN_REQUESTS}"),
    **dict.fromkeys(("--chat-template-kwargs", "--reasoning-budget", "--reasoning-budget-message"), _IN_REQUESTS),
    **dict.fromkeys((
        "-l", "--logit-bias", "--ignore-eos", "--samplers", "--sampling-seq", "--sampler-seq", "--top-nsigma",
        "--top-n-sigma", "--typical", "--typical-p", "--dynatemp-range", "--dynatemp-exp", "--mirostat",
        "--mirostat-lr", "--mirostat-ent", "--embd-normalize", "--reasoning-effort",
    ), _IN_REQUESTS),
    **dict.fromkeys(("-r", "--reverse-prompt"), f"stop: {_IN_REQUESTS}"),
    "--context-shift": "--max-kv-bytes keeps the cache below a size, and forgets the least wanted tokens first",
    **dict.fromkeys(("--lora", "--lora-scaled", "--control-vector", "--control-vector-scaled"), _NOT_HERE),
    **dict.fromkeys(("-mm", "--mmproj", "-mmu", "--mmproj-url"), f"images: {_NOT_HERE}"),
    **dict.fromkeys(("--rerank", "--reranking"), f"reranking: {_NOT_HERE}"),
    **dict.fromkeys(("--embedding", "--embeddings-only"), "--embeddings N, with the longest text's number of tokens"),
    **dict.fromkeys(("--ssl-key-file", "--ssl-cert-file", "--api-prefix", "--path"), "put a reverse proxy before it"),
    **dict.fromkeys(("--models-dir", "--models-preset", "--models-max"), "one server has one model: start several"),
    **dict.fromkeys(("--tools", "--mcp-servers-config", "--mcp-servers-json"), f"tools of its own: {_NOT_HERE}"),
    **dict.fromkeys((
        "--rope-scaling", "--rope-scale", "--rope-freq-base", "--rope-freq-scale", "--yarn-orig-ctx",
        "--yarn-ext-factor", "--yarn-attn-factor", "--yarn-beta-slow", "--yarn-beta-fast", "--override-kv",
    ), "write the values into the model's file, e.g. with the package gguf's gguf_set_metadata.py"),
    **dict.fromkeys(("-mu", "--model-url", "-dr", "--docker-repo"), "download the file, and give it with --model"),
    **dict.fromkeys((
        "-dev", "--device", "-ot", "--override-tensor", "-cmoe", "--cpu-moe", "-ncmoe", "--n-cpu-moe", "-sm",
        "--split-mode", "-ts", "--tensor-split", "-mg", "--main-gpu",
    ), "the layers on devices are chosen with --n-gpu-layers alone"),
    **dict.fromkeys(("-lcs", "--lookup-cache-static", "-lcd", "--lookup-cache-dynamic"), f"lookups: {_NOT_HERE}"),
    **dict.fromkeys((
        "--special", "--spm-infill", "--control-vector-layer-range", "--cache-list", "-cl", "--completion-bash",
        "--tools-runtime",
    ), _NOT_HERE),
    **dict.fromkeys(("--list-devices", "--version"), "kvcompose doctor"),
    **dict.fromkeys(("--rpc", "-ncffn", "--n-cpu-ffn"), "see docs/devices.md"),
    **dict.fromkeys(("-hff", "--hf-file"), "name the file's quantization: --hf-repo USER/MODEL:QUANT"),
    **dict.fromkeys(("-hft", "--hf-token"), "set HF_TOKEN in the environment"),
    "--no-jinja": "templates are always read as Jinja",
    "--skip-chat-parsing": "reasoning_format \"none\" leaves the answer as it is",
}  # fmt: skip

#: the same for all flags that begin so
INSTEAD_OF_ALL = {
    "--spec-": f"speculative decoding: {_NOT_HERE}",
    **dict.fromkeys(("--xtc-", "--dry-", "--adaptive-"), _IN_REQUESTS),
    **dict.fromkeys(("--image-", "--video-", "--mmproj-", "--mtmd-"), f"images: {_NOT_HERE}"),
    **dict.fromkeys(("--fim-", "--gpt-oss-", "--vision-", "--embd-gemma-"), "choose the model with --model"),
    "--lora-": _NOT_HERE, "--models-": "one server has one model: start several",
}  # fmt: skip


def without_llama_servers(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments without the flags of llama-server that have no meaning here, and these flags.

    Raises:
        ConfigError: a flag would change answers; the message says what to use.
    """
    left, ignored, rest = list[str](), list[str](), list(arguments)
    while rest:
        flag, has_value, _ = rest[0].partition("=")
        instead = INSTEAD.get(flag) or next(
            (what for begin, what in INSTEAD_OF_ALL.items() if flag.startswith(begin)), ""
        )
        if instead and flag not in IGNORED:
            raise ConfigError(f"{flag}: {instead}")
        if flag in IGNORED:
            ignored.append(flag)
            del rest[: 1 if has_value else 1 + IGNORED[flag]]
        else:
            left.append(rest.pop(0))
    return left, ignored
