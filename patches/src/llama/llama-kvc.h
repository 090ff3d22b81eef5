#pragma once

// C API of the KV compression: layer geometry, attention scores, probes, compose.
//
// Errors. A function that returns int32_t returns a llama_kvc_status. After a failure, llama_kvc_last_error() returns one
// sentence about it. No function throws, and none aborts because of an argument.
//   LLAMA_KVC_ERR_ARGUMENT also if ctx is NULL, and if there is no layer ikv
//   LLAMA_KVC_ERR_UNSUPPORTED from every function with a ctx if llama_kvc_supported() returns it
//   LLAMA_KVC_ERR_MEMORY from every function that allocates
// The comment of each function names only what comes on top of these.
//
// Contexts. Supported are contexts of one sequence (n_seq_max = 1) with a plain KV cache (llama_kv_cache), or with one that
// has sliding windows beside it; then only the layers without a window are seen here. Like the other functions of
// llama.cpp, these must not run at the same time for one context.
//
// Words. ikv counts the layers that have a cache, from 0 to n_layer - 1; il is the layer's index in the model. A cell is an
// entry of the cache's list of positions, the same for all layers. A row is the stored key and value of one token in one
// layer. In a composed cache a row is a composite: each of its heads may hold another token.
//
// Shapes are in C order: the last index is contiguous.

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

#define LLAMA_KVC_ABI 10

