#include "llama-kvc-cache.h"

#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-hparams.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <new>

// ggml-cpu-kvc.h: flash attention of our own, which reduces its scores into src[5]
static constexpr int OP_PARAM_AGG     = 8;
static constexpr int OP_PARAM_MAX_KIB = 9;
static constexpr int OP_PARAM_ON      = 10;
static constexpr int SRC_SCORES       = 5;

void llama_kvc::scores_begin(llama_kvc_agg agg, uint32_t n_cells, size_t max_bytes) {
    score_buffers   = side_buffers("kvc_scores", [&](int32_t il) { return std::make_pair<int64_t, int64_t>(n_cells, kv.hparams.n_head(il)); });
    score_agg       = agg;
    score_n_cells   = n_cells;
    score_max_bytes = max_bytes;

    ++n_epoch;
}

void llama_kvc::scores_end() {
    score_n_cells = 0;
    score_buffers.clear();

    ++n_epoch;
}

void llama_kvc::scores_get(uint32_t ikv, float * dst) const {
    const ggml_tensor * acc = score_buffers[ikv].t;

    ggml_backend_tensor_get(acc, dst, 0, ggml_nbytes(acc));
}

// query tokens whose products with all keys of one KV head are within the bound; at most 32 blocks, for each needs nodes
int64_t llama_kvc::score_block(int64_t n_kv, int64_t n_group, int64_t n_tokens) const {
    return std::max<int64_t>((n_tokens + 31)/32, score_max_bytes/(n_kv*n_group*sizeof(float)));
}

// plain host memory, whose buffer type has no device in ggml; pinned memory is of the device that it is pinned for
static bool is_cpu(ggml_backend_buffer_t buffer) {
    const auto dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer));

    return ggml_backend_buffer_is_host(buffer) && (!dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU);
}

size_t llama_kvc::n_extra_nodes(uint32_t n_tokens) const {
    size_t n = 0;
    for (const auto & layer : kv.layers) {
        n += 4 + (tapping() ? 8 : 0) + (biases.empty() ? 0 : 16);
        if (scoring() && (kv.v_trans || is_cpu(layer.k->buffer))) {
            n += 12;
        } else if (scoring()) {
            const int64_t n_head_kv = kv.hparams.n_head_kv(layer.il);
            const int64_t n_block   = score_block(n_alloc, kv.hparams.n_head(layer.il)/n_head_kv, n_tokens);
            n += 20*n_head_kv*((n_tokens + n_block - 1)/n_block);
        }
    }

    return n;
}

// the node with the probabilities that cur was made from
static ggml_tensor * find_attention(ggml_tensor * cur) {
    while (cur && cur->op != GGML_OP_SOFT_MAX && cur->op != GGML_OP_FLASH_ATTN_EXT) {
        cur = cur->src[cur->op == GGML_OP_MUL_MAT ? 1 : 0];
    }

    return cur;
}

// max or sum of p [n_kv, n_tokens, n_rows] over the query tokens into acc [n_cells, n_rows]; returns the new acc
static ggml_tensor * accumulate(ggml_context * ctx, ggml_tensor * p, ggml_tensor * acc, llama_kvc_agg agg) {
    const int64_t n_tokens = p->ne[1];
    const int64_t n_cells  = std::min(p->ne[0], acc->ne[0]);

    ggml_tensor * s = ggml_pool_2d(ctx, p, agg == LLAMA_KVC_AGG_MAX ? GGML_OP_POOL_MAX : GGML_OP_POOL_AVG,
            1, n_tokens, 1, n_tokens, 0, 0); // [n_kv, 1, n_rows]
    if (agg == LLAMA_KVC_AGG_SUM) {
        s = ggml_scale(ctx, s, n_tokens);
    }
    s = ggml_view_2d(ctx, s, n_cells, s->ne[2], s->nb[2], 0);

    ggml_tensor * dst = ggml_view_2d(ctx, acc, n_cells, acc->ne[1], acc->nb[1], 0);

    // ggml has no maximum of two tensors: a + relu(b - a)
    if (agg == LLAMA_KVC_AGG_MAX) {
        s = ggml_relu(ctx, ggml_sub(ctx, s, dst));
    }

    return ggml_cpy(ctx, ggml_add(ctx, dst, s), dst);
}

