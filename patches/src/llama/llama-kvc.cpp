#include "llama-kvc.h"

#include "llama-arch.h"
#include "llama-context.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kvc-cache.h"
#include "llama-model.h"
#include "llama-version.h"

#include <algorithm>
#include <exception>
#include <new>

static thread_local std::string g_last_error;

static int32_t fail(llama_kvc_status status, const std::string & what) {
    g_last_error = what;

    return status;
}

// an exception of llama.cpp becomes a status, the caller may not be C++
template <typename F>
static int32_t guarded(F && f) {
    try {
        return f();
    } catch (const std::bad_alloc &) {
        return fail(LLAMA_KVC_ERR_MEMORY, "out of memory");
    } catch (const std::exception & err) {
        return fail(LLAMA_KVC_ERR_INTERNAL, err.what());
    }
}

uint32_t llama_kvc_abi(void) {
    return LLAMA_KVC_ABI;
}

const char * llama_kvc_commit(void) {
    return LLAMA_COMMIT;
}

const char * llama_kvc_last_error(void) {
    return g_last_error.c_str();
}

// the cache of a supported context with its compression state, else a status
static int32_t get_kv(llama_context * ctx, llama_kv_cache ** out) {
    if (!ctx) {
        return fail(LLAMA_KVC_ERR_ARGUMENT, "ctx is NULL");
    }

    const auto unsupported = [](const std::string & what) { return fail(LLAMA_KVC_ERR_UNSUPPORTED, what); };

    const auto & model   = ctx->get_model();
    const auto & hparams = model.hparams;
    const auto & cparams = ctx->get_cparams();

    if (!ctx->get_memory()) {
        return unsupported("the context has no KV cache");
    }
    if (llama_model_is_hybrid(&model) || llama_model_is_recurrent(&model)) {
        return unsupported("recurrent and hybrid models have no plain KV cache");
    }
    if (hparams.is_mla()) {
        return unsupported("multi-head latent attention (MLA) stores no per-head keys");
    }

    auto * kv = llama_kvc_cache(ctx->get_memory());
    if (!kv) {
        return unsupported("this model's kind of cache is neither a plain KV cache nor one with sliding windows");
    }
    if (kv->get_layer_ids().empty()) {
        return unsupported("every layer has a sliding window, whose cache does not grow");
    }
    if (hparams.use_alibi) {
        return unsupported("ALiBi needs one position per cell, a composite has one per head");
    }
    if (hparams.n_pos_per_embd() > 1) {
        return unsupported("positions of more than one dimension (M-RoPE) are not supported");
    }
    if (model.arch == LLM_ARCH_T5 || model.arch == LLM_ARCH_GROK) {
        return unsupported(std::string("attention of architecture ") + llm_arch_name(model.arch) + " has a bias or cap that the scores do not see");
    }
    if (!cparams.causal_attn || cparams.embeddings) {
        return unsupported("the context computes embeddings or its attention is not causal");
    }
    if (cparams.n_seq_max != 1) {
        return unsupported(format("the context has n_seq_max = %u sequences, 1 is supported", cparams.n_seq_max));
    }

    const std::string why = kv->kvc_unsupported();
    if (!why.empty()) {
        return unsupported(why);
    }

    *out = kv;

    return LLAMA_KVC_OK;
}

int32_t llama_kvc_supported(llama_context * ctx) {
    llama_kv_cache * kv = nullptr;

    return guarded([&] { return get_kv(ctx, &kv); });
}

int32_t llama_kvc_get_cache(llama_context * ctx, llama_kvc_cache_info * info, size_t size) {
    return guarded([&]() -> int32_t {
        llama_kv_cache * kv = nullptr;
        if (const int32_t status = get_kv(ctx, &kv)) {
            return status;
        }
        if (!info || size != sizeof(*info)) {
            return fail(LLAMA_KVC_ERR_ARGUMENT, format("llama_kvc_cache_info has %zu bytes here, the caller's has %zu", sizeof(*info), size));
        }

        const auto & kvc = kv->make_kvc();

        *info = {};
        info->n_layer       = kv->get_layer_ids().size();
        info->n_cells       = kv->get_size();
        info->n_cells_alloc = kvc.n_cells_alloc();
        info->n_cells_used  = kvc.n_cells_used();
        info->n_composed    = kvc.n_composed();
        info->scoring       = kvc.scoring();
        if (const auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(ctx->get_memory())) {
            info->n_cells_swa = iswa->get_swa()->get_size();
        }
        for (uint32_t ikv = 0; ikv < info->n_layer; ++ikv) {
            info->n_bytes += kvc.n_bytes(ikv);
        }

        return LLAMA_KVC_OK;
    });
}