#ifdef __cplusplus
extern "C" {
#endif

enum llama_kvc_status {
    LLAMA_KVC_OK              =  0,
    LLAMA_KVC_ERR_ARGUMENT    = -1, // an argument is out of range
    LLAMA_KVC_ERR_UNSUPPORTED = -2, // this model, kind of cache or cache type cannot do it
    LLAMA_KVC_ERR_STATE       = -3, // not now: for example, the cache is composed already
    LLAMA_KVC_ERR_MEMORY      = -4, // an allocation failed
    LLAMA_KVC_ERR_INTERNAL    = -5, // an exception of llama.cpp
};

enum llama_kvc_agg {
    LLAMA_KVC_AGG_MAX = 0,
    LLAMA_KVC_AGG_SUM = 1,
};

enum llama_kvc_tap {
    LLAMA_KVC_TAP_QUERIES = 1, // with RoPE, and scaled so that their products with the keys are the attention logits
    LLAMA_KVC_TAP_OUTPUTS = 2, // of attention, before the output projection
};

struct llama_kvc_cache_info {
    uint32_t n_layer;       // layers that have a cache
    uint32_t n_cells;       // cells of the cache: n_ctx, padded
    uint32_t n_cells_alloc; // cells that every layer has room for
    uint32_t n_cells_used;  // index of the last used cell + 1
    uint32_t n_composed;    // tokens that belong to composites and cannot be removed; 0: the cache is not composed
    int32_t  scoring;       // 1 between llama_kvc_scores_begin and llama_kvc_scores_end
    uint32_t n_cells_swa;   // cells of the layers with a sliding window, which are not compressed; 0: no such layers
    uint32_t recurrent;     // 1: there are also recurrent layers, which cannot go back
    uint64_t n_bytes;       // bytes of all K and V buffers, without those of the layers with a sliding window
};

struct llama_kvc_layer_info {
    int32_t  il;
    int32_t  n_head;
    int32_t  n_head_kv;
    int32_t  n_embd_head_k;
    int32_t  n_embd_head_v;
    int32_t  type_k;        // ggml_type
    int32_t  type_v;        // ggml_type
    int32_t  v_trans;       // 1: V is stored as [n_embd_v][row], as it is without flash attention
    int32_t  v_in_k;        // 1: there is no V; a value is the first n_embd_head_v elements of its key (latent attention)
    uint32_t n_rows;        // rows allocated
    uint32_t n_rows_used;   // rows that hold a composite or a token
    uint64_t n_bytes;       // bytes of the layer's buffer
    uint64_t n_bytes_row;   // bytes of one row, K and V together
    void   * k;             // address of the K tensor; NULL: it is in device memory
    void   * v;             // address of the V tensor; NULL: it is in device memory, or v_in_k
    const char * buffer;    // name of the layer's buffer
};

// Copies rows. For every head h, chunk c and j < n_kept it copies n_bytes bytes
//   from src + rows[h*n_kept + j]*src_row + h*src_head + c*src_chunk
//   to   dst + j*dst_row                  + h*dst_head + c*dst_chunk
// rows are strictly ascending within a head. src may equal dst, so j must run upwards.
typedef void (*llama_kvc_gather_t)(
        const uint8_t * src, uint8_t * dst, const int32_t * rows,
        int64_t n_head, int64_t n_kept, int64_t n_chunk, int64_t n_bytes,
        int64_t src_row, int64_t src_head, int64_t src_chunk,
        int64_t dst_row, int64_t dst_head, int64_t dst_chunk);

//
// library
//

// returns LLAMA_KVC_ABI of the library, which callers compare with the one that they were written for
LLAMA_API uint32_t llama_kvc_abi(void);

// returns the llama.cpp commit that the library was built from
LLAMA_API const char * llama_kvc_commit(void);

// Returns the sentence about the calling thread's last failure, or an empty string. Valid until the thread's next failure.
LLAMA_API const char * llama_kvc_last_error(void);

// Prints messages of at least this level to stderr from now on, as llama_log_set() with a callback would; one that continues
// another has that one's level, one without a level is always printed. Threads may call it at any time.
LLAMA_API void llama_kvc_log(enum ggml_log_level level);

// returns LLAMA_KVC_OK if compression can work on this context
LLAMA_API int32_t llama_kvc_supported(struct llama_context * ctx);

//
// geometry and bytes
//

// Writes what the whole cache is now to info.
//   size  sizeof(*info) of the caller, which must be that of the library (ERR_ARGUMENT)
LLAMA_API int32_t llama_kvc_get_cache(struct llama_context * ctx, struct llama_kvc_cache_info * info, size_t size);

// Writes what layer ikv is now to info; size as above. The addresses in info are valid until the cache next changes.
LLAMA_API int32_t llama_kvc_get_layer(struct llama_context * ctx, uint32_t ikv, struct llama_kvc_layer_info * info, size_t size);

// Copies size bytes from offset on of the layer's K (is_v = 0) or V tensor (is_v = 1) to dst, from host or device memory.
//   ERR_ARGUMENT  dst is NULL, or the tensor ends before offset + size
LLAMA_API int32_t llama_kvc_get_tensor(struct llama_context * ctx, uint32_t ikv, int32_t is_v, void * dst, size_t offset, size_t size);

// Overwrites these bytes with those of src. Does not check what the bytes mean. Errors as above.
LLAMA_API int32_t llama_kvc_set_tensor(struct llama_context * ctx, uint32_t ikv, int32_t is_v, const void * src, size_t offset, size_t size);

//
// room
//

// Contexts that this thread creates from now on start with n_cells cells a layer, rounded up to 256, instead of n_ctx. They
// grow with their contents, and shrink when they are empty. 0 is the default: n_ctx cells from the start.
LLAMA_API void llama_kvc_set_start_cells(uint32_t n_cells);

// Makes room for n_cells cells now, so that the cache need not grow in steps. The room lasts until the next compose or the
// next call. An empty cache gives back the room beyond n_cells and the cells that it started with.
//   ERR_ARGUMENT  n_cells is larger than the cache
//   ERR_MEMORY    the cache still holds what it held
LLAMA_API int32_t llama_kvc_reserve(struct llama_context * ctx, uint32_t n_cells);

//
// attention
//

// on = 1: flash attention of 16 tokens and more uses our own kernel on the CPU. It is the same up to rounding, and faster,
// most of all with quantized keys and values. 0 is the default: llama.cpp's kernel.
LLAMA_API int32_t llama_kvc_set_fast_attention(struct llama_context * ctx, int32_t on);

// The next decode begins at position pos and leaves a gap behind the tokens of the cache, as if there were more of them. Call
// it again with -1 before the tokens of that decode are removed.
//   ERR_ARGUMENT  pos is neither -1 nor behind the last token
LLAMA_API int32_t llama_kvc_skip_to(struct llama_context * ctx, llama_pos pos);

// Decodes one token for each of n contexts in one graph, which reads the weights once: tokens[i] at position pos[i], directly
// behind the last token of ctxs[i]. Afterwards each context has the logits of its token, as after a decode of its own. All
// contexts must have the same model, and none may be used by another thread meanwhile. After a failure no context has the
// new token, and the logits of all of them are gone.
//   ERR_ARGUMENT     also if a context occurs twice, or has another model than the first
//   ERR_UNSUPPORTED  also if the model has sliding windows, recurrent layers, latent attention or M-RoPE, or if the contexts
//                    have different adapters
//   ERR_STATE        one of the caches is full, or one of the contexts is scoring
LLAMA_API int32_t llama_kvc_decode_joint(struct llama_context * const * ctxs, const llama_token * tokens, const llama_pos * pos, uint32_t n);

// Starts scoring. Until llama_kvc_scores_end() all decodes collect, for every layer and query head, the attention
// probabilities of the layer's rows in cells [0, n_cells), reduced over all query tokens. In a composed cache these are the
// composites and the tokens behind them; their number differs between layers.
//   agg        llama_kvc_agg: how to reduce
//   max_bytes  limit of the working memory, not counting the scores themselves (float32, n_head for every row)
//   ERR_ARGUMENT  agg is unknown, n_cells is 0 or larger than the cache
//   ERR_STATE     scoring is on
LLAMA_API int32_t llama_kvc_scores_begin(struct llama_context * ctx, int32_t agg, uint32_t n_cells, size_t max_bytes);

// Tells how many rows of layer ikv are scored.
//   ERR_STATE  scoring is off
LLAMA_API int32_t llama_kvc_scores_n_rows(struct llama_context * ctx, uint32_t ikv, uint32_t * n_rows);

// Copies the scores so far of layer ikv.
//   dst  float32 [n_head][n_rows], n_rows of llama_kvc_scores_n_rows
//   n    number of floats in dst, n_head*n_rows (ERR_ARGUMENT)
//   ERR_STATE  scoring is off
LLAMA_API int32_t llama_kvc_scores_get(struct llama_context * ctx, uint32_t ikv, float * dst, size_t n);

// Ends scoring and frees the scores. Does nothing if scoring is off.
LLAMA_API int32_t llama_kvc_scores_end(struct llama_context * ctx);

//
// probes
//

// Starts taps. Until llama_kvc_taps_end() every decode copies vectors of its first n_tokens tokens. llama.cpp splits a
// decode of more than n_ubatch tokens into several; then the vectors are those of the last one.
//   what      a sum of llama_kvc_tap
//   n_tokens  1 to n_ubatch
//   ERR_ARGUMENT  what or n_tokens is out of range
//   ERR_STATE     taps are on
LLAMA_API int32_t llama_kvc_taps_begin(struct llama_context * ctx, int32_t what, uint32_t n_tokens);

// Copies the vectors of the latest decode for layer ikv. Rows beyond that decode's tokens are older. If keys (for outputs:
// values) are quantized, the vectors are Hadamard-rotated as the cached rows are.
//   what  one llama_kvc_tap
//   dst   float32 [n][n_head][n_embd_head]; n_embd_head is n_embd_head_k for queries, n_embd_head_v for outputs
//   n     number of floats in dst: whole tokens, and at most n_tokens of them (ERR_ARGUMENT)
//   ERR_STATE  this tap is off
LLAMA_API int32_t llama_kvc_taps_get(struct llama_context * ctx, uint32_t ikv, int32_t what, float * dst, size_t n);

// Ends all taps and frees their memory. Does nothing if they are off.
LLAMA_API int32_t llama_kvc_taps_end(struct llama_context * ctx);

// Adds a bias to the attention logits of a layer's first n_rows rows in all later decodes. llama.cpp then does not fuse
// attention in any layer.
//   bias    float32 [n_head_kv][n_rows], -inf hides a row; NULL removes the biases of all layers
//   n_rows  1 to n_cells (ERR_ARGUMENT)
//   ERR_UNSUPPORTED  V is quantized, which needs fused attention
LLAMA_API int32_t llama_kvc_set_bias(struct llama_context * ctx, uint32_t ikv, const float * bias, uint32_t n_rows);

// Rotates key vectors in place by the model's RoPE, to positions or back from them. Rotated rows are as cached keys are; if
// those are quantized, that includes the Hadamard rotation.
//   rows     float32 [n_rows][n_embd_head_k]
//   pos      int32 [n_rows]
//   inverse  1: back
//   ERR_ARGUMENT     rows or pos is NULL, or n_rows is 0
//   ERR_UNSUPPORTED  the layer's graph does not tell how its keys are rotated, or nothing was evaluated yet
LLAMA_API int32_t llama_kvc_rope(struct llama_context * ctx, uint32_t ikv, float * rows, uint32_t n_rows, const int32_t * pos, int32_t inverse);

//
// compose
//

// Replaces the rows of all layers by some of them: row j of layer ikv gets, for every head, its j-th kept row. The cache
// must hold sequence 0 alone, up to position n_tokens - 1. If it is composed already, its rows are composites and the tokens
// behind them. An error leaves the cache as it was.
//   n_tokens  tokens that the cache stands for
//   n_tail    so many last tokens are kept in every head, and stay plain tokens, which can be removed; below n_tokens
//   n_layer   the cache's number of layers
//   n_kept    [n_layer], at least n_tail and at most the used rows of each layer, and not all 0
//   rows      int32 [n_head_kv][n_kept[ikv]] for one layer after the other; in [0, n_rows_used), strictly ascending in a head
//   n_rows_total  number of entries in rows
//   n_room    free cells to allocate behind the composites; the cache grows if a decode needs more
//   gather    copies the rows
//   ERR_ARGUMENT  a pointer is NULL, or n_tail, n_layer, n_kept or rows do not fit this cache
//   ERR_STATE     the cache holds other tokens, the tail has composites, or scoring is on
LLAMA_API int32_t llama_kvc_compose(
        struct llama_context * ctx,
        uint32_t               n_tokens,
        uint32_t               n_tail,
        uint32_t               n_layer,
        const uint32_t       * n_kept,
        const int32_t        * rows,
        size_t                 n_rows_total,
        uint32_t               n_room,
        llama_kvc_gather_t     gather);

#ifdef __cplusplus
}
#endif