void llama_kvc::attend(
        const llm_graph_context & g,
        ggml_tensor * cur,
        ggml_tensor * q,
        ggml_tensor * k,
        ggml_tensor * kq_mask,
        ggml_tensor * sinks,
        float         kq_scale,
        int           il) const {
    auto * ctx = g.ctx0;

    const uint32_t ikv = ikv_of(il);

    copy_taps(g, q, cur, kq_scale, ikv);

    ggml_tensor * attention = find_attention(cur);

    const bool own_flash = attention && attention->op == GGML_OP_FLASH_ATTN_EXT && is_cpu(kv.layers[ikv].k->buffer);

    if (own_flash && (scoring() || (fast && q->ne[2] >= fast_n_tokens))) {
        attention->op_params[OP_PARAM_ON] = 1;
        ggml_backend_sched_set_tensor_backend(g.sched, attention, g.backend_cpu);
    }
    if (!scoring()) {
        return;
    }

    ggml_tensor * acc = score_buffers[ikv].t;

    if (own_flash) {
        attention->src[SRC_SCORES] = acc;
        attention->op_params[OP_PARAM_AGG]     = score_agg;
        attention->op_params[OP_PARAM_MAX_KIB] = std::min<size_t>(score_max_bytes/1024, INT32_MAX);

        ggml_build_forward_expand(g.gf, acc);
        return;
    }

    if (attention && attention->op == GGML_OP_SOFT_MAX) {
        ggml_build_forward_expand(g.gf, accumulate(ctx, attention, acc, score_agg));
        return;
    }

    const int64_t n_head_kv = k->ne[1];
    const int64_t n_group   = q->ne[1]/n_head_kv;
    const int64_t n_kv      = k->ne[2];
    const int64_t n_block   = score_block(n_kv, n_group, q->ne[2]);

    // one KV head and a block of query tokens at a time: the next one's matrix takes the place of the last one's
    for (int64_t h = 0; h < n_head_kv; ++h) {
        ggml_tensor * k_h   = ggml_view_2d(ctx, k, k->ne[0], n_kv, k->nb[2], h*k->nb[1]);
        ggml_tensor * acc_h = ggml_view_2d(ctx, acc, acc->ne[0], n_group, acc->nb[1], h*n_group*acc->nb[1]);

        for (int64_t t = 0; t < q->ne[2]; t += n_block) {
            const int64_t n = std::min(n_block, q->ne[2] - t);

            ggml_tensor * q_h  = ggml_view_3d(ctx, q, q->ne[0], n, n_group, q->nb[2], q->nb[1], t*q->nb[2] + h*n_group*q->nb[1]);
            ggml_tensor * mask = ggml_view_2d(ctx, kq_mask, n_kv, n, kq_mask->nb[1], t*kq_mask->nb[1]);

            ggml_tensor * kq = ggml_mul_mat(ctx, k_h, q_h); // [n_kv, n, n_group]
            ggml_prec_set_acc(kq, GGML_PREC_F32);

            if (g.hparams.attn_soft_cap) {
                kq = ggml_scale(ctx, kq, 1.0f/g.hparams.f_attn_logit_softcapping);
                kq = ggml_tanh (ctx, kq);
                kq = ggml_scale(ctx, kq, g.hparams.f_attn_logit_softcapping);
            }

            kq = ggml_soft_max_ext(ctx, kq, mask, kq_scale, 0.0f);
            if (sinks) {
                ggml_soft_max_add_sinks(kq, ggml_view_1d(ctx, sinks, n_group, h*n_group*sinks->nb[0]));
            }

            acc_h = accumulate(ctx, kq, acc_h, score_agg);
            ggml_build_forward_expand(g.gf, acc_h);
        }
    }
}
