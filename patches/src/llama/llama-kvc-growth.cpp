#include "llama-kvc-cache.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

// llama.cpp's own padding of n_kv: with the same sizes a growing cache has the graphs of a fixed one
static constexpr uint32_t n_pad = 256;

static thread_local uint32_t g_start_cells = 0;

void llama_kvc_set_start_cells(uint32_t n_cells) {
    g_start_cells = n_cells;
}

uint32_t llama_kvc_start_rows(const llama_model & model, uint32_t kv_size) {
    // in these memories other parts have the cells of this one, and one cannot grow without the others
    const bool is_part = model.arch == LLM_ARCH_DEEPSEEK4 || model.hparams.indexer_head_size > 0;

    return g_start_cells == 0 || is_part ? kv_size : std::min<uint32_t>(kv_size, GGML_PAD(g_start_cells, n_pad));
}

uint32_t llama_kvc::padded(uint32_t n_cells) const {
    return std::min<uint32_t>(kv.get_size(), composed() ? n_cells : GGML_PAD(n_cells, n_pad));
}

bool llama_kvc::pending() const {
    if (pending_plan || std::max(n_wanted, n_reserved) > n_alloc) {
        return true;
    }

    return kv.v_cells[0].get_used() == 0 && (composed() || n_alloc != n_empty());
}

void llama_kvc::apply_pending(ggml_backend_sched_t sched) {
    if (pending_plan) {
        compose(sched);
    } else if (kv.v_cells[0].get_used() == 0) {
        n_past = 0;
        offs.clear();
        resize(std::min(kv.get_size(), std::max(n_empty(), n_wanted)));
    } else {
        resize(std::max({ n_alloc, n_wanted, n_reserved }));
    }

    n_wanted = 0;
}

void llama_kvc::reserve(uint32_t n_cells) {
    n_reserved = padded(n_cells);
}

bool llama_kvc::reserve_rows(uint32_t n_cells) {
    if (n_cells > n_alloc) {
        resize(padded(n_cells));
    }

    return n_alloc >= std::min(n_cells, kv.get_size());
}

bool llama_kvc::fits(const llama_kv_cache::slot_info_vec_t & sinfos) {
    if (!active()) {
        return true;
    }

    uint32_t n_cells = 0;
    for (const auto & sinfo : sinfos) {
        for (const uint32_t i : sinfo.idxs[0]) {
            n_cells = std::max(n_cells, i + 1);
        }
    }
    if (n_cells <= n_alloc) {
        return true;
    }

    // a quarter more, so that a long answer is copied only a few times
    n_wanted = padded(n_cells + std::max(256u, n_cells/4));

    return false;
}

void llama_kvc::resize(uint32_t n_alloc_new) {
    const uint32_t n_used = n_cells_used();

    bool ok = true;

    for (uint32_t ikv = 0; ok && ikv < kv.layers.size(); ++ikv) {
        const uint32_t  n_rows_new = n_alloc_new - off(ikv);
        const kept_rows rows       = { n_used > off(ikv) ? n_used - off(ikv) : 0, nullptr, nullptr, nullptr };

        ok = n_rows(ikv) == n_rows_new || rebuild(ikv, n_rows_new, rows);
    }

    if (!ok) {
        // some layers have new sizes, the others not: continue with the cells that all of them have
        LLAMA_LOG_ERROR("%s: no memory for %u cells\n", __func__, n_alloc_new);
        n_alloc_new = std::min(n_alloc_new, n_cells_of_all());
        n_reserved  = 0; // otherwise every decode would try again
    }

    if (n_alloc_new < n_alloc) {
        trim();
    }
    set_layout(n_alloc_new);
}

void llama_kvc::trim() {
#if defined(__GLIBC__)
    // Once glibc has raised its mmap threshold, layers of a few MB come from the heap. Give its holes back.
    malloc_trim(0);
#endif
}
