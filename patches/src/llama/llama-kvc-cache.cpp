#include "llama-kvc-cache.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"

llama_kv_cache * llama_kvc_cache(llama_memory_i * memory) {
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
    if (layers.empty() || map_layer_ids.size() != layers.size()) {
        return "some layers share one cache";
    }
    if (v_trans && hparams.is_n_embd_v_gqa_variable()) {
        return "layers have values of different sizes, which needs flash attention";
    }
    for (const auto & layer : layers) {
        if (!layer.v) {
            return "the cache stores no values";
        }
        if (hparams.n_head_kv(layer.il) == 0) {
            return format("layer %u has no attention heads", layer.il);
        }
        if (!hparams.no_alloc && layer.k->buffer != layer.v->buffer) {
            return "a layer is larger than one buffer of its device";
        }
        if (hparams.n_embd_head_k(layer.il) % ggml_blck_size(layer.k->type) != 0 ||
            hparams.n_embd_head_v(layer.il) % ggml_blck_size(layer.v->type) != 0) {
            return format("a head of layer %u is no whole number of quantization blocks", layer.il);
        }
    }

    return "";
}
