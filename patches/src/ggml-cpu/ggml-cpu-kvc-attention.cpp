#include "ggml-cpu-kvc-block.h"
#include "ggml-cpu-kvc-gemm.h"

#include "ggml-cpu.h"
#include "simd-mappings.h"
#include "vec.h"

#include <cmath>

namespace ggml_kvc {

// dst [n][n_embd] = rows of one head as F32
static void load_rows(float * dst, const ggml_tensor * t, int64_t first, int64_t n, int64_t head) {
    const int64_t n_embd = t->ne[0];
    const auto to_float = ggml_get_type_traits(t->type)->to_float;
    for (int64_t i = 0; i < n; ++i) {
        const char * row = (const char *) t->data + (first + i)*t->nb[1] + head*t->nb[2];
        if (t->type == GGML_TYPE_F32) {
            memcpy(dst + i*n_embd, row, n_embd*sizeof(float));
        } else if (t->type == GGML_TYPE_F16) {
            ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) row, dst + i*n_embd, n_embd);
        } else {
            to_float(row, dst + i*n_embd, n_embd);
        }
    }
}

void block::start(int64_t head_cur, int64_t first_cur) {
    const ggml_tensor * mask = dst->src[3];

    head    = head_cur;
    first   = first_cur;
    n_valid = MIN(s.n_q, s.n_tokens - first);

    set_slope();
    if (mask) {
        mask_data = (const char *) mask->data + (head%mask->ne[2])*mask->nb[2];
    }
    load_queries();

    memset(out, 0, s.n_embd_v*s.n_q*sizeof(float));
    for (int64_t i = 0; i < s.n_q; ++i) {
        m[i]   = -INFINITY;
        sum[i] = 0.0f;
    }
}

void block::set_slope() {
    float max_bias;
    memcpy(&max_bias, (float *) dst->op_params + 1, sizeof(float));
    if (max_bias > 0.0f) {
        const uint32_t n_head_log2 = 1u << (uint32_t) floor(log2(s.n_head));
        slope = head < n_head_log2 ? powf(powf(2.0f, -max_bias/n_head_log2), head + 1)
                                   : powf(powf(2.0f, -(max_bias/2.0f)/n_head_log2), 2*(head - n_head_log2) + 1);
    }
}

void block::load_queries() {
    const ggml_tensor * q = dst->src[0];

    memset(q_t, 0, s.n_embd_k*s.n_q*sizeof(float));
    for (int64_t i = 0; i < n_valid; ++i) {
        const float * row = (const float *) ((const char *) q->data + (first + i)*q->nb[1] + head*q->nb[2]);
        for (int64_t d = 0; d < s.n_embd_k; ++d) {
            q_t[d*s.n_q + i] = row[d]*scale;
        }
    }
}

mask_kind block::kind_of(int64_t cell, int64_t n_cell) const {
    const ggml_tensor * mask = dst->src[3];
    if (!mask) {
        return MASK_NONE;
    }
    const uint16_t inf = 0xfc00; // -inf as F16
    uint16_t any = 0; // bits that are set in any entry
    uint16_t dif = 0; // bits in which any entry differs from -inf
    for (int64_t i = 0; i < n_valid; ++i) {
        const uint16_t * row = (const uint16_t *) (mask_data + (first + i)*mask->nb[1]) + cell;
        for (int64_t c = 0; c < n_cell; ++c) {
            any |= row[c];
            dif |= row[c] ^ inf;
        }
    }

    return any == 0 ? MASK_NONE : dif == 0 ? MASK_ALL : MASK_SOME;
}

void block::products(float * dst_tile, int64_t cell, int64_t n_cell, mask_kind kind) {
    const ggml_tensor * k = dst->src[1];

    load_rows(k_tile, k, cell, n_cell, head/(s.n_head/k->ne[2]));
    gemm(dst_tile, s.n_q, k_tile, s.n_embd_k, 1, q_t, s.n_q, n_cell, s.n_q, s.n_embd_k, false);

    if (softcap != 0.0f) {
        ggml_vec_tanh_f32 (n_cell*s.n_q, dst_tile, dst_tile);
        ggml_vec_scale_f32(n_cell*s.n_q, dst_tile, softcap);
    }
    if (kind == MASK_SOME) {
        for (int64_t i = 0; i < n_valid; ++i) {
            const ggml_fp16_t * row = (const ggml_fp16_t *) (mask_data + (first + i)*dst->src[3]->nb[1]) + cell;
            for (int64_t c = 0; c < n_cell; ++c) {
                dst_tile[c*s.n_q + i] += slope*GGML_CPU_FP16_TO_FP32(row[c]);
            }
        }
    }
}

