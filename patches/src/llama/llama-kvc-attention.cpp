// The functions of llama-kvc.h that look at attention or change it.

#include "llama-kvc.h"

#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kvc-cache.h"
#include "llama-kvc-guard.h"
#include "llama-model.h"

#include "ggml-backend.h"

using namespace llama_kvc_guard;

int32_t llama_kvc_set_fast_attention(llama_context * ctx, int32_t on) {
    return with_cache(ctx, [&](const cache & c) { c.kvc().set_fast(on != 0); });
}

int32_t llama_kvc_skip_to(llama_context * ctx, llama_pos pos) {
    return with_cache(ctx, [&](const cache & c) {
        c.kvc().skip_to(-1);

        const llama_pos last = c.kv.seq_pos_max(0);
        if (pos != -1 && pos <= last) {
            fail(LLAMA_KVC_ERR_ARGUMENT, format("pos = %d, the last token is at %d", pos, last));
        }

        c.kvc().skip_to(pos);
    });
}

int32_t llama_kvc_scores_begin(llama_context * ctx, int32_t agg, uint32_t n_cells, size_t max_bytes) {
    return with_cache(ctx, [&](const cache & c) {
        if (agg != LLAMA_KVC_AGG_MAX && agg != LLAMA_KVC_AGG_SUM) {
            fail(LLAMA_KVC_ERR_ARGUMENT, format("agg = %d", agg));
        }

        c.update(); // a composed cache may have been cleared since

        if (c.kvc().scoring()) {
            fail(LLAMA_KVC_ERR_STATE, "scoring is on already");
        }
        if (n_cells == 0 || n_cells > c.kv.get_size()) {
            fail(LLAMA_KVC_ERR_ARGUMENT, format("n_cells = %u, the cache has %u", n_cells, c.kv.get_size()));
        }

        c.ctx.synchronize();
        c.kvc().scores_begin((llama_kvc_agg) agg, n_cells, max_bytes);
        c.ctx.kvc_reserve(); // graphs become larger
    });
}

int32_t llama_kvc_scores_n_rows(llama_context * ctx, uint32_t ikv, uint32_t * n_rows) {
    return with_layer(ctx, ikv, [&](const layer & l) {
        if (!l.kvc().scoring()) {
            fail(LLAMA_KVC_ERR_STATE, "scoring is off");
        }
        if (!n_rows) {
            fail(LLAMA_KVC_ERR_ARGUMENT, "n_rows is NULL");
        }

        *n_rows = l.kvc().scores_n_rows(ikv);
    });
}

int32_t llama_kvc_scores_get(llama_context * ctx, uint32_t ikv, float * dst, size_t n) {
    return with_layer(ctx, ikv, [&](const layer & l) {
        const auto & kvc = l.kvc();
        if (!kvc.scoring()) {
            fail(LLAMA_KVC_ERR_STATE, "scoring is off");
        }

        const size_t n_want = size_t(l.ctx.get_model().hparams.n_head(l.il))*kvc.scores_n_rows(ikv);
        if (!dst || n != n_want) {
            fail(LLAMA_KVC_ERR_ARGUMENT, format("layer %u has %zu scores, the caller wants %zu", ikv, n_want, n));
        }

        l.ctx.synchronize(); // a decode without outputs may still be running on its device
        kvc.scores_get(ikv, dst);
    });
}

int32_t llama_kvc_scores_end(llama_context * ctx) {
    return with_cache(ctx, [](const cache & c) {
        if (c.kvc().scoring()) {
            c.ctx.synchronize();
            c.kvc().scores_end();
            c.ctx.kvc_reserve(); // gives the memory of the scoring nodes back
        }
    });
}

//
// probes
//

