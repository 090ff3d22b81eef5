#include "llama-kvc-cache.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache-iswa.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

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

static thread_local uint32_t g_start_cells = 0;

void llama_kvc_set_start_cells(uint32_t n_cells) {
    g_start_cells = n_cells;
}

uint32_t llama_kvc_start_rows(const llama_model & model, uint32_t kv_size) {
    // in these kinds of memory the cache is a part, and a part cannot grow by itself
    const bool is_part = llama_model_is_hybrid(&model) || model.hparams.is_mla() || model.hparams.indexer_head_size > 0;

    return g_start_cells == 0 || is_part ? kv_size : std::min<uint32_t>(kv_size, GGML_PAD(g_start_cells, 256));
}

llama_kvc::llama_kvc(llama_kv_cache & kv) : kv(kv) {
    n_start = kv.layers.empty() ? kv.get_size() : n_rows(0);
    set_layout(n_start);
}

//
// strides of one stored tensor
//

namespace {

// where head h, chunk c of row r lies: r*cell + h*head + c*chunk; a chunk is n_bytes of contiguous memory
struct row_layout {
    int64_t n_head;
    int64_t n_chunk;
    int64_t n_bytes;
    int64_t cell;
    int64_t head;
    int64_t chunk;
};

row_layout layout_rows(const ggml_tensor * t, int64_t n_head, int64_t n_embd_head) {
    const int64_t head = ggml_row_size(t->type, n_embd_head);

    return { n_head, 1, head, (int64_t) t->nb[1], head, 0 };
}

// V without flash attention: one column of elements for every embedding dimension
row_layout layout_trans(const ggml_tensor * t, int64_t n_head, int64_t n_embd_head) {
    const int64_t el   = ggml_type_size(t->type);
    const int64_t rows = t->ne[1];

    return { n_head, n_embd_head, el, el, n_embd_head*rows*el, rows*el };
}

void move_prefix(const uint8_t * src, uint8_t * dst, uint32_t n_move, const row_layout & ls, const row_layout & ld) {
    if (ls.n_chunk == 1) {
        memcpy(dst, src, n_move*ls.cell);
        return;
    }
    for (int64_t h = 0; h < ls.n_head; ++h) {
        for (int64_t c = 0; c < ls.n_chunk; ++c) {
            memcpy(dst + h*ld.head + c*ld.chunk, src + h*ls.head + c*ls.chunk, n_move*ls.cell);
        }
    }
}

} // namespace

//
// layout
//

uint32_t llama_kvc::n_rows_used(uint32_t ikv) const {
    const uint32_t n_cells = n_cells_used();
    const uint32_t off     = offs.empty() ? 0 : offs[ikv];

    return n_cells > off ? n_cells - off : 0;
}

uint32_t llama_kvc::n_cells_used() const {
    return kv.v_cells[0].used_max_p1();
}

size_t llama_kvc::n_bytes(uint32_t ikv) const {
    return ggml_backend_buffer_get_size(kv.layers[ikv].k->buffer);
}

void llama_kvc::set_layout(uint32_t n_alloc_new) {
    n_alloc = n_alloc_new;

    groups.clear();
    group_of.assign(kv.layers.size(), 0);

    for (uint32_t ikv = 0; ikv < kv.layers.size(); ++ikv) {
        const group cur = { offs.empty() ? 0 : offs[ikv], n_rows(ikv) };

        const auto it = std::find_if(groups.begin(), groups.end(), [&](const group & g) {
            return g.off == cur.off && g.n_rows == cur.n_rows;
        });

        group_of[ikv] = it - groups.begin();
        if (it == groups.end()) {
            groups.push_back(cur);
        }
    }

    ++n_epoch;
}