// the tensors of cached layer ikv
static int32_t get_layer(llama_context * ctx, uint32_t ikv, llama_kv_cache ** kv, int32_t * il, ggml_tensor ** k, ggml_tensor ** v) {
    if (const int32_t status = get_kv(ctx, kv)) {
        return status;
    }

    const auto ids = (*kv)->get_layer_ids();
    if (ikv >= ids.size()) {
        return fail(LLAMA_KVC_ERR_ARGUMENT, format("ikv = %u, the cache has %zu layers", ikv, ids.size()));
    }

    *il = ids[ikv];
    *k  = (*kv)->get_k_storage(*il);
    *v  = (*kv)->get_v_storage(*il);

    return LLAMA_KVC_OK;
}

int32_t llama_kvc_get_layer(llama_context * ctx, uint32_t ikv, llama_kvc_layer_info * info, size_t size) {
    return guarded([&]() -> int32_t {
        llama_kv_cache * kv = nullptr;
        int32_t il = 0;
        ggml_tensor * k = nullptr;
        ggml_tensor * v = nullptr;
        if (const int32_t status = get_layer(ctx, ikv, &kv, &il, &k, &v)) {
            return status;
        }
        if (!info || size != sizeof(*info)) {
            return fail(LLAMA_KVC_ERR_ARGUMENT, format("llama_kvc_layer_info has %zu bytes here, the caller's has %zu", sizeof(*info), size));
        }

        // the caller may read through the pointers
        ctx->synchronize();

        const auto & hparams = ctx->get_model().hparams;
        const auto & kvc     = kv->make_kvc();
        const bool   is_host = ggml_backend_buffer_is_host(k->buffer);

        *info = {};
        info->il            = il;
        info->n_head        = hparams.n_head(il);
        info->n_head_kv     = hparams.n_head_kv(il);
        info->n_embd_head_k = hparams.n_embd_head_k(il);
        info->n_embd_head_v = hparams.n_embd_head_v(il);
        info->type_k        = k->type;
        info->type_v        = v->type;
        info->v_trans       = kv->is_v_trans();
        info->n_rows        = k->ne[1];
        info->n_rows_used   = kvc.n_rows_used(ikv);
        info->n_bytes       = kvc.n_bytes(ikv);
        info->n_bytes_row   = ggml_row_size(k->type, k->ne[0]) + ggml_row_size(v->type, v->ne[0]);
        info->k             = is_host ? k->data : nullptr;
        info->v             = is_host ? v->data : nullptr;
        info->buffer        = ggml_backend_buffer_name(k->buffer);

        return LLAMA_KVC_OK;
    });
}

// bytes of a layer's tensor: written if src is given, else read to dst
static int32_t move_bytes(llama_context * ctx, uint32_t ikv, int32_t is_v, void * dst, const void * src, size_t offset, size_t size) {
    return guarded([&]() -> int32_t {
        llama_kv_cache * kv = nullptr;
        int32_t il = 0;
        ggml_tensor * k = nullptr;
        ggml_tensor * v = nullptr;
        if (const int32_t status = get_layer(ctx, ikv, &kv, &il, &k, &v)) {
            return status;
        }

        ggml_tensor * t = is_v ? v : k;

        const size_t n_bytes = ggml_nbytes(t);
        if ((!dst && !src) || offset > n_bytes || size > n_bytes - offset) {
            return fail(LLAMA_KVC_ERR_ARGUMENT, format("bytes [%zu, +%zu) of a tensor of %zu", offset, size, n_bytes));
        }

        ctx->synchronize();
        if (src) {
            ggml_backend_tensor_set(t, src, offset, size);
        } else {
            ggml_backend_tensor_get(t, dst, offset, size);
        }

        return LLAMA_KVC_OK;
    });
}

int32_t llama_kvc_get_tensor(llama_context * ctx, uint32_t ikv, int32_t is_v, void * dst, size_t offset, size_t size) {
    return move_bytes(ctx, ikv, is_v, dst, nullptr, offset, size);
}

int32_t llama_kvc_set_tensor(llama_context * ctx, uint32_t ikv, int32_t is_v, const void * src, size_t offset, size_t size) {
    return move_bytes(ctx, ikv, is_v, nullptr, src, offset, size);
}

