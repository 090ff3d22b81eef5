#include "llama-kvc.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kvc-cache.h"
#include "llama-kvc-guard.h"
#include "llama-model.h"
#include "llama-version.h"

#include <algorithm>
#include <atomic>
#include <cstdio>

using namespace llama_kvc_guard;

static std::atomic<int> log_level;
static std::atomic<int> log_last_level;

static void log_to_stderr(ggml_log_level level, const char * text, void *) {
    const int of_text = level == GGML_LOG_LEVEL_CONT ? log_last_level.load() : level;
    log_last_level = of_text;

    if (of_text == GGML_LOG_LEVEL_NONE || of_text >= log_level) {
        fputs(text, stderr);
        fflush(stderr);
    }
}

uint32_t llama_kvc_abi(void) {
    return LLAMA_KVC_ABI;
}

const char * llama_kvc_commit(void) {
    return LLAMA_COMMIT;
}

void llama_kvc_log(ggml_log_level level) {
    log_level = level;
    llama_log_set(log_to_stderr, nullptr);
}

int32_t llama_kvc_supported(llama_context * ctx) {
    return with_cache(ctx, [](const cache &) {});
}

//
// geometry and bytes
//

int32_t llama_kvc_get_cache(llama_context * ctx, llama_kvc_cache_info * info, size_t size) {
    return with_cache(ctx, [&](const cache & c) {
        if (!info || size != sizeof(*info)) {
            fail(LLAMA_KVC_ERR_ARGUMENT, format("llama_kvc_cache_info has %zu bytes here, the caller's has %zu", sizeof(*info), size));
        }

        const auto & kvc = c.kvc();

        *info = {};
        info->n_layer       = c.kv.get_layer_ids().size();
        info->n_cells       = c.kv.get_size();
        info->n_cells_alloc = kvc.n_cells_alloc();
        info->n_cells_used  = kvc.n_cells_used();
        info->n_composed    = kvc.n_composed();
        info->scoring       = kvc.scoring();
        info->n_cells_swa   = llama_kvc_swa_cells(c.ctx.get_memory());
        info->recurrent     = llama_kvc_is_recurrent(c.ctx.get_memory());
        for (uint32_t ikv = 0; ikv < info->n_layer; ++ikv) {
            info->n_bytes += kvc.n_bytes(ikv);
        }
    });
}

int32_t llama_kvc_get_layer(llama_context * ctx, uint32_t ikv, llama_kvc_layer_info * info, size_t size) {
    return with_layer(ctx, ikv, [&](const layer & l) {
        if (!info || size != sizeof(*info)) {
            fail(LLAMA_KVC_ERR_ARGUMENT, format("llama_kvc_layer_info has %zu bytes here, the caller's has %zu", sizeof(*info), size));
        }

        l.ctx.synchronize(); // the caller may read through the pointers

        const auto & hparams = l.ctx.get_model().hparams;
        const auto & kvc     = l.kvc();
        const bool   is_host = ggml_backend_buffer_is_host(l.k->buffer);

        *info = {};
        info->il            = l.il;
        info->n_head        = hparams.n_head(l.il);
        info->n_head_kv     = hparams.n_head_kv(l.il);
        info->n_embd_head_k = hparams.n_embd_head_k(l.il);
        info->n_embd_head_v = hparams.n_embd_head_v(l.il);
        info->type_k        = l.k->type;
        info->type_v        = l.v ? l.v->type : l.k->type;
        info->v_trans       = l.v && l.kv.is_v_trans();
        info->v_in_k        = !l.v;
        info->n_rows        = l.k->ne[1];
        info->n_rows_used   = kvc.n_rows_used(ikv);
        info->n_bytes       = kvc.n_bytes(ikv);
        info->n_bytes_row   = ggml_row_size(l.k->type, l.k->ne[0]) + (l.v ? ggml_row_size(l.v->type, l.v->ne[0]) : 0);
        info->k             = is_host ? l.k->data : nullptr;
        info->v             = is_host && l.v ? l.v->data : nullptr;
        info->buffer        = ggml_backend_buffer_name(l.k->buffer);
    });
}