int32_t llama_kvc_taps_begin(llama_context * ctx, int32_t what, uint32_t n_tokens) {
    return with_cache(ctx, [&](const cache & c) {
        if (what <= 0 || (what & ~(LLAMA_KVC_TAP_QUERIES | LLAMA_KVC_TAP_OUTPUTS))) {
            fail(LLAMA_KVC_ERR_ARGUMENT, format("what = %d", what));
        }
        if (n_tokens == 0 || n_tokens > c.ctx.get_cparams().n_ubatch) {
            fail(LLAMA_KVC_ERR_ARGUMENT, format("n_tokens = %u, n_ubatch is %u", n_tokens, c.ctx.get_cparams().n_ubatch));
        }
        if (c.kvc().tapping()) {
            fail(LLAMA_KVC_ERR_STATE, "taps are on already");
        }

        c.ctx.synchronize();
        c.kvc().taps_begin(what & LLAMA_KVC_TAP_QUERIES, what & LLAMA_KVC_TAP_OUTPUTS, n_tokens);
        c.ctx.kvc_reserve();
    });
}

int32_t llama_kvc_taps_get(llama_context * ctx, uint32_t ikv, int32_t what, float * dst, size_t n) {
    return with_layer(ctx, ikv, [&](const layer & l) {
        if (what != LLAMA_KVC_TAP_QUERIES && what != LLAMA_KVC_TAP_OUTPUTS) {
            fail(LLAMA_KVC_ERR_ARGUMENT, format("what = %d", what));
        }

        const ggml_tensor * t = l.kvc().tap(ikv, what == LLAMA_KVC_TAP_OUTPUTS);
        if (!t) {
            fail(LLAMA_KVC_ERR_STATE, "this tap is off");
        }
        // after a decode of fewer tokens the caller may want the first ones only
        if (!dst || n == 0 || n > (size_t) ggml_nelements(t) || n % t->ne[0]) {
            fail(LLAMA_KVC_ERR_ARGUMENT, format("layer %u has %lld floats in rows of %lld, the caller wants %zu", ikv, (long long) ggml_nelements(t), (long long) t->ne[0], n));
        }

        l.ctx.synchronize();
        ggml_backend_tensor_get(t, dst, 0, n*sizeof(float));
    });
}

int32_t llama_kvc_taps_end(llama_context * ctx) {
    return with_cache(ctx, [](const cache & c) {
        if (c.kvc().tapping()) {
            c.ctx.synchronize();
            c.kvc().taps_end();
            c.ctx.kvc_reserve();
        }
    });
}

static void drop_bias(const cache & c) {
    c.ctx.synchronize();
    c.kvc().drop_bias();
    c.ctx.kvc_reserve(); // gives back the memory of attention that was not fused
}

int32_t llama_kvc_set_bias(llama_context * ctx, uint32_t ikv, const float * bias, uint32_t n_rows) {
    return with_layer(ctx, ikv, [&](const layer & l) {
        if (!bias) {
            drop_bias(l);
            return;
        }
        if (n_rows == 0 || n_rows > l.kv.get_size()) {
            fail(LLAMA_KVC_ERR_ARGUMENT, format("n_rows = %u, a layer can have %u", n_rows, l.kv.get_size()));
        }
        if (ggml_is_quantized(l.v ? l.v->type : l.k->type)) {
            fail(LLAMA_KVC_ERR_UNSUPPORTED, "quantized values need fused attention, which takes no bias");
        }

        l.ctx.synchronize();

        const uint64_t epoch = l.kvc().epoch();
        l.kvc().set_bias(ikv, bias, n_rows);
        if (l.kvc().epoch() != epoch) {
            l.ctx.kvc_reserve();
        }
    });
}

int32_t llama_kvc_rope(llama_context * ctx, uint32_t ikv, float * rows, uint32_t n_rows, const int32_t * pos, int32_t inverse) {
    return with_layer(ctx, ikv, [&](const layer & l) {
        if (!rows || !pos || n_rows == 0) {
            fail(LLAMA_KVC_ERR_ARGUMENT, "rows or pos is NULL, or n_rows = 0");
        }
        const std::string why = l.kvc().rope_unknown(ikv);
        if (!why.empty()) {
            fail(LLAMA_KVC_ERR_UNSUPPORTED, "how the keys are rotated is not known: " + why);
        }

        l.kvc().rope_rows(ikv, rows, n_rows, pos, inverse != 0);
    });
}