int32_t llama_kvc_reserve(llama_context * ctx, uint32_t n_cells) {
    return guarded([&]() -> int32_t {
        llama_kv_cache * kv = nullptr;
        if (const int32_t status = get_kv(ctx, &kv)) {
            return status;
        }
        if (n_cells > kv->get_size()) {
            return fail(LLAMA_KVC_ERR_ARGUMENT, format("n_cells = %u, the cache can have %u", n_cells, kv->get_size()));
        }

        auto & kvc = kv->make_kvc();

        kvc.reserve(kvc.composed() ? n_cells : std::min<uint32_t>(kv->get_size(), GGML_PAD(n_cells, 256)));
        if (kvc.pending()) {
            ctx->synchronize();
            ctx->memory_update(true);
        }

        return kvc.n_cells_alloc() >= n_cells ? LLAMA_KVC_OK : fail(LLAMA_KVC_ERR_MEMORY, format("no memory for %u cells", n_cells));
    });
}

int32_t llama_kvc_set_fast_attention(llama_context * ctx, int32_t on) {
    return guarded([&]() -> int32_t {
        llama_kv_cache * kv = nullptr;
        if (const int32_t status = get_kv(ctx, &kv)) {
            return status;
        }

        kv->make_kvc().set_fast(on != 0);

        return LLAMA_KVC_OK;
    });
}

int32_t llama_kvc_scores_begin(llama_context * ctx, int32_t agg, uint32_t n_cells, size_t max_bytes) {
    return guarded([&]() -> int32_t {
        llama_kv_cache * kv = nullptr;
        if (const int32_t status = get_kv(ctx, &kv)) {
            return status;
        }
        if (agg != LLAMA_KVC_AGG_MAX && agg != LLAMA_KVC_AGG_SUM) {
            return fail(LLAMA_KVC_ERR_ARGUMENT, format("agg = %d", agg));
        }

        auto & kvc = kv->make_kvc();

        if (kvc.pending()) { // a composed cache that was cleared since
            ctx->synchronize();
            ctx->memory_update(true);
        }
        if (kvc.composed()) {
            return fail(LLAMA_KVC_ERR_STATE, "the cache is composed, its cells are no single tokens");
        }
        if (kvc.scoring()) {
            return fail(LLAMA_KVC_ERR_STATE, "scoring is on already");
        }
        if (n_cells == 0 || n_cells > kv->get_size()) {
            return fail(LLAMA_KVC_ERR_ARGUMENT, format("n_cells = %u, the cache has %u", n_cells, kv->get_size()));
        }

        ctx->synchronize();
        kvc.scores_begin((llama_kvc_agg) agg, n_cells, max_bytes);
        ctx->kvc_reserve(); // the scheduler has to take larger graphs

        return LLAMA_KVC_OK;
    });
}

int32_t llama_kvc_scores_get(llama_context * ctx, uint32_t ikv, float * dst, size_t n) {
    return guarded([&]() -> int32_t {
        llama_kv_cache * kv = nullptr;
        int32_t il = 0;
        ggml_tensor * k = nullptr;
        ggml_tensor * v = nullptr;
        if (const int32_t status = get_layer(ctx, ikv, &kv, &il, &k, &v)) {
            return status;
        }

        const auto & kvc = kv->make_kvc();
        if (!kvc.scoring()) {
            return fail(LLAMA_KVC_ERR_STATE, "scoring is off");
        }

        const size_t n_want = size_t(ctx->get_model().hparams.n_head(il))*kvc.scores_n_cells();
        if (!dst || n != n_want) {
            return fail(LLAMA_KVC_ERR_ARGUMENT, format("layer %u has %zu scores, the caller wants %zu", ikv, n_want, n));
        }

        ctx->synchronize(); // a decode without outputs may still be running on its device
        kvc.scores_get(ikv, dst);

        return LLAMA_KVC_OK;
    });
}

int32_t llama_kvc_scores_end(llama_context * ctx) {
    return guarded([&]() -> int32_t {
        llama_kv_cache * kv = nullptr;
        if (const int32_t status = get_kv(ctx, &kv)) {
            return status;
        }
        if (kv->make_kvc().scoring()) {
            ctx->synchronize();
            kv->make_kvc().scores_end();
            ctx->kvc_reserve(); // gives the score matrix back
        }

        return LLAMA_KVC_OK;
    });
}

