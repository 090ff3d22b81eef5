#include "llama-kvc-cache.h"

#include "llama-hparams.h"

#include "ggml-backend.h"

ggml_tensor * llama_kvc::get_k(ggml_context * ctx, int32_t il, uint32_t n_kv) const {
    const uint32_t ikv = ikv_of(il);

    ggml_tensor * k = kv.layers[ikv].k;

    const int64_t n_embd_head_k = kv.hparams.n_embd_head_k(il);

    return ggml_view_4d(ctx, k,
            n_embd_head_k, kv.hparams.n_head_kv(il), n_kv - off(ikv), 1,
            ggml_row_size(k->type, n_embd_head_k), k->nb[1], k->nb[2], 0);
}

ggml_tensor * llama_kvc::get_v(ggml_context * ctx, int32_t il, uint32_t n_kv) const {
    const uint32_t ikv = ikv_of(il);

    ggml_tensor * v = kv.layers[ikv].v;

    const int64_t n_embd_head_v = kv.hparams.n_embd_head_v(il);
    const int64_t n_head_kv     = kv.hparams.n_head_kv(il);

    if (!kv.v_trans) {
        return ggml_view_4d(ctx, v,
                n_embd_head_v, n_head_kv, n_kv - off(ikv), 1,
                ggml_row_size(v->type, n_embd_head_v), v->nb[1], v->nb[2], 0);
    }

    return ggml_view_4d(ctx, v,
            n_kv - off(ikv), n_head_kv, n_embd_head_v, 1,
            ggml_row_size(v->type, v->ne[1]*n_embd_head_v), ggml_row_size(v->type, v->ne[1]), v->nb[2], 0);
}

ggml_tensor * llama_kvc::new_idxs(ggml_context * ctx, int64_t n) const {
    return ggml_new_tensor_2d(ctx, GGML_TYPE_I64, n, groups.size());
}

ggml_tensor * llama_kvc::idxs(ggml_context * ctx, ggml_tensor * idxs, int32_t il) const {
    return ggml_view_1d(ctx, idxs, idxs->ne[0], group_of[ikv_of(il)]*idxs->nb[1]);
}

void llama_kvc::set_k_idxs(ggml_tensor * dst, const llama_kv_cache::slot_info & sinfo) const {
    int64_t * data = (int64_t *) dst->data;

    for (const auto & g : groups) {
        for (const uint32_t i : sinfo.idxs[0]) {
            *data++ = (int64_t) i - g.off;
        }
    }
}

void llama_kvc::set_v_idxs(ggml_tensor * dst, const llama_kv_cache::slot_info & sinfo) const {
    if (!kv.v_trans) {
        set_k_idxs(dst, sinfo);
        return;
    }

    int64_t * data = (int64_t *) dst->data;

    const int64_t n_embd_v_gqa = kv.hparams.n_embd_v_gqa_max();

    for (const auto & g : groups) {
        for (const uint32_t i : sinfo.idxs[0]) {
            for (int64_t j = 0; j < n_embd_v_gqa; ++j) {
                *data++ = j*g.n_rows + (int64_t) i - g.off;
            }
        }
    }
}

ggml_tensor * llama_kvc::mask(ggml_context * ctx, ggml_tensor * kq_mask, std::vector<std::pair<uint32_t, ggml_tensor *>> & cache, int32_t il) const {
    const uint32_t ikv   = ikv_of(il);
    const uint32_t off_l = off(ikv);
    if (off_l == 0) {
        return kq_mask;
    }
    for (const auto & [off_cached, mask] : cache) {
        if (off_cached == off_l) {
            return mask;
        }
    }

    ggml_tensor * res = ggml_view_2d(ctx, kq_mask,
            kq_mask->ne[0] - off_l, kq_mask->ne[1], kq_mask->nb[1], off_l*kq_mask->nb[0]);

    // Attention needs a contiguous mask. One row is contiguous, but devices may also need it aligned.
    if (kq_mask->ne[1] > 1 || !ggml_backend_buffer_is_host(kv.layers[ikv].k->buffer)) {
        res = ggml_cont(ctx, res);
    }
    ggml_format_name(res, "attn_kq_mask_off%u", off_l);

    cache.emplace_back(off_l, res);

    return res;
}
