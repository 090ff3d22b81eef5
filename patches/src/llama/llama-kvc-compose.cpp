#include "llama-kvc-cache.h"

#include "llama-impl.h"

#include "ggml-backend.h"

std::string llama_kvc::check_compose(uint32_t n_tokens) const {
    if (scoring()) {
        return "scoring is on, end it first";
    }

    const auto & cells = kv.v_cells[0];

    if (cells.get_has_shift()) {
        return "a position shift is pending";
    }
    const uint32_t n_cells = cells.used_max_p1();

    if (cells.get_used() != n_cells || n_cells > n_tokens || (!composed() && n_cells != n_tokens)) {
        return format("the cache holds %u tokens in %u cells, not the %u tokens given", cells.get_used(), n_cells, n_tokens);
    }
    // the composites of an earlier compose end at their context's last position, so all positions are consecutive
    const uint32_t first = n_tokens - n_cells;
    for (uint32_t i = 0; i < n_cells; ++i) {
        if (cells.pos_get(i) != (llama_pos) (first + i) || cells.seq_count(i) != 1 || !cells.seq_has(i, 0)) {
            return format("cell %u is not position %u of sequence 0 alone", i, first + i);
        }
    }

    return "";
}

void llama_kvc::compose(ggml_backend_sched_t sched) {
    const auto p = std::move(pending_plan);

    n_reserved = 0; // it was for the tokens that are composed now

    const uint32_t n_layer = kv.layers.size();
    const uint32_t n_max   = *std::max_element(p->n_kept.begin(), p->n_kept.end());

    const uint32_t n_alloc_new = std::min<uint64_t>(kv.get_size(), uint64_t(n_max) + std::max(p->n_room, 1u));

    // allocate here: below, an exception would leave the cache half composed
    std::vector<uint32_t> offs_new(n_layer);
    std::vector<uint8_t>  stage(n_stage_bytes());
    groups.reserve(n_layer);
    group_of.reserve(n_layer);

    for (uint32_t ikv = 0; ikv < n_layer; ++ikv) {
        offs_new[ikv] = n_max - p->n_kept[ikv];
    }
    n_past = p->n_tokens - p->n_tail;
    offs.swap(offs_new);

    // one layer after the other, so that the peak of memory is the old cache and one layer
    for (uint32_t ikv = 0; ikv < n_layer; ++ikv) {
        const uint32_t  n_rows_new = n_alloc_new - offs[ikv];
        const kept_rows rows       = { p->n_kept[ikv], p->rows[ikv], p->gather, sched };

        // the kept rows always fit where they are: without memory for new tensors the layer stays large, but is composed
        if (n_rows_new == n_rows(ikv) || !rebuild(ikv, n_rows_new, rows)) {
            gather_in_place(ikv, rows, stage);
        }
    }

    set_composites(n_max, p->n_tokens);
    set_layout(std::min(n_alloc_new, n_cells_of_all()));
    trim();
}

size_t llama_kvc::n_stage_bytes() const {
    size_t res = 0;
    for (const auto & layer : kv.layers) {
        if (!ggml_backend_buffer_is_host(layer.k->buffer)) {
            res = std::max({ res, ggml_nbytes(layer.k), layer.v ? ggml_nbytes(layer.v) : 0 });
        }
    }

    return res;
}

void llama_kvc::set_composites(uint32_t n_max, uint32_t n_tokens) {
    auto & cells = kv.v_cells[0];

    cells.reset();

    // The last composite gets position n_tokens - 1. So the next token gets the position that it has in a full cache.
    for (uint32_t i = 0; i < n_max; ++i) {
        cells.pos_set(i, n_tokens - n_max + i);
        cells.seq_add(i, 0);
    }
    kv.v_heads[0] = n_max;
}
