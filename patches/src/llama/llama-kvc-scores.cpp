#include "llama-kvc-cache.h"

#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-hparams.h"

#include "ggml-backend.h"

#include <algorithm>

// the parameters of our flash attention, see ggml-cpu-kvc.h, which libllama cannot include
static constexpr int OP_PARAM_AGG     = 8;
static constexpr int OP_PARAM_MAX_KIB = 9;
static constexpr int OP_PARAM_ON      = 10;
static constexpr int SRC_SCORES       = 5;

// ggml's own kernel computes smaller batches, unless they are scored
static constexpr int64_t fast_n_tokens = 16;

// the most blocks of query tokens that a side branch takes for one KV head, because each adds nodes to the graph
static constexpr int64_t max_blocks = 32;

void llama_kvc::scores_begin(llama_kvc_agg agg, uint32_t n_cells, size_t max_bytes) {
    std::vector<uint32_t> n_rows(kv.layers.size());
    for (uint32_t ikv = 0; ikv < n_rows.size(); ++ikv) {
        n_rows[ikv] = n_rows_before(ikv, n_cells);
    }

    std::map<int32_t, llama_kvc_buffer> made;
    for (const auto & [il, ikv] : kv.map_layer_ids) {
        made.emplace(il, llama_kvc_buffer(kv.layers[ikv].k, std::max(1u, n_rows[ikv]), kv.hparams.n_head(il), "kvc_scores", il));
    }

    score_buffers   = std::move(made);
    score_n_rows    = std::move(n_rows);
    score_agg       = agg;
    score_n_cells   = n_cells;
    score_max_bytes = max_bytes;

    n_epoch = new_epoch();
}

void llama_kvc::scores_end() {
    score_n_cells = 0;
    score_buffers.clear();
    score_n_rows.clear();

    n_epoch = new_epoch();
}

void llama_kvc::scores_get(uint32_t ikv, float * dst) const {
    if (score_n_rows[ikv] == 0) {
        return;
    }

    std::vector<float> of_reader;

    for (const auto & [il, buffer] : score_buffers) {
        if (ikv_of(il) != ikv) {
            continue;
        }
        const size_t n = ggml_nelements(buffer.t);

        const bool is_first = of_reader.empty();
        of_reader.resize(n);
        ggml_backend_tensor_get(buffer.t, of_reader.data(), 0, ggml_nbytes(buffer.t));
        for (size_t i = 0; i < n; ++i) {
            dst[i] = is_first ? of_reader[i] : std::max(dst[i], of_reader[i]);
        }
    }
}

// Returns how many query tokens a side branch takes at a time: as many as keep their products with all keys of one KV head
// within score_max_bytes.
int64_t llama_kvc::score_block(int64_t n_kv, int64_t n_group, int64_t n_tokens) const {
    return std::max<int64_t>((n_tokens + max_blocks - 1)/max_blocks, score_max_bytes/(n_kv*n_group*sizeof(float)));
}

// True for plain host memory, whose buffer type has no device in ggml. Pinned memory belongs to its device.
static bool is_cpu(ggml_backend_buffer_t buffer) {
    const auto dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer));

    return ggml_backend_buffer_is_host(buffer) && (!dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU);
}

bool llama_kvc::joins(uint32_t n) {
    const bool more = n > n_joint;
    n_joint = std::max(n_joint, n);

    return more;
}

size_t llama_kvc::n_extra_nodes(uint32_t n_tokens) const {
    size_t n = 0;
    for (const auto & [il, ikv] : kv.map_layer_ids) {
        const auto & layer = kv.layers[ikv];
        n += 4 + 40*n_joint + (tapping() ? 8 : 0) + (biases.empty() ? 0 : 16);
        if (scoring() && (kv.v_trans || is_cpu(layer.k->buffer))) {
            n += 12;
        } else if (scoring()) {
            const int64_t n_head_kv = kv.hparams.n_head_kv(il);
            const int64_t n_block   = score_block(n_alloc, kv.hparams.n_head(il)/n_head_kv, n_tokens);
            n += 20*n_head_kv*((n_tokens + n_block - 1)/n_block);
        }
    }

    return n;
}

// returns the attention node that cur was made from: the probabilities, or fused attention
static ggml_tensor * find_attention(ggml_tensor * cur) {
    while (cur && cur->op != GGML_OP_SOFT_MAX && cur->op != GGML_OP_FLASH_ATTN_EXT) {
        cur = cur->src[cur->op == GGML_OP_MUL_MAT ? 1 : 0];
    }

    return cur;
}

