#include "llama-kvc-cache.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-idx.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"

// returns the attention half of a memory that also has recurrent layers, or the memory itself
static llama_memory_i * attention_memory(llama_memory_i * memory) {
    if (auto * iswa = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        return iswa->get_mem_attn();
    }
    if (dynamic_cast<llama_memory_hybrid_idx *>(memory)) {
        return memory; // a third part has an index of the same cells
    }
    auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory);

    return hybrid ? hybrid->get_mem_attn() : memory;
}

uint32_t llama_kvc_swa_cells(llama_memory_i * memory) {
    const auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(attention_memory(memory));

    return iswa ? iswa->get_swa()->get_size() : 0;
}

bool llama_kvc_is_recurrent(llama_memory_i * memory) {
    return attention_memory(memory) != memory;
}

llama_kv_cache * llama_kvc_cache(llama_memory_i * memory) {
    memory = attention_memory(memory);

    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        return iswa->get_base();
    }

    return dynamic_cast<llama_kv_cache *>(memory);
}

llama_kvc * llama_kvc_get(llama_memory_i * memory) {
    auto * kv = llama_kvc_cache(memory);

    return kv ? kv->get_kvc() : nullptr;
}

llama_kvc::llama_kvc(llama_kv_cache & kv) : kv(kv) {
    n_start = kv.layers.empty() ? kv.get_size() : n_rows(0);
    set_layout(n_start);
}

bool llama_kvc::can_seq_rm(llama_pos p0, llama_pos p1) const {
    if (!composed() || kv.v_cells[0].get_used() == 0) {
        return true;
    }
    const bool all = p0 <= 0 && (p1 < 0 || p1 > kv.v_cells[0].seq_pos_max(0));

    return all || p0 >= (llama_pos) n_past;
}

bool llama_kvc::refuses(const char * what) const {
    if (composed()) {
        LLAMA_LOG_ERROR("%s: not possible on a composed KV cache, clear it first\n", what);
    }

    return composed();
}

//
// llama_kv_cache
//

llama_kvc & llama_kv_cache::make_kvc() {
    if (!kvc) {
        kvc = std::make_shared<llama_kvc>(*this);
    }

    return *kvc;
}

std::string llama_kv_cache::kvc_unsupported() const {
    if (other || n_stream != 1 || swa_type != LLAMA_SWA_TYPE_NONE) {
        return "the cache is shared with another context, has several streams or a sliding window";
    }
    if (layers.empty()) {
        return "no layer has a cache";
    }
    for (const auto & layer : layers) {
        if (layer.v && v_trans && hparams.n_embd_v_gqa(layer.il) != hparams.n_embd_v_gqa_max()) {
            return "layers have values of different sizes, which needs flash attention";
        }
        if (hparams.n_head_kv(layer.il) == 0) {
            return format("layer %u has no attention heads", layer.il);
        }
        if (layer.v && !hparams.no_alloc && layer.k->buffer != layer.v->buffer) {
            return "a layer is larger than one buffer of its device";
        }
        if (hparams.n_embd_head_k(layer.il) % ggml_blck_size(layer.k->type) != 0 ||
            hparams.n_embd_head_v(layer.il) % ggml_blck_size(layer.v ? layer.v->type : layer.k->type) != 0) {
            return format("a head of layer %u is no whole number of quantization blocks", layer.il);
        }
    }

    return "";
}
