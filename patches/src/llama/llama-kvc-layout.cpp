#include "llama-kvc-cache.h"

#include "ggml-backend.h"

#include <atomic>

uint64_t llama_kvc::new_epoch() {
    static std::atomic<uint64_t> last;

    return ++last;
}

uint32_t llama_kvc::n_cells_used() const {
    return kv.v_cells[0].used_max_p1();
}

uint32_t llama_kvc::n_rows_before(uint32_t ikv, uint32_t n_cells) const {
    return n_cells > off(ikv) ? n_cells - off(ikv) : 0;
}

uint32_t llama_kvc::n_rows_used(uint32_t ikv) const {
    return n_rows_before(ikv, n_cells_used());
}

size_t llama_kvc::n_bytes(uint32_t ikv) const {
    return ggml_backend_buffer_get_size(kv.layers[ikv].k->buffer);
}

uint32_t llama_kvc::n_cells_of_all() const {
    uint32_t res = kv.get_size();
    for (uint32_t ikv = 0; ikv < kv.layers.size(); ++ikv) {
        res = std::min(res, n_rows(ikv) + off(ikv));
    }

    return res;
}

void llama_kvc::set_layout(uint32_t n_alloc_new) {
    n_alloc = n_alloc_new;

    groups.clear();
    group_of.assign(kv.layers.size(), 0);

    for (uint32_t ikv = 0; ikv < kv.layers.size(); ++ikv) {
        const group cur = { off(ikv), n_rows(ikv) };

        const auto it = std::find_if(groups.begin(), groups.end(), [&](const group & g) {
            return g.off == cur.off && g.n_rows == cur.n_rows;
        });

        group_of[ikv] = it - groups.begin();
        if (it == groups.end()) {
            groups.push_back(cur);
        }
    }

    n_epoch = new_epoch();
}
