#include "llama-kvc-cache.h"

#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-hparams.h"

#include <algorithm>

void llama_kvc::scores_begin(llama_kvc_agg agg, uint32_t n_cells) {
    score_agg     = agg;
    score_n_cells = n_cells;
    score_n_query = 0;

    score_offs.assign(1, 0);
    for (const auto & layer : kv.layers) {
        score_offs.push_back(score_offs.back() + size_t(kv.hparams.n_head(layer.il))*n_cells);
    }
    score_data.assign(score_offs.back(), 0.0f);

    ++n_epoch;
}

void llama_kvc::scores_end() {
    score_n_cells = 0;
    score_data.clear();
    score_data.shrink_to_fit();

    ++n_epoch;
}

size_t llama_kvc::n_extra_nodes() const {
    size_t n = 0;
    for (const auto & layer : kv.layers) {
        n += 4 + (scoring() ? 10*kv.hparams.n_head_kv(layer.il) : 0);
    }

    return n;
}

void llama_kvc::build_scores(
        const llm_graph_context & g,
        ggml_tensor * q,
        ggml_tensor * k,
        ggml_tensor * kq_mask,
        ggml_tensor * sinks,
        float         kq_scale,
        int           il) const {
    auto * ctx = g.ctx0;

    const int64_t n_head_kv = k->ne[1];
    const int64_t n_group   = q->ne[1]/n_head_kv;
    const int64_t n_kv      = k->ne[2];
    const int64_t n_tokens  = q->ne[2];

    // one KV head at a time: the matrix is n_kv*n_tokens*n_group floats, and the next head takes its place
    for (int64_t h = 0; h < n_head_kv; ++h) {
        ggml_tensor * k_h = ggml_view_2d(ctx, k, k->ne[0], n_kv,              k->nb[2],           h*k->nb[1]);
        ggml_tensor * q_h = ggml_view_3d(ctx, q, q->ne[0], n_tokens, n_group, q->nb[2], q->nb[1], h*n_group*q->nb[1]);

        ggml_tensor * kq = ggml_mul_mat(ctx, k_h, q_h); // [n_kv, n_tokens, n_group]
        ggml_prec_set_acc(kq, GGML_PREC_F32);

        if (g.hparams.attn_soft_cap) {
            kq = ggml_scale(ctx, kq, 1.0f/g.hparams.f_attn_logit_softcapping);
            kq = ggml_tanh (ctx, kq);
            kq = ggml_scale(ctx, kq, g.hparams.f_attn_logit_softcapping);
        }

        kq = ggml_soft_max_ext(ctx, kq, kq_mask, kq_scale, 0.0f);
        if (sinks) {
            ggml_soft_max_add_sinks(kq, ggml_view_1d(ctx, sinks, n_group, h*n_group*sinks->nb[0]));
        }

        ggml_tensor * s = ggml_pool_2d(ctx, kq, score_agg == LLAMA_KVC_AGG_MAX ? GGML_OP_POOL_MAX : GGML_OP_POOL_AVG,
                1, n_tokens, 1, n_tokens, 0, 0); // [n_kv, 1, n_group]
        ggml_format_name(s, "kvc_scores-%d-%d", il, (int) h);
        ggml_set_output(s);

        ggml_build_forward_expand(g.gf, s);

        g.res->kvc_scores.emplace_back(il, s);
    }
}

void llama_kvc::collect(const std::vector<std::pair<int, ggml_tensor *>> & outputs, ggml_backend_sched_t sched, uint32_t n_tokens) {
    if (!scoring() || outputs.empty()) {
        return;
    }

    ggml_backend_sched_synchronize(sched);

    std::vector<size_t> n_done(kv.layers.size(), 0); // floats of each layer that earlier outputs have filled
    std::vector<float>  row(score_n_cells);

    for (const auto & [il, t] : outputs) {
        const uint32_t ikv = ikv_of(il);
        const size_t   n   = std::min<size_t>(score_n_cells, t->ne[0]);

        for (int64_t h = 0; h < t->ne[2]; ++h) {
            ggml_backend_tensor_get(t, row.data(), h*t->nb[2], n*sizeof(float));

            float * acc = score_data.data() + score_offs[ikv] + n_done[ikv];
            if (score_agg == LLAMA_KVC_AGG_MAX) {
                for (size_t i = 0; i < n; ++i) {
                    acc[i] = std::max(acc[i], row[i]);
                }
            } else {
                for (size_t i = 0; i < n; ++i) {
                    acc[i] += row[i]*n_tokens;
                }
            }

            n_done[ikv] += score_n_cells;
        }
    }

    score_n_query += n_tokens;
}

void llama_kvc::scores_get(uint32_t ikv, float * dst) const {
    const float scale = score_agg == LLAMA_KVC_AGG_MEAN && score_n_query > 0 ? 1.0f/score_n_query : 1.0f;

    std::transform(score_data.begin() + score_offs[ikv], score_data.begin() + score_offs[ikv + 1], dst,
            [scale](float x) { return x*scale; });
}
