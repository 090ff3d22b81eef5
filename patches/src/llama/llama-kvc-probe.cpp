#include "llama-kvc-cache.h"

#include "llama-graph.h"
#include "llama-hparams.h"

#include "ggml-backend.h"

void llama_kvc::taps_begin(bool queries, bool outputs, uint32_t n_tokens) {
    std::vector<llama_kvc_buffer> q;
    std::vector<llama_kvc_buffer> o;
    if (queries) {
        q = buffers("kvc_queries", [&](int32_t il) {
            return std::make_pair<int64_t, int64_t>(kv.hparams.n_embd_head_k(il)*kv.hparams.n_head(il), n_tokens);
        });
    }
    if (outputs) {
        o = buffers("kvc_outputs", [&](int32_t il) {
            return std::make_pair<int64_t, int64_t>(kv.hparams.n_embd_head_v(il)*kv.hparams.n_head(il), n_tokens);
        });
    }

    tap_queries = std::move(q);
    tap_outputs = std::move(o);

    n_epoch = new_epoch();
}

void llama_kvc::taps_end() {
    tap_queries.clear();
    tap_outputs.clear();

    n_epoch = new_epoch();
}

const ggml_tensor * llama_kvc::tap(uint32_t ikv, bool outputs) const {
    const auto & taps = outputs ? tap_outputs : tap_queries;

    return taps.empty() ? nullptr : taps[ikv].t;
}

// copies the first tokens of src [n_embd_head, n_head, n_tokens], times scale, to dst
static void copy_rows(const llm_graph_context & g, ggml_tensor * src, ggml_tensor * dst, float scale) {
    const int64_t n_embd = dst->ne[0];
    const int64_t n      = std::min(dst->ne[1], src->ne[2]);

    ggml_tensor * rows = ggml_view_3d(g.ctx0, src, src->ne[0], src->ne[1], n, src->nb[1], src->nb[2], 0);

    ggml_tensor * res = ggml_cpy(g.ctx0, rows, ggml_view_2d(g.ctx0, dst, n_embd, n, dst->nb[1], 0));
    if (scale != 1.0f) {
        res = ggml_scale_inplace(g.ctx0, res, scale);
    }
    ggml_build_forward_expand(g.gf, res);
}

// Returns the sums of values [n_embd_head_v, n_head, n_tokens] that cur was made from: latent attention multiplies them by
// another matrix.
static ggml_tensor * find_output(ggml_context * ctx, ggml_tensor * cur, int64_t n_head) {
    for (ggml_tensor * t = cur; t; t = t->src[t->op == GGML_OP_MUL_MAT ? 1 : 0]) {
        if (t->op == GGML_OP_FLASH_ATTN_EXT) {
            return t;
        }
        if (t->op == GGML_OP_MUL_MAT && t->src[1]->op == GGML_OP_SOFT_MAX) {
            return ggml_permute(ctx, t, 0, 2, 1, 3);
        }
    }

    return ggml_reshape_3d(ctx, cur, cur->ne[0]/n_head, n_head, cur->ne[1]);
}

void llama_kvc::copy_taps(const llm_graph_context & g, ggml_tensor * q, ggml_tensor * cur, float kq_scale, uint32_t ikv) const {
    if (!tap_queries.empty()) {
        copy_rows(g, q, tap_queries[ikv].t, kq_scale);
    }
    if (!tap_outputs.empty()) {
        copy_rows(g, find_output(g.ctx0, cur, q->ne[1]), tap_outputs[ikv].t, 1.0f);
    }
}

void llama_kvc::set_bias(uint32_t ikv, const float * bias, uint32_t n_rows) {
    if (biases.empty()) {
        biases = buffers("kvc_bias", [&](int32_t il) {
            return std::make_pair<int64_t, int64_t>(kv.get_size(), kv.hparams.n_head(il));
        });
        n_epoch = new_epoch();
    }

    ggml_tensor * t = biases[ikv].t;

    const int64_t n_group = t->ne[1]/kv.hparams.n_head_kv(kv.layers[ikv].il);
    ggml_backend_buffer_clear(biases[ikv].buf.get(), 0);
    for (int64_t h = 0; h < t->ne[1]; ++h) {
        ggml_backend_tensor_set(t, bias + (h/n_group)*n_rows, h*t->nb[1], n_rows*sizeof(float));
    }
}

void llama_kvc::drop_bias() {
    n_epoch = biases.empty() ? n_epoch : new_epoch();
    biases.clear();
}

ggml_tensor * llama_kvc::bias(ggml_context * ctx, ggml_tensor * kq_b, const ggml_tensor * k, float kq_scale, int32_t il) const {
    if (biases.empty()) {
        return kq_b;
    }

    ggml_tensor * t = biases[ikv_of(il)].t;

    // llama.cpp scales the logits after it has added their bias
    return ggml_scale(ctx, ggml_cont(ctx, ggml_view_3d(ctx, t, k->ne[2], 1, t->ne[1], t->nb[1], t->nb[1], 0)), 1.0f/kq_scale);
}