int32_t llama_kvc_taps_begin(llama_context * ctx, int32_t what, uint32_t n_tokens) {
    return guarded([&]() -> int32_t {
        llama_kv_cache * kv = nullptr;
        if (const int32_t status = get_kv(ctx, &kv)) {
            return status;
        }
        if (what <= 0 || (what & ~(LLAMA_KVC_TAP_QUERIES | LLAMA_KVC_TAP_OUTPUTS))) {
            return fail(LLAMA_KVC_ERR_ARGUMENT, format("what = %d", what));
        }
        if (n_tokens == 0 || n_tokens > ctx->get_cparams().n_ubatch) {
            return fail(LLAMA_KVC_ERR_ARGUMENT, format("n_tokens = %u, n_ubatch is %u", n_tokens, ctx->get_cparams().n_ubatch));
        }

        auto & kvc = kv->make_kvc();
        if (kvc.tapping()) {
            return fail(LLAMA_KVC_ERR_STATE, "taps are on already");
        }

        ctx->synchronize();
        kvc.taps_begin(what & LLAMA_KVC_TAP_QUERIES, what & LLAMA_KVC_TAP_OUTPUTS, n_tokens);
        ctx->kvc_reserve();

        return LLAMA_KVC_OK;
    });
}

int32_t llama_kvc_taps_get(llama_context * ctx, uint32_t ikv, int32_t what, float * dst, size_t n) {
    return guarded([&]() -> int32_t {
        llama_kv_cache * kv = nullptr;
        int32_t il = 0;
        ggml_tensor * k = nullptr;
        ggml_tensor * v = nullptr;
        if (const int32_t status = get_layer(ctx, ikv, &kv, &il, &k, &v)) {
            return status;
        }
        if (what != LLAMA_KVC_TAP_QUERIES && what != LLAMA_KVC_TAP_OUTPUTS) {
            return fail(LLAMA_KVC_ERR_ARGUMENT, format("what = %d", what));
        }

        const ggml_tensor * t = kv->make_kvc().tap(ikv, what == LLAMA_KVC_TAP_OUTPUTS);
        if (!t) {
            return fail(LLAMA_KVC_ERR_STATE, "this tap is off");
        }
        // the first tokens are enough for a decode of fewer
        if (!dst || n == 0 || n > (size_t) ggml_nelements(t) || n % t->ne[0]) {
            return fail(LLAMA_KVC_ERR_ARGUMENT, format("layer %u has %lld floats in rows of %lld, the caller wants %zu", ikv, (long long) ggml_nelements(t), (long long) t->ne[0], n));
        }

        ctx->synchronize();
        ggml_backend_tensor_get(t, dst, 0, n*sizeof(float));

        return LLAMA_KVC_OK;
    });
}

int32_t llama_kvc_taps_end(llama_context * ctx) {
    return guarded([&]() -> int32_t {
        llama_kv_cache * kv = nullptr;
        if (const int32_t status = get_kv(ctx, &kv)) {
            return status;
        }
        if (kv->make_kvc().tapping()) {
            ctx->synchronize();
            kv->make_kvc().taps_end();
            ctx->kvc_reserve();
        }

        return LLAMA_KVC_OK;
    });
}

int32_t llama_kvc_set_bias(llama_context * ctx, uint32_t ikv, const float * bias, uint32_t n_rows) {
    return guarded([&]() -> int32_t {
        llama_kv_cache * kv = nullptr;
        int32_t il = 0;
        ggml_tensor * k = nullptr;
        ggml_tensor * v = nullptr;
        if (const int32_t status = get_layer(ctx, ikv, &kv, &il, &k, &v)) {
            return status;
        }

        auto & kvc = kv->make_kvc();

        ctx->synchronize();
        if (!bias) {
            kvc.drop_bias();
            ctx->kvc_reserve(); // gives the matrix back that attention had where it was not fused
            return LLAMA_KVC_OK;
        }
        if (n_rows == 0 || n_rows > kv->get_size()) {
            return fail(LLAMA_KVC_ERR_ARGUMENT, format("n_rows = %u, a layer can have %u", n_rows, kv->get_size()));
        }
        if (ggml_is_quantized(v->type)) {
            return fail(LLAMA_KVC_ERR_UNSUPPORTED, "quantized values need fused attention, which takes no bias");
        }

        const uint64_t epoch = kvc.epoch();
        kvc.set_bias(ikv, bias, n_rows);
        if (kvc.epoch() != epoch) {
            ctx->kvc_reserve();
        }

        return LLAMA_KVC_OK;
    });
}

