#pragma once

// Flash attention of batches on the CPU, for keys and values of any type. It can also reduce the attention probabilities
// over the query tokens.
//
// It computes every GGML_OP_FLASH_ATTN_EXT that has GGML_KVC_OP_PARAM_ON set. If the node has scores, F32 ne
// [n_cells, n_head] as src[GGML_KVC_SRC_SCORES], it accumulates into them, for every head and each of the first n_cells
// cells, the maximum or the sum of the probabilities over the node's query tokens. That needs no second pass over the keys:
// attention computes the q*k products anyway.

#include "ggml-cpu-impl.h"

// op params of such a node, behind llama.cpp's own
enum ggml_kvc_op_param {
    GGML_KVC_OP_PARAM_AGG     = 8, // ggml_kvc_agg
    GGML_KVC_OP_PARAM_MAX_KIB = 9, // limit of the work memory for kept q*k products, of all threads together
    GGML_KVC_OP_PARAM_ON      = 10,
};

enum ggml_kvc_agg {
    GGML_KVC_AGG_MAX = 0,
    GGML_KVC_AGG_SUM = 1,
};

enum ggml_kvc_src {
    GGML_KVC_SRC_SCORES = 5,
};

#ifdef __cplusplus
extern "C" {
#endif

// returns the bytes of work memory that the node needs with n_threads threads
size_t ggml_kvc_flash_attn_work_size(const struct ggml_tensor * dst, int n_threads);

void ggml_kvc_compute_forward_flash_attn(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
