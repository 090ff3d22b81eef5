#include "ggml-cpu-kvc.h"

#include "ggml-cpu.h"
#include "simd-mappings.h"
#include "vec.h"

#include <atomic>
#include <cmath>
#include <cstring>

// Query tokens of one head are taken in blocks of n_q, cells in tiles of KV. Products are kept transposed,
// [cell][query]: then keys and values are used row by row as they are stored, of whatever type, and maxima and sums
// over the cells run along whole vectors of queries.
//
// The products of a block are kept until the softmax's denominators are known. Then a cell's score is one pass over
// its row: max_q exp(s - lse_q) = exp(max_q (s - lse_q)). Rows that exceed the work memory are computed again.

namespace {

constexpr int64_t KV        = 64; // cells of a tile
constexpr int64_t MAX_Q     = 64; // queries of a block
constexpr int64_t ALIGNMENT = 64;

struct shape {
    int64_t n_embd_k;
    int64_t n_embd_v;
    int64_t n_tokens;
    int64_t n_head;
    int64_t n_kv;
    int64_t n_cells;   // cells that are scored
    int64_t n_q;       // queries of a block
    int64_t n_stored;  // cells, from the first on, whose products are kept
    size_t  n_bytes;   // of one thread
    size_t  n_kept;    // of these, for the products that are kept