int32_t llama_kvc_rope(llama_context * ctx, uint32_t ikv, float * rows, uint32_t n_rows, const int32_t * pos, int32_t inverse) {
    return guarded([&]() -> int32_t {
        llama_kv_cache * kv = nullptr;
        int32_t il = 0;
        ggml_tensor * k = nullptr;
        ggml_tensor * v = nullptr;
        if (const int32_t status = get_layer(ctx, ikv, &kv, &il, &k, &v)) {
            return status;
        }
        if (!rows || !pos || n_rows == 0) {
            return fail(LLAMA_KVC_ERR_ARGUMENT, "rows or pos is NULL, or n_rows = 0");
        }
        // which layers rotate is decided by each model's graph, so only those that tests have seen are answered for
        switch (ctx->get_model().arch) {
            case LLM_ARCH_LLAMA:
            case LLM_ARCH_MISTRAL3:
            case LLM_ARCH_QWEN2:
            case LLM_ARCH_QWEN3:
            case LLM_ARCH_QWEN3MOE:
            case LLM_ARCH_PHI3:
            case LLM_ARCH_GEMMA2:
            case LLM_ARCH_GEMMA3:
            case LLM_ARCH_OPENAI_MOE:
                break;
            default:
                return fail(LLAMA_KVC_ERR_UNSUPPORTED, std::string("which layers of architecture ") + llm_arch_name(ctx->get_model().arch) + " rotate their keys is not known");
        }

        kv->make_kvc().rope_rows(*ctx, ikv, rows, n_rows, pos, inverse != 0);

        return LLAMA_KVC_OK;
    });
}

int32_t llama_kvc_compose(
        llama_context    * ctx,
        uint32_t           n_tokens,
        uint32_t           n_layer,
        const uint32_t   * n_kept,
        const int32_t    * cells,
        size_t             n_cells_total,
        uint32_t           n_room,
        llama_kvc_gather_t gather) {
    return guarded([&]() -> int32_t {
        llama_kv_cache * kv = nullptr;
        if (const int32_t status = get_kv(ctx, &kv)) {
            return status;
        }
        if (!n_kept || !cells || !gather) {
            return fail(LLAMA_KVC_ERR_ARGUMENT, "n_kept, cells or gather is NULL");
        }

        const auto & hparams = ctx->get_model().hparams;
        const auto   ids     = kv->get_layer_ids();

        if (n_layer != ids.size()) {
            return fail(LLAMA_KVC_ERR_ARGUMENT, format("n_layer = %u, the cache has %zu layers", n_layer, ids.size()));
        }
        if (n_tokens == 0 || *std::max_element(n_kept, n_kept + n_layer) == 0) {
            return fail(LLAMA_KVC_ERR_ARGUMENT, "nothing to keep: n_tokens or every n_kept is 0");
        }

        auto & kvc = kv->make_kvc();

        const std::string why = kvc.check_compose(n_tokens);
        if (!why.empty()) {
            return fail(LLAMA_KVC_ERR_STATE, why);
        }

        llama_kvc::plan plan = { n_tokens, n_room, { n_kept, n_kept + n_layer }, {}, gather };

        size_t offset = 0;
        for (uint32_t ikv = 0; ikv < n_layer; ++ikv) {
            const int32_t il = ids[ikv];

            if (n_kept[ikv] > n_tokens) {
                return fail(LLAMA_KVC_ERR_ARGUMENT, format("n_kept[%u] = %u of %u tokens", ikv, n_kept[ikv], n_tokens));
            }

            const size_t n = size_t(hparams.n_head_kv(il))*n_kept[ikv];
            if (n > n_cells_total - offset) {
                return fail(LLAMA_KVC_ERR_ARGUMENT, format("cells has %zu entries, layer %u ends at %zu", n_cells_total, ikv, offset + n));
            }

            const int32_t * cur = cells + offset;
            for (size_t i = 0; i < n; ++i) {
                const bool first = i % n_kept[ikv] == 0;
                if (cur[i] < 0 || (uint32_t) cur[i] >= n_tokens || (!first && cur[i] <= cur[i - 1])) {
                    return fail(LLAMA_KVC_ERR_ARGUMENT, format("layer %u: cell %d is not in [0, %u) or not ascending", ikv, cur[i], n_tokens));
                }
            }

            plan.cells.push_back(cur);
            offset += n;
        }
        if (offset != n_cells_total) {
            return fail(LLAMA_KVC_ERR_ARGUMENT, format("cells has %zu entries, n_kept needs %zu", n_cells_total, offset));
        }

        ctx->synchronize();
        ctx->kvc_reserve();
        ctx->sched_reserve(); // frees the compute buffers of a scoring pass before the layers need memory

        // the cache's own way of changing: update() applies the plan, then old graphs are dropped
        kvc.set_plan(std::move(plan));
        try {
            ctx->memory_update(true);
        } catch (...) {
            kvc.drop_plan(); // its arrays are the caller's
            throw;
        }
        kvc.drop_plan();
        ctx->sched_reserve(); // compute buffers for the smaller cache

        return kvc.composed() ? LLAMA_KVC_OK : fail(LLAMA_KVC_ERR_INTERNAL, "the memory update did not compose the cache");
    });
}
