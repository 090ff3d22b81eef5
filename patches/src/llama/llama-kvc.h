#pragma once

// C API of the KV compression: attention scores, layer geometry, compose.
//
// Every function returns a llama_kvc_status and never aborts on an argument; llama_kvc_last_error() has one line
// about the last failure of the calling thread. Only contexts of one sequence with a plain KV cache (llama_kv_cache), or
// one with sliding windows beside it, are supported; llama_kvc_supported() says why another one is not.

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

#define LLAMA_KVC_ABI 3

#ifdef __cplusplus
extern "C" {
#endif

enum llama_kvc_status {
    LLAMA_KVC_OK              =  0,
    LLAMA_KVC_ERR_ARGUMENT    = -1, // an argument is out of range
    LLAMA_KVC_ERR_UNSUPPORTED = -2, // this model, cache kind or cache type cannot do it
    LLAMA_KVC_ERR_STATE       = -3, // not now: for example a compose on a cache that is composed already
    LLAMA_KVC_ERR_MEMORY      = -4, // an allocation failed
    LLAMA_KVC_ERR_INTERNAL    = -5,
};

enum llama_kvc_agg {
    LLAMA_KVC_AGG_MAX = 0,
    LLAMA_KVC_AGG_SUM = 1,
};

enum llama_kvc_tap {
    LLAMA_KVC_TAP_QUERIES = 1, // rotated, and scaled so that their products with keys are the attention logits
    LLAMA_KVC_TAP_OUTPUTS = 2, // of attention, before the output projection
};

struct llama_kvc_cache_info {
    uint32_t n_layer;       // layers that have a cache
    uint32_t n_cells;       // cells of the cell list (n_ctx, padded)
    uint32_t n_cells_alloc; // cells that every layer has room for, less its own offset
    uint32_t n_cells_used;  // index of the last used cell + 1
    uint32_t n_composed;    // tokens that were composed, 0: the cache is not composed
    int32_t  scoring;       // 1 between llama_kvc_scores_begin and llama_kvc_scores_end
    uint32_t n_cells_swa;   // cells of the layers with a sliding window, which are not compressed; 0: there are none
    uint64_t n_bytes;       // bytes of all K and V buffers, without those of sliding-window layers
};

struct llama_kvc_layer_info {
    int32_t  il;
    int32_t  n_head;
    int32_t  n_head_kv;
    int32_t  n_embd_head_k;
    int32_t  n_embd_head_v;
    int32_t  type_k;        // ggml_type
    int32_t  type_v;
    int32_t  v_trans;       // 1: V is stored [n_embd_v][row], as without flash attention
    uint32_t n_rows;        // rows allocated
    uint32_t n_rows_used;   // rows that hold a composite or a token
    uint64_t n_bytes;       // bytes of the layer's buffer
    uint64_t n_bytes_row;   // bytes of one row, K and V together
    void   * k;             // host address of the K tensor, NULL if it is in device memory
    void   * v;
    const char * buffer;    // name of the buffer type
};

// Gathers rows: for every head h, chunk c and j < n_kept it copies n_bytes bytes
//   from src + cells[h*n_kept + j]*src_cell + h*src_head + c*src_chunk
//   to   dst + j*dst_cell                   + h*dst_head + c*dst_chunk
// cells is strictly ascending within a head and src may equal dst, so j has to run upwards.
typedef void (*llama_kvc_gather_t)(
        const uint8_t * src, uint8_t * dst, const int32_t * cells,
        int64_t n_head, int64_t n_kept, int64_t n_chunk, int64_t n_bytes,
        int64_t src_cell, int64_t src_head, int64_t src_chunk,
        int64_t dst_cell, int64_t dst_head, int64_t dst_chunk);

LLAMA_API uint32_t     llama_kvc_abi(void);
LLAMA_API const char * llama_kvc_commit(void); // llama.cpp commit this library was built from
LLAMA_API const char * llama_kvc_last_error(void);

// Contexts that this thread creates from now on start with n_cells cells a layer (rounded up to 256) instead of n_ctx,
// and grow and shrink with what they hold. 0: llama.cpp's own way, the default.
LLAMA_API void llama_kvc_set_start_cells(uint32_t n_cells);

LLAMA_API int32_t llama_kvc_supported(struct llama_context * ctx);

// size = sizeof(*info) of the caller: a mismatch is an argument error, not a corrupted stack
LLAMA_API int32_t llama_kvc_get_cache(struct llama_context * ctx, struct llama_kvc_cache_info * info, size_t size);
LLAMA_API int32_t llama_kvc_get_layer(struct llama_context * ctx, uint32_t ikv, struct llama_kvc_layer_info * info, size_t size);

// copies bytes of a layer's K (is_v = 0) or V tensor to dst, from host or device memory
LLAMA_API int32_t llama_kvc_get_tensor(struct llama_context * ctx, uint32_t ikv, int32_t is_v, void * dst, size_t offset, size_t size);

// writes bytes of a layer's V tensor (is_v = 1) or K tensor; what the cells mean is not checked
LLAMA_API int32_t llama_kvc_set_tensor(struct llama_context * ctx, uint32_t ikv, int32_t is_v, const void * src, size_t offset, size_t size);

// Makes room for n_cells cells now, so that the cache need not grow in steps; it is kept until the next compose or
// call. Room that an empty cache has beyond n_cells and its start is given back.
LLAMA_API int32_t llama_kvc_reserve(struct llama_context * ctx, uint32_t n_cells);

// on = 1: batches of 16 and more tokens use a flash attention kernel of our own on the CPU: the same up to rounding, faster,
// and for quantized keys and values several times so. 0, the default: llama.cpp's.
LLAMA_API int32_t llama_kvc_set_fast_attention(struct llama_context * ctx, int32_t on);

// From here on decodes collect, for every layer and query head, the attention probabilities of the cells
// [0, n_cells), reduced over the query tokens of all decodes until llama_kvc_scores_end.
//   agg        llama_kvc_agg
//   max_bytes  of working memory beside the scores themselves (float32, n_layer*n_head*n_cells)
LLAMA_API int32_t llama_kvc_scores_begin(struct llama_context * ctx, int32_t agg, uint32_t n_cells, size_t max_bytes);
// dst: float32 [n_head][n_cells] of layer ikv; n = its number of floats
LLAMA_API int32_t llama_kvc_scores_get  (struct llama_context * ctx, uint32_t ikv, float * dst, size_t n);
LLAMA_API int32_t llama_kvc_scores_end  (struct llama_context * ctx);

// From here on decodes leave the queries or attention outputs (what: a sum of llama_kvc_tap) of their first n_tokens
// tokens behind, until the next decode. n_tokens is at most n_ubatch; a longer decode is several of them, and leaves the last.
LLAMA_API int32_t llama_kvc_taps_begin(struct llama_context * ctx, int32_t what, uint32_t n_tokens);
// dst: float32 [n_tokens][n_head][n_embd_head] of layer ikv, n = its number of floats; beyond the tokens of the latest
// decode is what earlier ones left. Vectors of quantized keys (values) are
// Hadamard-rotated as these are.
LLAMA_API int32_t llama_kvc_taps_get  (struct llama_context * ctx, uint32_t ikv, int32_t what, float * dst, size_t n);
LLAMA_API int32_t llama_kvc_taps_end  (struct llama_context * ctx);

// Adds bias, float32 [n_head_kv][n_rows], to the attention logits of a layer's first n_rows rows, from now on; -inf hides a
// row. Attention is then not fused, which quantized V cannot be. NULL: no bias in any layer.
LLAMA_API int32_t llama_kvc_set_bias(struct llama_context * ctx, uint32_t ikv, const float * bias, uint32_t n_rows);

// Rotates rows, float32 [n_rows][n_embd_head_k], by the model's RoPE for the positions pos [n_rows], or back (inverse = 1).
// Rotated rows are as cached keys, Hadamard-rotated if those are quantized.
LLAMA_API int32_t llama_kvc_rope(struct llama_context * ctx, uint32_t ikv, float * rows, uint32_t n_rows, const int32_t * pos, int32_t inverse);

// Replaces the first n_tokens cells, which have to be the whole cache of sequence 0 at positions [0, n_tokens).
//   n_kept [n_layer]
//   cells  concatenation over layers of int32 [n_head_kv][n_kept[l]], strictly ascending within a head; n_cells_total entries
//   n_room free cells to allocate behind the composites; a decode that needs more makes the cache grow
// All or nothing: an error leaves the cache as it was.
LLAMA_API int32_t llama_kvc_compose(
        struct llama_context * ctx,
        uint32_t               n_tokens,
        uint32_t               n_layer,
        const uint32_t       * n_kept,
        const int32_t        * cells,
        size_t                 n_cells_total,
        uint32_t               n_room,
        llama_kvc_gather_t     gather);

#ifdef __cplusplus
}
#endif
