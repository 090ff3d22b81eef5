#include "ggml-cpu-kvc-block.h"

#include <cmath>

namespace ggml_kvc {

static constexpr int64_t N_ACC = 16; // accumulators, so that the loops over query tokens vectorize; n_q is a multiple

static inline float max_of(float a, float b) {
    return a > b ? a : b;
}

// max over the query tokens of a cell's product - lse
static float reduce_max(const float * row, const float * lse, int64_t n_q) {
    float acc[N_ACC];
    for (int64_t j = 0; j < N_ACC; ++j) {
        acc[j] = -INFINITY;
    }
    for (int64_t i = 0; i < n_q; i += N_ACC) {
        for (int64_t j = 0; j < N_ACC; ++j) {
            acc[j] = max_of(row[i + j] - lse[i + j], acc[j]);
        }
    }
    for (int64_t n = N_ACC/2; n > 0; n /= 2) {
        for (int64_t j = 0; j < n; ++j) {
            acc[j] = max_of(acc[j + n], acc[j]);
        }
    }

    return acc[0];
}

// sum over the query tokens of a cell's probabilities
static float reduce_sum(const float * row, const float * lse, int64_t n_q) {
    float acc[N_ACC] = {};
    for (int64_t i = 0; i < n_q; i += N_ACC) {
        for (int64_t j = 0; j < N_ACC; ++j) {
            acc[j] += exp_neg(row[i + j] - lse[i + j]);
        }
    }
    for (int64_t n = N_ACC/2; n > 0; n /= 2) {
        for (int64_t j = 0; j < n; ++j) {
            acc[j] += acc[j + n];
        }
    }

    return acc[0];
}

void block::score() {
    const bool is_max = agg == GGML_KVC_AGG_MAX;

    for (int64_t cell = 0; cell < s.n_cells; cell += KV) {
        const int64_t n_cell = MIN(KV, s.n_cells - cell);

        if (skip[cell/KV]) {
            memset(scores + cell, 0, n_cell*sizeof(float));
            continue;
        }

        const bool is_kept = cell < s.n_stored;
        if (!is_kept) {
            products(tmp, cell, n_cell, kind_of(cell, n_cell));
        }
        const float * x = is_kept ? kept + cell*s.n_q : tmp;

        for (int64_t c = 0; c < n_cell; ++c) {
            const float * row = x + c*s.n_q;
            scores[cell + c] = is_max ? reduce_max(row, lse, s.n_q) : reduce_sum(row, lse, s.n_q);
        }
        if (is_max) {
            for (int64_t c = 0; c < n_cell; ++c) {
                scores[cell + c] = exp_neg(scores[cell + c] > 0.0f ? 0.0f : scores[cell + c]);
            }
        }
    }
}

void block::merge(std::atomic<int32_t> & lock) const {
    const ggml_tensor * t = dst->src[GGML_KVC_SRC_SCORES];

    float * acc = (float *) ((char *) t->data + head*t->nb[1]);

    // Two threads may work on one head. Waiting is cheap: a merge is one pass over n_cells floats, after tens of such passes.
    while (lock.exchange(1, std::memory_order_acquire)) {}
    if (agg == GGML_KVC_AGG_MAX) {
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

} // namespace ggml_kvc