// reduces p [n_kv, n_tokens, n_head] over the query tokens into acc [n_rows, n_head]; returns the node of the new acc
static ggml_tensor * accumulate(ggml_context * ctx, ggml_tensor * p, ggml_tensor * acc, llama_kvc_agg agg) {
    const int64_t n_tokens = p->ne[1];
    const int64_t n_rows   = std::min(p->ne[0], acc->ne[0]);

    ggml_tensor * s = ggml_pool_2d(ctx, p, agg == LLAMA_KVC_AGG_MAX ? GGML_OP_POOL_MAX : GGML_OP_POOL_AVG,
            1, n_tokens, 1, n_tokens, 0, 0); // [n_kv, 1, n_head]
    if (agg == LLAMA_KVC_AGG_SUM) {
        s = ggml_scale(ctx, s, n_tokens);
    }
    s = ggml_view_2d(ctx, s, n_rows, s->ne[2], s->nb[2], 0);

    ggml_tensor * dst = ggml_view_2d(ctx, acc, n_rows, acc->ne[1], acc->nb[1], 0);

    // ggml has no maximum of two tensors: a + relu(b - a)
    if (agg == LLAMA_KVC_AGG_MAX) {
        s = ggml_relu(ctx, ggml_sub(ctx, s, dst));
    }

    return ggml_cpy(ctx, ggml_add(ctx, dst, s), dst);
}

// what attend() gets of one attention
struct llama_kvc::attention {
    ggml_tensor * q;
    ggml_tensor * k;
    ggml_tensor * kq_mask;
    ggml_tensor * sinks;
    float         kq_scale;
};

// Computes the probabilities a second time, because fused attention on a device does not show them. It takes one KV head and
// a block of query tokens at a time, so that the next matrix can reuse the memory of the last one.
void llama_kvc::score_branch(const llm_graph_context & g, const attention & a, ggml_tensor * acc) const {
    auto * ctx = g.ctx0;

    const int64_t n_tokens  = a.q->ne[2];
    const int64_t n_head_kv = a.k->ne[1];
    const int64_t n_group   = a.q->ne[1]/n_head_kv;
    const int64_t n_kv      = a.k->ne[2];
    const int64_t n_block   = score_block(n_kv, n_group, n_tokens);

    for (int64_t h = 0; h < n_head_kv; ++h) {
        ggml_tensor * k     = ggml_view_2d(ctx, a.k, a.k->ne[0], n_kv, a.k->nb[2], h*a.k->nb[1]);
        ggml_tensor * acc_h = ggml_view_2d(ctx, acc, acc->ne[0], n_group, acc->nb[1], h*n_group*acc->nb[1]);

        for (int64_t t = 0; t < n_tokens; t += n_block) {
            const int64_t n = std::min(n_block, n_tokens - t);

            ggml_tensor * q    = ggml_view_3d(ctx, a.q, a.q->ne[0], n, n_group, a.q->nb[2], a.q->nb[1], t*a.q->nb[2] + h*n_group*a.q->nb[1]);
            ggml_tensor * mask = ggml_view_2d(ctx, a.kq_mask, n_kv, n, a.kq_mask->nb[1], t*a.kq_mask->nb[1]);

            ggml_tensor * kq = ggml_mul_mat(ctx, k, q); // [n_kv, n, n_group]
            ggml_prec_set_acc(kq, GGML_PREC_F32);

            if (g.hparams.attn_soft_cap) {
                kq = ggml_scale(ctx, kq, 1.0f/g.hparams.f_attn_logit_softcapping);
                kq = ggml_tanh (ctx, kq);
                kq = ggml_scale(ctx, kq, g.hparams.f_attn_logit_softcapping);
            }

            kq = ggml_soft_max_ext(ctx, kq, mask, a.kq_scale, 0.0f);
            if (a.sinks) {
                ggml_soft_max_add_sinks(kq, ggml_view_1d(ctx, a.sinks, n_group, h*n_group*a.sinks->nb[0]));
            }

            acc_h = accumulate(ctx, kq, acc_h, score_agg);
            ggml_build_forward_expand(g.gf, acc_h);
        }
    }
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
    const uint32_t ikv = ikv_of(il);

    if ((int32_t) kv.layers[ikv].il == il) { // of layers that share their rows, the one that writes them
        note_rope(q, ikv);
        copy_taps(g, q, cur, kq_scale, ikv);
    }

    ggml_tensor * node = find_attention(cur);

    const bool fused_on_cpu = node && node->op == GGML_OP_FLASH_ATTN_EXT && is_cpu(kv.layers[ikv].k->buffer);

    if (fused_on_cpu && (scoring() || (fast && q->ne[2] >= fast_n_tokens))) {
        node->op_params[OP_PARAM_ON] = 1;
        ggml_backend_sched_set_tensor_backend(g.sched, node, g.backend_cpu);
    }
    if (!scoring()) {
        return;
    }

    ggml_tensor * acc = score_buffers.at(il).t;

    if (fused_on_cpu) { // our kernel collects the scores itself
        node->src[SRC_SCORES] = acc;
        node->op_params[OP_PARAM_AGG]     = score_agg;
        node->op_params[OP_PARAM_MAX_KIB] = std::min<size_t>(score_max_bytes/1024, INT32_MAX);

        ggml_build_forward_expand(g.gf, acc);
    } else if (node && node->op == GGML_OP_SOFT_MAX) { // the graph has the probabilities
        ggml_build_forward_expand(g.gf, accumulate(g.ctx0, node, acc, score_agg));
    } else {
        score_branch(g, { q, k, kq_mask, sinks, kq_scale }, acc);
    }
}
