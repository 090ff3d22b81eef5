#include "llama-kvc-guard.h"

#include "llama-arch.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kvc-cache.h"
#include "llama-model.h"

static thread_local std::string g_last_error;

const char * llama_kvc_last_error(void) {
    return g_last_error.c_str();
}

namespace llama_kvc_guard {

int32_t report(llama_kvc_status status, const char * what) noexcept {
    try {
        g_last_error = what;
    } catch (...) {
        g_last_error.clear(); // no memory for the message; the status says enough
    }

    return status;
}

void cache::update() const {
    if (kvc().pending()) {
        ctx.synchronize();
        ctx.memory_update(true);
    }
}

[[noreturn]] static void unsupported(const std::string & what) {
    fail(LLAMA_KVC_ERR_UNSUPPORTED, what);
}

static void check_model(const llama_model & model) {
    if (llama_model_is_recurrent(&model)) {
        unsupported("recurrent models have no KV cache");
    }
}

static void check_attention(const llama_model & model) {
    if (model.hparams.use_alibi) {
        unsupported("ALiBi needs one position per cell, a composite has one per head");
    }
    if (model.arch == LLM_ARCH_T5 || model.arch == LLM_ARCH_GROK) {
        unsupported(std::string("attention of architecture ") + llm_arch_name(model.arch) + " has a bias or cap that the scores do not see");
    }
}

static void check_cparams(const llama_cparams & cparams) {
    if (!cparams.causal_attn || cparams.embeddings) {
        unsupported("the context computes embeddings or its attention is not causal");
    }
    if (cparams.n_seq_max != 1) {
        unsupported(format("the context has n_seq_max = %u sequences, 1 is supported", cparams.n_seq_max));
    }
}

cache get_cache(llama_context * ctx) {
    if (!ctx) {
        fail(LLAMA_KVC_ERR_ARGUMENT, "ctx is NULL");
    }
    if (!ctx->get_memory()) {
        unsupported("the context has no KV cache");
    }
    check_model(ctx->get_model());

    auto * kv = llama_kvc_cache(ctx->get_memory());
    if (!kv) {
        unsupported("this model's kind of cache also has an index, or parts that are not known here");
    }
    if (kv->get_layer_ids().empty()) {
        unsupported("every layer has a sliding window, whose cache does not grow");
    }
    check_attention(ctx->get_model());
    check_cparams(ctx->get_cparams());

    const std::string why = kv->kvc_unsupported();
    if (!why.empty()) {
        unsupported(why);
    }

    return { *ctx, *kv };
}

layer get_layer(llama_context * ctx, uint32_t ikv) {
    const cache c = get_cache(ctx);

    const auto ids = c.kv.get_layer_ids();
    if (ikv >= ids.size()) {
        fail(LLAMA_KVC_ERR_ARGUMENT, format("ikv = %u, the cache has %zu layers", ikv, ids.size()));
    }

    const int32_t il = ids[ikv];

    return { c, ikv, il, c.kv.get_k_storage(il), c.kv.get_v_storage(il) };
}

} // namespace llama_kvc_guard