void block::tile(int64_t cell) {
    const ggml_tensor * v = dst->src[2];

    const int64_t n_cell = MIN(KV, s.n_kv - cell);

    const mask_kind kind = kind_of(cell, n_cell);
    skip[cell/KV] = kind == MASK_ALL;
    if (kind == MASK_ALL) {
        return;
    }

    float * x = cell < s.n_stored ? kept + cell*s.n_q : tmp;
    products(x, cell, n_cell, kind);

    raise_max(x, n_cell);
    add_probabilities(x, n_cell);

    load_rows(v_tile, v, cell, n_cell, head/(s.n_head/v->ne[2]));
    gemm(out, s.n_embd_v, p, 1, s.n_q, v_tile, s.n_embd_v, n_valid, s.n_embd_v, n_cell, true);
}

// raises m to the maximum of the new products, and scales the sums and outputs so far to it
void block::raise_max(const float * x, int64_t n_cell) {
    const int64_t n_q = s.n_q;

    memcpy(m_new, m, n_q*sizeof(float));
    for (int64_t c = 0; c < n_cell; ++c) {
        for (int64_t i = 0; i < n_q; ++i) {
            m_new[i] = x[c*n_q + i] > m_new[i] ? x[c*n_q + i] : m_new[i];
        }
    }
    for (int64_t i = 0; i < n_q; ++i) {
        if (m_new[i] > m[i]) {
            const float f = m[i] == -INFINITY ? 0.0f : exp_neg(m[i] - m_new[i]);
            m[i]    = m_new[i];
            sum[i] *= f;
            ggml_vec_scale_f32(s.n_embd_v, out + i*s.n_embd_v, f);
        }
    }
}

void block::add_probabilities(const float * x, int64_t n_cell) {
    const int64_t n_q = s.n_q;

    for (int64_t i = 0; i < n_q; ++i) {
        m_new[i] = m[i] == -INFINITY ? 0.0f : m[i]; // the query has seen no cell yet: -inf - -inf would be NaN
    }
    for (int64_t c = 0; c < n_cell; ++c) {
        for (int64_t i = 0; i < n_q; ++i) {
            p[c*n_q + i] = exp_neg(x[c*n_q + i] - m_new[i]);
        }
        for (int64_t i = 0; i < n_q; ++i) {
            sum[i] += p[c*n_q + i];
        }
    }
}

void block::finish() {
    const ggml_tensor * sinks = dst->src[4];

    for (int64_t i = 0; i < n_valid; ++i) {
        if (sinks) {
            add_sink(i, ((const float *) sinks->data)[head]);
        }

        ggml_vec_scale_f32(s.n_embd_v, out + i*s.n_embd_v, sum[i] == 0.0f ? 0.0f : 1.0f/sum[i]);
        memcpy((char *) dst->data + head*dst->nb[1] + (first + i)*dst->nb[2], out + i*s.n_embd_v, s.n_embd_v*sizeof(float));
    }
    // infinity gives a probability of 0 to queries that do not exist or see no cell
    for (int64_t i = 0; i < s.n_q; ++i) {
        lse[i] = i < n_valid && sum[i] > 0.0f ? m[i] + logf(sum[i]) : INFINITY;
    }
}

// the attention sink of a head adds to the sum and has no value
void block::add_sink(int64_t i, float x) {
    if (x > m[i]) {
        const float f = m[i] == -INFINITY ? 0.0f : exp_neg(m[i] - x);
        m[i]    = x;
        sum[i] *= f;
        ggml_vec_scale_f32(s.n_embd_v, out + i*s.n_embd_v, f);
    }
    sum[i] += exp_neg(x - m[i]);
}

} // namespace ggml_kvc
