#pragma once

// Flash attention on the CPU for batches, for keys and values of any type, that can also reduce the attention
// probabilities over the query tokens.
//
// A GGML_OP_FLASH_ATTN_EXT with GGML_KVC_OP_PARAM_ON takes this way. If it has a fifth source, F32 ne [n_cells, n_head],
// the op accumulates into it, for every head and each of the first n_cells cells, the maximum or the sum of the
// probabilities over the op's query tokens. The scores are the q*k products that attention needs anyway.

#include "ggml-cpu-impl.h"

// op params of such a node, behind llama.cpp's own
enum ggml_kvc_op_param {
    GGML_KVC_OP_PARAM_AGG     = 8, // 0: maximum, 1: sum
    GGML_KVC_OP_PARAM_MAX_KIB = 9, // work memory that may be used to keep q*k products, of all threads together
    GGML_KVC_OP_PARAM_ON      = 10,
};

#ifdef __cplusplus
extern "C" {
#endif

size_t ggml_kvc_flash_attn_work_size(const struct ggml_tensor * dst, int n_threads);

void ggml_kvc_compute_forward_flash_attn(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