    shape(const ggml_tensor * dst, int n_threads) {
        n_embd_k = dst->src[1]->ne[0];
        n_embd_v = dst->src[2]->ne[0];
        n_tokens = dst->src[0]->ne[1];
        n_head   = dst->src[0]->ne[2];
        n_kv     = dst->src[1]->ne[1];
        n_cells  = dst->src[5] ? MIN(dst->src[5]->ne[0], n_kv) : 0;
        n_q      = n_tokens <= 16 ? 16 : n_tokens <= 32 ? 32 : MAX_Q;

        const int64_t max_bytes = ggml_get_op_params_i32(dst, GGML_KVC_OP_PARAM_MAX_KIB)*int64_t(1024)/n_threads;

        n_stored = MIN(GGML_PAD(n_cells, KV), max_bytes/(int64_t) (n_q*sizeof(float))/KV*KV);

        const int64_t n = n_embd_k*n_q + n_embd_v*n_q + KV*(n_embd_k + n_embd_v) + 2*KV*n_q + GGML_PAD(n_cells, KV) + 4*n_q + n_stored*n_q;

        n_bytes = GGML_PAD(n*sizeof(float) + n_kv/KV + 1, ALIGNMENT);
        n_kept  = n_stored*n_q*sizeof(float);
    }
};

#if defined(GGML_SIMD) && !defined(__ARM_FEATURE_SVE) && !defined(__riscv_v_intrinsic)

// C[RM][RN*EPR] (+)= A[RM][K] * B[K][..]; A element (m, k) at m*am + k*ak
template <int RM, int RN>
inline void gemm_block(float * C, int64_t ldc, const float * A, int64_t am, int64_t ak, const float * B, int64_t ldb, int64_t K, bool add) {
    GGML_F32_VEC acc[RM][RN];
    for (int i = 0; i < RM; ++i) {
        for (int j = 0; j < RN; ++j) {
            acc[i][j] = add ? GGML_F32_VEC_LOAD(C + i*ldc + j*GGML_F32_EPR) : GGML_F32_VEC_SET1(0.0f);
        }
    }
    for (int64_t k = 0; k < K; ++k) {
        GGML_F32_VEC b[RN];
        for (int j = 0; j < RN; ++j) {
            b[j] = GGML_F32_VEC_LOAD(B + k*ldb + j*GGML_F32_EPR);
        }
        for (int i = 0; i < RM; ++i) {
            const GGML_F32_VEC a = GGML_F32_VEC_SET1(A[i*am + k*ak]);
            for (int j = 0; j < RN; ++j) {
                acc[i][j] = GGML_F32_VEC_FMA(acc[i][j], b[j], a);
            }
        }
    }
    for (int i = 0; i < RM; ++i) {
        for (int j = 0; j < RN; ++j) {
            GGML_F32_VEC_STORE(C + i*ldc + j*GGML_F32_EPR, acc[i][j]);
        }
    }
}

template <int RM>
inline void gemm_rows(float * C, int64_t ldc, const float * A, int64_t am, int64_t ak, const float * B, int64_t ldb, int64_t N, int64_t K, bool add) {
    int64_t j = 0;
    for (; j + 4*GGML_F32_EPR <= N; j += 4*GGML_F32_EPR) {
        gemm_block<RM, 4>(C + j, ldc, A, am, ak, B + j, ldb, K, add);
    }
    for (; j + GGML_F32_EPR <= N; j += GGML_F32_EPR) {
        gemm_block<RM, 1>(C + j, ldc, A, am, ak, B + j, ldb, K, add);
    }
    for (; j < N; ++j) {
        for (int i = 0; i < RM; ++i) {
            float sum = add ? C[i*ldc + j] : 0.0f;
            for (int64_t k = 0; k < K; ++k) {
                sum += A[i*am + k*ak]*B[k*ldb + j];
            }
            C[i*ldc + j] = sum;
        }
    }
}

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int GEMM_RM = 4;
#else
constexpr int GEMM_RM = 2; // 16 registers: 2*4 sums, 4 of B, 1 of A
#endif

void gemm(float * C, int64_t ldc, const float * A, int64_t am, int64_t ak, const float * B, int64_t ldb, int64_t M, int64_t N, int64_t K, bool add) {
    int64_t i = 0;
    for (; i + GEMM_RM <= M; i += GEMM_RM) {
        gemm_rows<GEMM_RM>(C + i*ldc, ldc, A + i*am, am, ak, B, ldb, N, K, add);
    }
    for (; i < M; ++i) {
        gemm_rows<1>(C + i*ldc, ldc, A + i*am, am, ak, B, ldb, N, K, add);
    }
}

#else

void gemm(float * C, int64_t ldc, const float * A, int64_t am, int64_t ak, const float * B, int64_t ldb, int64_t M, int64_t N, int64_t K, bool add) {
    for (int64_t i = 0; i < M; ++i) {
        if (!add) {
            memset(C + i*ldc, 0, N*sizeof(float));
        }
        for (int64_t k = 0; k < K; ++k) {
            const float a = A[i*am + k*ak];
            for (int64_t j = 0; j < N; ++j) {
                C[i*ldc + j] += a*B[k*ldb + j];
            }
        }
    }
}

#endif

// e^x for x <= 0, in a form that compilers vectorize; relative error below 2e-7, 0 below -87
inline float exp_neg(float x) {
    const float shift = 12582912.0f; // 1.5*2^23: adding it rounds to an integer in the low bits
    const float xc    = x < -87.0f ? -87.0f : x;
    const float t     = xc*1.44269504f + shift;
    const float n     = t - shift;
    const float r     = (xc - n*0.693359375f) + n*2.12194440e-4f;

    float p = 1.9875691500e-4f;
    p = p*r + 1.3981999507e-3f;
    p = p*r + 8.3334519073e-3f;
    p = p*r + 4.1665795894e-2f;
    p = p*r + 1.6666665459e-1f;
    p = p*r + 5.0000001201e-1f;
    p = p*r*r + r + 1.0f;

    uint32_t bits;
    float    scale;
    memcpy(&bits, &t, sizeof(bits));
    bits = (bits << 23) + 0x3f800000; // 2^n
    memcpy(&scale, &bits, sizeof(scale));

    return x < -87.0f ? 0.0f : p*scale;
}

// rows of one head as F32 [n][n_embd]
void load_rows(float * dst, const ggml_tensor * t, int64_t first, int64_t n, int64_t head) {
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

enum mask_kind { MASK_NONE, MASK_SOME, MASK_ALL };

mask_kind classify(const ggml_tensor * mask, const char * data, int64_t first_query, int64_t n_query, int64_t first_cell, int64_t n_cell) {
    if (!mask) {
        return MASK_NONE;
    }
    const uint16_t inf = 0xfc00;
    uint16_t any = 0; // set bits of any entry
    uint16_t dif = 0; // bits in which any entry differs from -inf
    for (int64_t q = 0; q < n_query; ++q) {
        const uint16_t * row = (const uint16_t *) (data + (first_query + q)*mask->nb[1]) + first_cell;
        for (int64_t c = 0; c < n_cell; ++c) {
            any |= row[c];
            dif |= row[c] ^ inf;
        }
    }
    return any == 0 ? MASK_NONE : dif == 0 ? MASK_ALL : MASK_SOME;
}

struct block {
    const ggml_compute_params * params;
    ggml_tensor * dst;
    const shape & s;

    float scale;
    float softcap;
    float slope = 1.0f;
    int   agg;

    float * q_t;    // [n_embd_k][n_q], scaled
    float * out;    // [n_q][n_embd_v]
    float * k_tile; // [KV][n_embd_k]
    float * v_tile; // [KV][n_embd_v]
    float * p;      // [KV][n_q]
    float * tmp;    // [KV][n_q], products that are not kept
    float * scores; // [n_cells]
    float * m;      // [n_q] maximum
    float * sum;    // [n_q]
    float * m_new;
    float * lse;
    float * kept;   // [n_stored][n_q]
    uint8_t * skip; // [n_kv/KV]: all of the tile is masked

    int64_t head;
    int64_t first;   // query
    int64_t n_valid;
    const char * mask_data = nullptr;

    block(const ggml_compute_params * params, ggml_tensor * dst, const shape & s, char * work) : params(params), dst(dst), s(s) {
        memcpy(&scale,   (float *) dst->op_params + 0, sizeof(float));
        memcpy(&softcap, (float *) dst->op_params + 2, sizeof(float));
        agg = ggml_get_op_params_i32(dst, GGML_KVC_OP_PARAM_AGG);
        if (softcap != 0.0f) {
            scale /= softcap;
        }

        float * cur = (float *) work;
        const auto take = [&](int64_t n) { float * res = cur; cur += n; return res; };
        q_t    = take(s.n_embd_k*s.n_q);
        out    = take(s.n_embd_v*s.n_q);
        k_tile = take(KV*s.n_embd_k);
        v_tile = take(KV*s.n_embd_v);
        p      = take(KV*s.n_q);
        tmp    = take(KV*s.n_q);
        scores = take(GGML_PAD(s.n_cells, KV));
        m      = take(s.n_q);
        sum    = take(s.n_q);
        m_new  = take(s.n_q);
        lse    = take(s.n_q);
        kept   = take(s.n_stored*s.n_q);
        skip   = (uint8_t *) cur;
    }

    void start(int64_t head_cur, int64_t first_cur) {
        const ggml_tensor * q    = dst->src[0];
        const ggml_tensor * mask = dst->src[3];

        head    = head_cur;
        first   = first_cur;
        n_valid = MIN(s.n_q, s.n_tokens - first);

        float max_bias;
        memcpy(&max_bias, (float *) dst->op_params + 1, sizeof(float));
        if (max_bias > 0.0f) {
            const uint32_t n_head_log2 = 1u << (uint32_t) floor(log2(s.n_head));
            slope = head < n_head_log2 ? powf(powf(2.0f, -max_bias/n_head_log2), head + 1)
                                       : powf(powf(2.0f, -(max_bias/2.0f)/n_head_log2), 2*(head - n_head_log2) + 1);
        }
        if (mask) {
            mask_data = (const char *) mask->data + (head%mask->ne[2])*mask->nb[2];
        }

        memset(q_t, 0, s.n_embd_k*s.n_q*sizeof(float));
        for (int64_t i = 0; i < n_valid; ++i) {
            const float * row = (const float *) ((const char *) q->data + (first + i)*q->nb[1] + head*q->nb[2]);
            for (int64_t d = 0; d < s.n_embd_k; ++d) {
                q_t[d*s.n_q + i] = row[d]*scale;
            }
        }

        memset(out, 0, s.n_embd_v*s.n_q*sizeof(float));
        for (int64_t i = 0; i < s.n_q; ++i) {
            m[i]   = -INFINITY;
            sum[i] = 0.0f;
        }
    }

    // q*k of a tile, scaled, capped and masked: [n_cell][n_q]
    void products(float * dst_tile, int64_t cell, int64_t n_cell, mask_kind kind) {
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

    mask_kind kind_of(int64_t cell, int64_t n_cell) const {
        return classify(dst->src[3], mask_data, first, n_valid, cell, n_cell);
    }

    void tile(int64_t cell) {
        const ggml_tensor * v = dst->src[2];

        const int64_t n_q    = s.n_q;
        const int64_t n_cell = MIN(KV, s.n_kv - cell);

        const mask_kind kind = kind_of(cell, n_cell);
        skip[cell/KV] = kind == MASK_ALL;
        if (kind == MASK_ALL) {
            return;
        }

        float * x = cell < s.n_stored ? kept + cell*n_q : tmp;
        products(x, cell, n_cell, kind);

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
            m_new[i] = m[i] == -INFINITY ? 0.0f : m[i]; // nothing visible yet: all products are -inf
        }
        for (int64_t c = 0; c < n_cell; ++c) {
            for (int64_t i = 0; i < n_q; ++i) {
                p[c*n_q + i] = exp_neg(x[c*n_q + i] - m_new[i]);
            }
            for (int64_t i = 0; i < n_q; ++i) {
                sum[i] += p[c*n_q + i];
            }
        }

        load_rows(v_tile, v, cell, n_cell, head/(s.n_head/v->ne[2]));
        gemm(out, s.n_embd_v, p, 1, n_q, v_tile, s.n_embd_v, n_valid, s.n_embd_v, n_cell, true);
    }

    void finish() {
        const ggml_tensor * sinks = dst->src[4];

        for (int64_t i = 0; i < n_valid; ++i) {
            if (sinks) { // takes part in the sum and has no value
                const float x = ((const float *) sinks->data)[head];
                if (x > m[i]) {
                    const float f = m[i] == -INFINITY ? 0.0f : exp_neg(m[i] - x);
                    m[i]    = x;
                    sum[i] *= f;
                    ggml_vec_scale_f32(s.n_embd_v, out + i*s.n_embd_v, f);
                }
                sum[i] += exp_neg(x - m[i]);
            }

            ggml_vec_scale_f32(s.n_embd_v, out + i*s.n_embd_v, sum[i] == 0.0f ? 0.0f : 1.0f/sum[i]);
            memcpy((char *) dst->data + head*dst->nb[1] + (first + i)*dst->nb[2], out + i*s.n_embd_v, s.n_embd_v*sizeof(float));
        }
        for (int64_t i = 0; i < s.n_q; ++i) {
            lse[i] = i < n_valid && sum[i] > 0.0f ? m[i] + logf(sum[i]) : INFINITY;
        }
    }

    void score() {
        const int64_t n_q = s.n_q;

        for (int64_t cell = 0; cell < s.n_cells; cell += KV) {
            const int64_t n_cell = MIN(KV, s.n_cells - cell);

            if (skip[cell/KV]) {
                memset(scores + cell, 0, n_cell*sizeof(float));
                continue;
            }

            const float * x = kept + cell*n_q;
            if (cell >= s.n_stored) {
                products(tmp, cell, n_cell, kind_of(cell, n_cell));
                x = tmp;
            }

            for (int64_t c = 0; c < n_cell; ++c) {
                const float * row = x + c*n_q;
                float acc[16];
                for (int64_t j = 0; j < 16; ++j) {
                    acc[j] = agg == 0 ? -INFINITY : 0.0f;
                }
                if (agg == 0) {
                    for (int64_t i = 0; i < n_q; i += 16) {
                        for (int64_t j = 0; j < 16; ++j) {
                            const float y = row[i + j] - lse[i + j];
                            acc[j] = y > acc[j] ? y : acc[j];
                        }
                    }
                } else {
                    for (int64_t i = 0; i < n_q; i += 16) {
                        for (int64_t j = 0; j < 16; ++j) {
                            acc[j] += exp_neg(row[i + j] - lse[i + j]);
                        }
                    }
                }
                for (int64_t n = 8; n > 0; n /= 2) {
                    for (int64_t j = 0; j < n; ++j) {
                        acc[j] = agg == 0 ? (acc[j + n] > acc[j] ? acc[j + n] : acc[j]) : acc[j] + acc[j + n];
                    }
                }
                scores[cell + c] = acc[0];
            }
            if (agg == 0) {
                for (int64_t c = 0; c < n_cell; ++c) {
                    scores[cell + c] = exp_neg(scores[cell + c] > 0.0f ? 0.0f : scores[cell + c]);
                }
            }
        }
    }

    void merge(std::atomic<int32_t> & lock) const {
        float * acc = (float *) ((char *) dst->src[5]->data + head*dst->src[5]->nb[1]);

        // two threads may work on one head; a merge is one pass over n_cells floats after tens of passes of work
        while (lock.exchange(1, std::memory_order_acquire)) {}
        if (agg == 0) {
            for (int64_t c = 0; c < s.n_cells; ++c) {
                acc[c] = scores[c] > acc[c] ? scores[c] : acc[c];
            }
        } else {
            for (int64_t c = 0; c < s.n_cells; ++c) {
                acc[c] += scores[c];
            }
        }
        lock.store(0, std::memory_order_release);
    }
};

} // namespace

size_t ggml_kvc_flash_attn_work_size(const ggml_tensor * dst, int n_threads) {
    const shape s(dst, n_threads);

    // with fewer threads than planned each may keep more, but all together no more than the bound or everything
    const size_t max_bytes = ggml_get_op_params_i32(dst, GGML_KVC_OP_PARAM_MAX_KIB)*size_t(1024);
    const size_t all_bytes = n_threads*GGML_PAD(s.n_cells, KV)*s.n_q*sizeof(float);

    return ALIGNMENT + n_threads*(s.n_bytes - s.n_kept + ALIGNMENT) + MIN(max_bytes, all_bytes);
}

void ggml_kvc_compute_forward_flash_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    const shape s(dst, params->nth);

    GGML_ASSERT(ALIGNMENT + params->nth*s.n_bytes <= params->wsize);

    auto & lock = *reinterpret_cast<std::atomic<int32_t> *>(params->wdata);

    if (params->ith == 0) {
        lock.store(0);
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    block cur(params, dst, s, (char *) params->wdata + ALIGNMENT + params->ith*s.n_bytes);

    const int64_t n_blocks = (s.n_tokens + s.n_q - 1)/s.n_q;

    int64_t item = params->ith;
    while (item < s.n_head*n_blocks) {
        cur.start(item/n_blocks, item%n_blocks*s.n_q);
        for (int64_t cell = 0; cell < s.n_kv; cell += KV) {
            cur.tile(cell);
        }
        cur.finish();
        if (s.n_cells > 0) {
            cur.score();
            cur.merge(lock);
        }

        item = ggml_threadpool_chunk_add(params->threadpool, 1);
    }
}