bool llama_kvc::rebuild(uint32_t ikv, uint32_t n_rows_new, uint32_t n_move, const int32_t * cells, llama_kvc_gather_t gather) {
    auto & layer = kv.layers[ikv];

    ggml_backend_buffer_t      buf_old = layer.k->buffer;
    ggml_backend_buffer_type_t buft    = ggml_backend_buffer_get_type(buf_old);

    const ggml_init_params params = {
        /*.mem_size   =*/ size_t(4*ggml_tensor_overhead()),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx { ggml_init(params) };
    if (!ctx) {
        return false;
    }

    ggml_tensor * k = ggml_new_tensor_3d(ctx.get(), layer.k->type, layer.k->ne[0], n_rows_new, 1);
    ggml_tensor * v = ggml_new_tensor_3d(ctx.get(), layer.v->type, layer.v->ne[0], n_rows_new, 1);
    ggml_set_name(k, layer.k->name);
    ggml_set_name(v, layer.v->name);

    ggml_tensor * k_stream = ggml_view_2d(ctx.get(), k, k->ne[0], n_rows_new, k->nb[1], 0);
    ggml_tensor * v_stream = ggml_view_2d(ctx.get(), v, v->ne[0], n_rows_new, v->nb[1], 0);

    ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
    if (!buf || k->buffer != buf.get() || v->buffer != buf.get()) {
        return false; // no memory, or more than one buffer of the device can be
    }

    // free rows are masked, but 0*NaN would still reach the output
    ggml_backend_buffer_clear(buf.get(), 0);

    const bool is_host = ggml_backend_buffer_is_host(buf_old) && ggml_backend_buffer_is_host(buf.get());

    const int64_t n_head_kv = kv.hparams.n_head_kv(layer.il);

    const auto move = [&](const ggml_tensor * src, ggml_tensor * dst, bool trans, int64_t n_embd_head) {
        const row_layout ls = trans ? layout_trans(src, n_head_kv, n_embd_head) : layout_rows(src, n_head_kv, n_embd_head);
        const row_layout ld = trans ? layout_trans(dst, n_head_kv, n_embd_head) : layout_rows(dst, n_head_kv, n_embd_head);

        std::vector<uint8_t> src_host;
        std::vector<uint8_t> dst_host;

        const uint8_t * src_data = (const uint8_t *) src->data;
        uint8_t       * dst_data = (uint8_t       *) dst->data;

        if (!is_host) {
            src_host.resize(ggml_nbytes(src));
            dst_host.resize(ggml_nbytes(dst));
            ggml_backend_tensor_get(src, src_host.data(), 0, src_host.size());
            src_data = src_host.data();
            dst_data = dst_host.data();
        }

        if (gather) {
            gather(src_data, dst_data, cells, ls.n_head, n_move, ls.n_chunk, ls.n_bytes,
                    ls.cell, ls.head, ls.chunk, ld.cell, ld.head, ld.chunk);
        } else {
            move_prefix(src_data, dst_data, n_move, ls, ld);
        }

        if (!is_host) {
            ggml_backend_tensor_set(dst, dst_host.data(), 0, dst_host.size());
        }
    };

    try {
        move(layer.k, k, false,      kv.hparams.n_embd_head_k(layer.il));
        move(layer.v, v, kv.v_trans, kv.hparams.n_embd_head_v(layer.il));
    } catch (const std::bad_alloc &) {
        return false;
    }

    layer.k        = k;
    layer.v        = v;
    layer.k_stream = { k_stream };
    layer.v_stream = { v_stream };

    for (auto & [ctx_old, buf_cur] : kv.ctxs_bufs) {
        if (buf_cur.get() == buf_old) {
            ctx_old = std::move(ctx);
            buf_cur = std::move(buf);
            break;
        }
    }

    return true;
}

void llama_kvc::gather_in_place(uint32_t ikv, uint32_t n_kept, const int32_t * cells, llama_kvc_gather_t gather, std::vector<uint8_t> & stage) {
    auto & layer = kv.layers[ikv];

    const int64_t n_head_kv = kv.hparams.n_head_kv(layer.il);
    const bool    is_host   = ggml_backend_buffer_is_host(layer.k->buffer);

    const auto move = [&](ggml_tensor * t, const row_layout & l) {
        uint8_t * data = (uint8_t *) t->data;
        if (!is_host) {
            ggml_backend_tensor_get(t, stage.data(), 0, ggml_nbytes(t));
            data = stage.data();
        }
        gather(data, data, cells, l.n_head, n_kept, l.n_chunk, l.n_bytes, l.cell, l.head, l.chunk, l.cell, l.head, l.chunk);
        if (!is_host) {
            ggml_backend_tensor_set(t, stage.data(), 0, ggml_nbytes(t));
        }
    };

    const int64_t n_embd_head_k = kv.hparams.n_embd_head_k(layer.il);
    const int64_t n_embd_head_v = kv.hparams.n_embd_head_v(layer.il);

    move(layer.k, layout_rows(layer.k, n_head_kv, n_embd_head_k));
    move(layer.v, kv.v_trans ? layout_trans(layer.v, n_head_kv, n_embd_head_v) : layout_rows(layer.v, n_head_kv, n_embd_head_v));
}

void llama_kvc::trim() const {
#if defined(__GLIBC__)
    // layers of a few MB come from the heap once glibc has raised its mmap threshold: give the holes back
    malloc_trim(0);
#endif
}

//
// changes
//

std::string llama_kvc::check_compose(uint32_t n_tokens) const {
    if (composed()) {
        return "the cache is composed already, clear it first";
    }
    if (scoring()) {
        return "scoring is on, end it first";
    }

    const auto & cells = kv.v_cells[0];

    if (cells.get_has_shift()) {
        return "a position shift is pending";
    }
    if (cells.used_max_p1() != n_tokens || cells.get_used() != n_tokens) {
        return format("the cache holds %u tokens in %u cells, not the %u tokens given", cells.get_used(), cells.used_max_p1(), n_tokens);
    }
    for (uint32_t i = 0; i < n_tokens; ++i) {
        if (cells.pos_get(i) != (llama_pos) i || cells.seq_count(i) != 1 || !cells.seq_has(i, 0)) {
            return format("cell %u is not position %u of sequence 0 alone", i, i);
        }
    }

    return "";
}

bool llama_kvc::pending() const {
    if (pending_plan || std::max(n_wanted, n_reserved) > n_alloc) {
        return true;
    }

    return kv.v_cells[0].get_used() == 0 && (composed() || n_alloc != n_empty());
}

void llama_kvc::apply_pending() {
    if (pending_plan) {
        compose();
    } else if (kv.v_cells[0].get_used() == 0) {
        n_past = 0;
        offs.clear();
        resize(std::min(kv.get_size(), std::max(n_empty(), n_wanted)));
    } else {
        resize(std::max({ n_alloc, n_wanted, n_reserved }));
    }

    n_wanted = 0;
}

void llama_kvc::compose() {
    const auto p = std::move(pending_plan);

    n_reserved = 0; // was for the tokens that are composed now

    const uint32_t n_layer = kv.layers.size();
    const uint32_t n_max   = *std::max_element(p->n_kept.begin(), p->n_kept.end());

    const uint32_t n_alloc_new = std::min<uint64_t>(kv.get_size(), uint64_t(n_max) + std::max(p->n_room, 1u));

    auto & cells = kv.v_cells[0];

    // what may throw comes first
    std::vector<uint32_t> offs_new(n_layer);
    size_t n_stage = 0;
    for (uint32_t ikv = 0; ikv < n_layer; ++ikv) {
        const auto & layer = kv.layers[ikv];

        offs_new[ikv] = n_max - p->n_kept[ikv];
        if (!ggml_backend_buffer_is_host(layer.k->buffer)) {
            n_stage = std::max({ n_stage, ggml_nbytes(layer.k), ggml_nbytes(layer.v) });
        }
    }
    std::vector<uint8_t> stage(n_stage);
    groups.reserve(n_layer);
    group_of.reserve(n_layer);

    cells.reset();
    kv.v_heads[0] = 0;
    n_past = p->n_tokens;
    offs.swap(offs_new);

    // a layer at a time: the peak is the old cache and one layer
    for (uint32_t ikv = 0; ikv < n_layer; ++ikv) {
        const uint32_t n_kept     = p->n_kept[ikv];
        const uint32_t n_rows_new = n_alloc_new - offs[ikv];

        // the rows always fit where they are, so that a failed allocation costs memory and not the cache
        if (n_rows_new == n_rows(ikv) || !rebuild(ikv, n_rows_new, n_kept, p->cells[ikv], p->gather)) {
            gather_in_place(ikv, n_kept, p->cells[ikv], p->gather, stage);
        }
    }

    // the last composite is at n_tokens - 1, so the next token is where the full cache would put it
    for (uint32_t i = 0; i < n_max; ++i) {
        cells.pos_set(i, p->n_tokens - n_max + i);
        cells.seq_add(i, 0);
    }
    kv.v_heads[0] = n_max;

    set_layout(std::min(n_alloc_new, n_cells_of_all()));
    trim();
}

uint32_t llama_kvc::n_cells_of_all() const {
    uint32_t res = kv.get_size();
    for (uint32_t ikv = 0; ikv < kv.layers.size(); ++ikv) {
        res = std::min(res, n_rows(ikv) + (offs.empty() ? 0 : offs[ikv]));
    }

    return res;
}

void llama_kvc::resize(uint32_t n_alloc_new) {
    const uint32_t n_used = n_cells_used();

    bool ok = true;

    for (uint32_t ikv = 0; ikv < kv.layers.size(); ++ikv) {
        const uint32_t off = offs.empty() ? 0 : offs[ikv];
        if (n_rows(ikv) != n_alloc_new - off && !rebuild(ikv, n_alloc_new - off, n_used > off ? n_used - off : 0, nullptr, nullptr)) {
            ok = false;
            break;
        }
    }

    if (!ok) {
        // some layers are resized, some are not: go on with what all of them have
        LLAMA_LOG_ERROR("%s: no memory for %u cells\n", __func__, n_alloc_new);
        n_alloc_new = std::min(n_alloc_new, n_cells_of_all());
        n_reserved  = 0; // not again with every decode
    }

    if (n_alloc_new < n_alloc) {
        trim();
    }
    set_layout(n_alloc_new);
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

    // a quarter more, so that a long answer is copied a few times only
    n_wanted = n_cells + std::max(256u, n_cells/4);
    if (!composed()) {
        n_wanted = GGML_PAD(n_wanted, 256); // the views' own padding: graphs are those of a fixed cache
    }
    n_wanted = std::min(kv.get_size(), n_wanted);

    return false;
}

bool llama_kvc::reserve_rows(uint32_t n_cells) {
    if (n_cells > n_alloc) {
        resize(std::min<uint32_t>(kv.get_size(), composed() ? n_cells : GGML_PAD(n_cells, 256)));
    }

    return n_alloc >= std::min(n_cells, kv.get_size());
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
// state
//

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
    offs   = offs_new;
    resize(n_alloc_new);

    if (n_alloc != n_alloc_new) {
        throw std::runtime_error("no memory for the layers of a composed cache");
    }
}

std::vector<std::pair<uint32_t, uint32_t>> llama_kvc::rows(const std::vector<std::pair<uint32_t, uint32_t>> & cells, uint32_t il) const {
    const uint32_t off = offs.empty() ? 0 : offs[ikv_of(il)];

    std::vector<std::pair<uint32_t, uint32_t>> res;
    for (const auto & [from, to] : cells) {
        if (to > off) {
            res.emplace_back(std::max(from, off) - off, to - off);
        }
    }

    return res;
}

//
// graph
//

ggml_tensor * llama_kvc::get_k(ggml_context * ctx, int32_t il, uint32_t n_kv) const {
    const uint32_t ikv = ikv_of(il);
    const uint32_t off = offs.empty() ? 0 : offs[ikv];

    ggml_tensor * k = kv.layers[ikv].k;

    return ggml_view_4d(ctx, k,
            kv.hparams.n_embd_head_k(il), kv.hparams.n_head_kv(il), n_kv - off, 1,
            ggml_row_size(k->type, kv.hparams.n_embd_head_k(il)), k->nb[1], k->nb[2], 0);
}

ggml_tensor * llama_kvc::get_v(ggml_context * ctx, int32_t il, uint32_t n_kv) const {
    const uint32_t ikv = ikv_of(il);
    const uint32_t off = offs.empty() ? 0 : offs[ikv];

    ggml_tensor * v = kv.layers[ikv].v;

    const int64_t n_embd_head_v = kv.hparams.n_embd_head_v(il);
    const int64_t n_head_kv     = kv.hparams.n_head_kv(il);

    if (!kv.v_trans) {
        return ggml_view_4d(ctx, v,
                n_embd_head_v, n_head_kv, n_kv - off, 1,
                ggml_row_size(v->type, n_embd_head_v), v->nb[1], v->nb[2], 0);
    }

    return ggml_view_4d(ctx, v,
            n_kv - off, n_head_kv, n_embd_head_v, 1,
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
    const uint32_t off = offs.empty() ? 0 : offs[ikv_of(il)];
    if (off == 0) {
        return kq_mask;
    }
    for (const auto & [off_cached, mask] : cache) {
        if (off_cached == off) {
            return mask;
        }
    }

    ggml_tensor * res = ggml_view_2d(ctx, kq_mask,
            kq_mask->ne[0] - off, kq_mask->ne[1], kq_mask->nb[1], off*kq_mask->nb[0]);

    // attention wants its mask contiguous, which one row is; devices may want it aligned as well
    if (kq_mask->ne[1] > 1 || !ggml_backend_buffer_is_host(kv.layers[ikv_of(il)].k->buffer)) {
        res = ggml_cont(ctx, res);
    }
    ggml_format_name(res, "attn_kq_mask_off%u", off);

    cache.emplace_back(off, res);

    return res;
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