// returns the layer's tensor; fails if it has no such bytes or the caller's pointer is NULL
static ggml_tensor * check_bytes(const layer & l, int32_t is_v, const void * bytes, size_t offset, size_t size) {
    ggml_tensor * t = is_v ? l.v : l.k;
    if (!t) {
        fail(LLAMA_KVC_ERR_ARGUMENT, "the values of this layer are the beginnings of its keys");
    }

    const size_t n_bytes = ggml_nbytes(t);
    if (!bytes || offset > n_bytes || size > n_bytes - offset) {
        fail(LLAMA_KVC_ERR_ARGUMENT, format("bytes [%zu, +%zu) of a tensor of %zu", offset, size, n_bytes));
    }

    return t;
}

int32_t llama_kvc_get_tensor(llama_context * ctx, uint32_t ikv, int32_t is_v, void * dst, size_t offset, size_t size) {
    return with_layer(ctx, ikv, [&](const layer & l) {
        const ggml_tensor * t = check_bytes(l, is_v, dst, offset, size);

        l.ctx.synchronize();
        ggml_backend_tensor_get(t, dst, offset, size);
    });
}

int32_t llama_kvc_set_tensor(llama_context * ctx, uint32_t ikv, int32_t is_v, const void * src, size_t offset, size_t size) {
    return with_layer(ctx, ikv, [&](const layer & l) {
        ggml_tensor * t = check_bytes(l, is_v, src, offset, size);

        l.ctx.synchronize();
        ggml_backend_tensor_set(t, src, offset, size);
    });
}

//
// room
//

int32_t llama_kvc_reserve(llama_context * ctx, uint32_t n_cells) {
    return with_cache(ctx, [&](const cache & c) {
        if (n_cells > c.kv.get_size()) {
            fail(LLAMA_KVC_ERR_ARGUMENT, format("n_cells = %u, the cache can have %u", n_cells, c.kv.get_size()));
        }

        c.kvc().reserve(n_cells);
        c.update();

        if (c.kvc().n_cells_alloc() < n_cells) {
            fail(LLAMA_KVC_ERR_MEMORY, format("no memory for %u cells", n_cells));
        }
    });
}

//
// compose
//

// fails if the rows of one layer are not below n_used and strictly ascending within a head, or do not end with its last n_tail
static void check_rows(uint32_t ikv, const int32_t * rows, uint32_t n_head_kv, uint32_t n_kept, uint32_t n_used, uint32_t n_tail) {
    for (uint32_t h = 0; h < n_head_kv; ++h) {
        const int32_t * head = rows + size_t(h)*n_kept;
        for (uint32_t j = 0; j < n_kept; ++j) {
            if (head[j] < 0 || (uint32_t) head[j] >= n_used || (j > 0 && head[j] <= head[j - 1])) {
                fail(LLAMA_KVC_ERR_ARGUMENT, format("layer %u: row %d is not in [0, %u) or not ascending", ikv, head[j], n_used));
            }
        }
        // they ascend, so the rows behind this one are the last ones, too
        if (n_tail > 0 && (uint32_t) head[n_kept - n_tail] != n_used - n_tail) {
            fail(LLAMA_KVC_ERR_ARGUMENT, format("layer %u: head %u does not keep its last %u rows", ikv, h, n_tail));
        }
    }
}

