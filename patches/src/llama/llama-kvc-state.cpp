#include "llama-kvc-cache.h"

#include "llama-io.h"

#include <stdexcept>

void llama_kvc::state_write(llama_io_write_i & io) const {
    const uint32_t n_layer = kv.layers.size();

    io.write(&state_magic, sizeof(state_magic));
    io.write(&n_past,      sizeof(n_past));
    io.write(&n_alloc,     sizeof(n_alloc));
    io.write(&n_layer,     sizeof(n_layer));
    io.write(offs.data(),  sizeof(offs[0])*n_layer);
}

void llama_kvc::state_read(llama_io_read_i & io) {
    uint32_t n_past_new  = 0;
    uint32_t n_alloc_new = 0;
    uint32_t n_layer     = 0;

    io.read(&n_past_new,  sizeof(n_past_new));
    io.read(&n_alloc_new, sizeof(n_alloc_new));
    io.read(&n_layer,     sizeof(n_layer));

    n_alloc_new = std::min(n_alloc_new, kv.get_size());

    if (n_layer != kv.layers.size() || n_past_new == 0) {
        throw std::runtime_error("the state of a composed cache belongs to another model");
    }

    std::vector<uint32_t> offs_new(n_layer);
    io.read(offs_new.data(), sizeof(offs_new[0])*n_layer);

    if (*std::max_element(offs_new.begin(), offs_new.end()) >= n_alloc_new) {
        throw std::runtime_error("the state of a composed cache does not fit into this context");
    }

    n_past = n_past_new;
    offs   = std::move(offs_new);
    resize(n_alloc_new);

    if (n_alloc != n_alloc_new) {
        throw std::runtime_error("no memory for the layers of a composed cache");
    }
}

llama_kvc::ranges llama_kvc::rows(const ranges & cells, uint32_t il) const {
    const uint32_t off_l = off(ikv_of(il));

    ranges res;
    for (const auto & [from, to] : cells) {
        if (to > off_l) {
            res.emplace_back(std::max(from, off_l) - off_l, to - off_l);
        }
    }

    return res;
}
