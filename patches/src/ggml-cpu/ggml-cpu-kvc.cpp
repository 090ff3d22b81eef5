#include "ggml-cpu-kvc.h"
#include "ggml-cpu-kvc-block.h"

using namespace ggml_kvc;

static constexpr int64_t ALIGNMENT = 64;

shape::shape(const ggml_tensor * dst, int n_threads) {
    const ggml_tensor * scores = dst->src[GGML_KVC_SRC_SCORES];

    n_embd_k = dst->src[1]->ne[0];
    n_embd_v = dst->src[2]->ne[0];
    n_tokens = dst->src[0]->ne[1];
    n_head   = dst->src[0]->ne[2];
    n_kv     = dst->src[1]->ne[1];
    n_cells  = scores ? MIN(scores->ne[0], n_kv) : 0;
    n_q      = n_tokens <= 16 ? 16 : n_tokens <= 32 ? 32 : MAX_Q;

    const int64_t max_bytes = ggml_get_op_params_i32(dst, GGML_KVC_OP_PARAM_MAX_KIB)*int64_t(1024)/n_threads;

    n_stored = MIN(GGML_PAD(n_cells, KV), max_bytes/(int64_t) (n_q*sizeof(float))/KV*KV);

    const int64_t n = n_embd_k*n_q + n_embd_v*n_q + KV*(n_embd_k + n_embd_v) + 2*KV*n_q + GGML_PAD(n_cells, KV) + 4*n_q + n_stored*n_q;

    n_bytes = GGML_PAD(n*sizeof(float) + n_kv/KV + 1, ALIGNMENT);
    n_kept  = n_stored*n_q*sizeof(float);
}

block::block(ggml_tensor * dst, const shape & s, char * work) : dst(dst), s(s) {
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

size_t ggml_kvc_flash_attn_work_size(const ggml_tensor * dst, int n_threads) {
    const shape s(dst, n_threads);

    // ggml may run fewer threads than planned. Then each may keep more products, but all together at most the limit.
    const size_t max_bytes = ggml_get_op_params_i32(dst, GGML_KVC_OP_PARAM_MAX_KIB)*size_t(1024);
    const size_t all_bytes = n_threads*GGML_PAD(s.n_cells, KV)*s.n_q*sizeof(float);

    return ALIGNMENT + n_threads*(s.n_bytes - s.n_kept + ALIGNMENT) + MIN(max_bytes, all_bytes);
}

void ggml_kvc_compute_forward_flash_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    const shape s(dst, params->nth);

    GGML_ASSERT(ALIGNMENT + params->nth*s.n_bytes <= params->wsize);

    // the threads share the lock, then each has its own work memory
    auto & lock = *reinterpret_cast<std::atomic<int32_t> *>(params->wdata);

    if (params->ith == 0) {
        lock.store(0);
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    block cur(dst, s, (char *) params->wdata + ALIGNMENT + params->ith*s.n_bytes);

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