// divides the caller's array among the layers of the plan; fails if it does not fit them
static void set_rows(const cache & c, llama_kvc::plan & plan, const int32_t * rows, size_t n_rows_total) {
    const auto & hparams = c.ctx.get_model().hparams;
    const auto   ids     = c.kv.get_layer_ids();

    size_t offset = 0;
    for (uint32_t ikv = 0; ikv < plan.n_kept.size(); ++ikv) {
        const uint32_t n_kept    = plan.n_kept[ikv];
        const uint32_t n_used    = c.kvc().n_rows_used(ikv);
        const uint32_t n_head_kv = hparams.n_head_kv(ids[ikv]);
        if (n_kept > n_used || n_kept < plan.n_tail) {
            fail(LLAMA_KVC_ERR_ARGUMENT, format("n_kept[%u] = %u of %u rows, with the last %u", ikv, n_kept, n_used, plan.n_tail));
        }

        const size_t n = size_t(n_head_kv)*n_kept;
        if (n > n_rows_total - offset) {
            fail(LLAMA_KVC_ERR_ARGUMENT, format("rows has %zu entries, layer %u ends at %zu", n_rows_total, ikv, offset + n));
        }

        check_rows(ikv, rows + offset, n_head_kv, n_kept, n_used, plan.n_tail);
        plan.rows.push_back(rows + offset);
        offset += n;
    }
    if (offset != n_rows_total) {
        fail(LLAMA_KVC_ERR_ARGUMENT, format("rows has %zu entries, n_kept needs %zu", n_rows_total, offset));
    }
}

static void apply(const cache & c, llama_kvc::plan plan) {
    // frees the compute buffers of a scoring pass before the layers need memory
    c.ctx.synchronize();
    c.ctx.kvc_reserve();
    c.ctx.sched_reserve();

    // the cache's own way to change: update() applies the plan, and llama.cpp drops the old graphs
    c.kvc().set_plan(std::move(plan));
    try {
        c.ctx.memory_update(true);
    } catch (...) {
        c.kvc().drop_plan(); // its arrays belong to the caller
        throw;
    }
    c.kvc().drop_plan();
    c.ctx.sched_reserve(); // compute buffers for the smaller cache

    if (!c.kvc().composed()) {
        fail(LLAMA_KVC_ERR_INTERNAL, "the memory update did not compose the cache");
    }
}

int32_t llama_kvc_compose(
        llama_context    * ctx,
        uint32_t           n_tokens,
        uint32_t           n_tail,
        uint32_t           n_layer,
        const uint32_t   * n_kept,
        const int32_t    * rows,
        size_t             n_rows_total,
        uint32_t           n_room,
        llama_kvc_gather_t gather) {
    return with_cache(ctx, [&](const cache & c) {
        if (!n_kept || !rows || !gather) {
            fail(LLAMA_KVC_ERR_ARGUMENT, "n_kept, rows or gather is NULL");
        }
        if (n_layer != c.kv.get_layer_ids().size()) {
            fail(LLAMA_KVC_ERR_ARGUMENT, format("n_layer = %u, the cache has %zu layers", n_layer, c.kv.get_layer_ids().size()));
        }
        if (n_tokens == 0 || *std::max_element(n_kept, n_kept + n_layer) == 0) {
            fail(LLAMA_KVC_ERR_ARGUMENT, "nothing to keep: n_tokens or every n_kept is 0");
        }
        if (n_tail >= n_tokens) {
            fail(LLAMA_KVC_ERR_ARGUMENT, format("n_tail = %u of %u tokens leaves nothing to compose", n_tail, n_tokens));
        }

        const std::string why = c.kvc().check_compose(n_tokens);
        if (!why.empty()) {
            fail(LLAMA_KVC_ERR_STATE, why);
        }
        if (n_tokens - n_tail < c.kvc().n_composed()) {
            fail(LLAMA_KVC_ERR_STATE, format("the last %u tokens are not plain tokens: %u of %u are composed", n_tail, c.kvc().n_composed(), n_tokens));
        }

        llama_kvc::plan plan = { n_tokens, n_tail, n_room, { n_kept, n_kept + n_layer }, {}, gather };
        set_rows(c, plan, rows, n_rows_total);
        apply(c, std::move(plan));
    });
}
