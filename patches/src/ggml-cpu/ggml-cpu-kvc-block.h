#pragma once

// One thread's work on a block of query tokens of one head.
//
// A block has n_q query tokens. It takes the cells in tiles of KV. Products are kept transposed, [cell][query]. So keys and
// values are used row by row as they are stored, in any type, and maxima and sums over cells run along vectors of queries.
//
// A block keeps its products until it knows the softmax's denominators. The score of a cell is then one pass over its row:
// max_q exp(s - lse_q) = exp(max_q (s - lse_q)). Rows that exceed the work memory are computed a second time.
//
//   ggml-cpu-kvc-attention.cpp   products and output
//   ggml-cpu-kvc-scores.cpp      scores
//   ggml-cpu-kvc.cpp             work memory, and how the threads share the blocks

#include "ggml-cpu-kvc.h"

#include <atomic>
#include <cstring>

namespace ggml_kvc {

constexpr int64_t KV    = 64; // cells of a tile
constexpr int64_t MAX_Q = 64; // most query tokens of a block

struct shape {
    int64_t n_embd_k;
    int64_t n_embd_v;
    int64_t n_tokens;
    int64_t n_head;
    int64_t n_kv;
    int64_t n_cells;   // cells that are scored
    int64_t n_q;       // query tokens of a block
    int64_t n_stored;  // the first cells, as many as may keep their products
    size_t  n_bytes;   // work memory of one thread
    size_t  n_kept;    // bytes of it for the products that are kept

    shape(const ggml_tensor * dst, int n_threads);
};

enum mask_kind { MASK_NONE, MASK_SOME, MASK_ALL };

struct block {
    ggml_tensor * dst;
    const shape & s;

    float scale;
    float softcap;
    float slope = 1.0f; // ALiBi
    int   agg;

    float * q_t;    // [n_embd_k][n_q], scaled
    float * out;    // [n_q][n_embd_v]
    float * k_tile; // [KV][n_embd_k]
    float * v_tile; // [KV][n_embd_v]
    float * p;      // [KV][n_q] probabilities, not yet divided by their sum
    float * tmp;    // [KV][n_q] products that are not kept
    float * scores; // [n_cells]
    float * m;      // [n_q] maximum of the products so far
    float * sum;    // [n_q] sum of exp(product - m) so far
    float * m_new;  // [n_q]
    float * lse;    // [n_q] log of the softmax's denominator
    float * kept;   // [n_stored][n_q] products
    uint8_t * skip; // [n_kv/KV] 1: the mask hides the whole tile

    int64_t head;
    int64_t first;   // first query token
    int64_t n_valid; // query tokens: the last block of a head may have fewer than n_q
    const char * mask_data = nullptr;

    block(ggml_tensor * dst, const shape & s, char * work);

    // begins a block
    void start(int64_t head, int64_t first);

    // adds the cells [cell, cell + KV) to the output
    void tile(int64_t cell);

    // divides by the sums and writes the output
    void finish();

    // reduces the probabilities of all cells over the block's query tokens into scores
    void score();

    // accumulates scores into those of the node; lock is one for all threads
    void merge(std::atomic<int32_t> & lock) const;

    // dst_tile [n_cell][n_q] = q*k of some cells: scaled, capped and masked
    void products(float * dst_tile, int64_t cell, int64_t n_cell, mask_kind kind);

    mask_kind kind_of(int64_t cell, int64_t n_cell) const;

private:
    void set_slope();
    void load_queries();
    void raise_max(const float * x, int64_t n_cell);
    void add_probabilities(const float * x, int64_t n_cell);
    void add_sink(int64_t i, float x);
};

// e^x for x <= 0, in a form that compilers vectorize; the relative error is below 2e-7, and below -87 the result is 0
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

} // namespace ggml_kvc
