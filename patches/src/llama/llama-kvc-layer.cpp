// Moves the rows of one layer. Knows the layer's tensors and their memory, and nothing of cells and plans.

#include "llama-kvc-cache.h"

#include "llama-hparams.h"

#include "ggml-backend.h"

#include <cstring>
#include <new>

namespace {

// Head h, chunk c of row r lies at r*cell + h*head + c*chunk. A chunk is n_bytes of contiguous memory.
struct strides {
    int64_t n_head;
    int64_t n_chunk;
    int64_t n_bytes;
    int64_t cell;
    int64_t head;
    int64_t chunk;
};

strides strides_of(const ggml_tensor * t, bool trans, int64_t n_head, int64_t n_embd_head) {
    if (!trans) {
        const int64_t head = ggml_row_size(t->type, n_embd_head);

        return { n_head, 1, head, (int64_t) t->nb[1], head, 0 };
    }

    // V without flash attention: every embedding dimension is one column of elements
    const int64_t el     = ggml_type_size(t->type);
    const int64_t column = t->ne[1]*el;

    return { n_head, n_embd_head, el, el, n_embd_head*column, column };
}

void move_first(const uint8_t * src, uint8_t * dst, uint32_t n, const strides & from, const strides & to) {
    if (from.n_chunk == 1) {
        memcpy(dst, src, n*from.cell);
        return;
    }
    for (int64_t h = 0; h < from.n_head; ++h) {
        for (int64_t c = 0; c < from.n_chunk; ++c) {
            memcpy(dst + h*to.head + c*to.chunk, src + h*from.head + c*from.chunk, n*from.cell);
        }
    }
}

void move_gathered(const uint8_t * src, uint8_t * dst, uint32_t n, const int32_t * rows, llama_kvc_gather_t gather, const strides & from, const strides & to) {
    gather(src, dst, rows, from.n_head, n, from.n_chunk, from.n_bytes,
            from.cell, from.head, from.chunk, to.cell, to.head, to.chunk);
}

// a tensor of 32-bit integers over n_rows rows of ne0 in the memory of t
ggml_tensor * as_i32(ggml_context * ctx, const ggml_tensor * t, int64_t ne0, int64_t n_rows) {
    ggml_tensor * res = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, ne0, n_rows);
    res->data   = t->data;
    res->buffer = t->buffer;

    return res;
}

// the scheduler's backend that works on the tensor's memory; nullptr: there is none
ggml_backend_t backend_of(ggml_backend_sched_t sched, const ggml_tensor * t) {
    for (int i = 0; sched && i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_supports_buft(backend, ggml_backend_buffer_get_type(t->buffer))) {
            return backend;
        }
    }

    return nullptr;
}

// Gathers rows [n_head][n] of one tensor into another, on their device. They are moved as 32-bit integers, so no type is
// decoded. Returns false and changes nothing if the device cannot do that.
bool gather_on_device(ggml_backend_t backend, const ggml_tensor * from, ggml_tensor * to, int64_t n_head, uint32_t n, const int32_t * rows) {
    const int64_t head = from->nb[1]/n_head;
    if (!backend || n == 0 || head % sizeof(int32_t) != 0) {
        return false;
    }

    const ggml_init_params params = { 4*ggml_tensor_overhead() + ggml_graph_overhead_custom(4, false), NULL, true };
    ggml_context_ptr ctx_idx(ggml_init(params));
    ggml_context_ptr ctx    (ggml_init(params));
    if (!ctx_idx || !ctx) {
        return false;
    }

    ggml_tensor * idx = ggml_new_tensor_1d(ctx_idx.get(), GGML_TYPE_I32, n_head*n);
    ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors(ctx_idx.get(), backend));
    if (!buf) {
        return false;
    }

    ggml_tensor * src = as_i32(ctx.get(), from, head/sizeof(int32_t), n_head*from->ne[1]);
    ggml_tensor * dst = ggml_get_rows(ctx.get(), src, idx);
    dst->data   = to->data;
    dst->buffer = to->buffer;
    if (!ggml_backend_supports_op(backend, dst)) {
        return false;
    }

    std::vector<int32_t> places(n_head*n);
    for (int64_t h = 0; h < n_head; ++h) {
        for (uint32_t j = 0; j < n; ++j) {
            places[j*n_head + h] = rows[h*n + j]*n_head + h;
        }
    }
    ggml_backend_tensor_set(idx, places.data(), 0, ggml_nbytes(idx));

    ggml_cgraph * graph = ggml_new_graph_custom(ctx.get(), 4, false);
    ggml_build_forward_expand(graph, dst);

    return ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS;
}

// copies the first n rows within device memory, or through the host where devices differ
void copy_first(const ggml_tensor * from, ggml_tensor * to, uint32_t n) {
    const ggml_init_params params = { 2*ggml_tensor_overhead(), NULL, true };
    ggml_context_ptr ctx(ggml_init(params));
    if (!ctx) {
        throw std::bad_alloc();
    }
    const int64_t ne0 = from->nb[1]/sizeof(int32_t);
    ggml_backend_tensor_copy(as_i32(ctx.get(), from, ne0, n), as_i32(ctx.get(), to, ne0, n));
}

// the bytes of a tensor in device memory
std::vector<uint8_t> download(const ggml_tensor * t) {
    std::vector<uint8_t> res(ggml_nbytes(t));
    ggml_backend_tensor_get(t, res.data(), 0, res.size());

    return res;
}

} // namespace

struct llama_kvc::layer_tensors {
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buf;

    ggml_tensor * k        = nullptr;
    ggml_tensor * v        = nullptr;
    ggml_tensor * k_stream = nullptr;
    ggml_tensor * v_stream = nullptr;
};

bool llama_kvc::make_tensors(uint32_t ikv, uint32_t n_rows_new, layer_tensors & res) const {
    const auto & layer = kv.layers[ikv];

    const ggml_init_params params = {
        /*.mem_size   =*/ size_t(4*ggml_tensor_overhead()),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };
    res.ctx.reset(ggml_init(params));
    if (!res.ctx) {
        return false;
    }

    res.k = ggml_new_tensor_3d(res.ctx.get(), layer.k->type, layer.k->ne[0], n_rows_new, 1);
    ggml_set_name(res.k, layer.k->name);
    res.k_stream = ggml_view_2d(res.ctx.get(), res.k, res.k->ne[0], n_rows_new, res.k->nb[1], 0);
    if (layer.v) {
        res.v = ggml_new_tensor_3d(res.ctx.get(), layer.v->type, layer.v->ne[0], n_rows_new, 1);
        ggml_set_name(res.v, layer.v->name);
        res.v_stream = ggml_view_2d(res.ctx.get(), res.v, res.v->ne[0], n_rows_new, res.v->nb[1], 0);
    }

    res.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(res.ctx.get(), ggml_backend_buffer_get_type(layer.k->buffer)));
    if (!res.buf || res.k->buffer != res.buf.get() || (res.v && res.v->buffer != res.buf.get())) {
        return false; // no memory, or the device needs more than one buffer
    }

    // attention masks free rows, but 0*NaN would still reach its output
    ggml_backend_buffer_clear(res.buf.get(), 0);

    return true;
}

void llama_kvc::move_tensors(uint32_t ikv, const layer_tensors & dst, const kept_rows & rows) const {
    const auto & layer = kv.layers[ikv];

    const int64_t n_head_kv = kv.hparams.n_head_kv(layer.il);
    const bool    is_host   = ggml_backend_buffer_is_host(layer.k->buffer) && ggml_backend_buffer_is_host(dst.buf.get());

    const auto move = [&](const ggml_tensor * from, ggml_tensor * to, bool trans, int64_t n_embd_head) {
        const strides s_from = strides_of(from, trans, n_head_kv, n_embd_head);
        const strides s_to   = strides_of(to,   trans, n_head_kv, n_embd_head);

        if (!is_host && !trans) {
            if (rows.gather && gather_on_device(backend_of(rows.sched, from), from, to, n_head_kv, rows.n, rows.from)) {
                return;
            }
            if (!rows.gather && rows.n > 0 && from->nb[1] % sizeof(int32_t) == 0) {
                copy_first(from, to, rows.n);
                return;
            }
        }

        std::vector<uint8_t> from_host;
        std::vector<uint8_t> to_host;
        if (!is_host) {
            from_host = download(from);
            to_host.resize(ggml_nbytes(to));
        }

        const uint8_t * from_data = is_host ? (const uint8_t *) from->data : from_host.data();
        uint8_t       * to_data   = is_host ? (uint8_t       *) to->data   : to_host.data();

        if (rows.gather) {
            move_gathered(from_data, to_data, rows.n, rows.from, rows.gather, s_from, s_to);
        } else {
            move_first(from_data, to_data, rows.n, s_from, s_to);
        }

        if (!is_host) {
            ggml_backend_tensor_set(to, to_host.data(), 0, to_host.size());
        }
    };

    move(layer.k, dst.k, false,      kv.hparams.n_embd_head_k(layer.il));
    if (layer.v) {
        move(layer.v, dst.v, kv.v_trans, kv.hparams.n_embd_head_v(layer.il));
    }
}

void llama_kvc::set_tensors(uint32_t ikv, layer_tensors & tensors) {
    auto & layer = kv.layers[ikv];

    ggml_backend_buffer_t buf_old = layer.k->buffer;

    layer.k        = tensors.k;
    layer.v        = tensors.v;
    layer.k_stream = { tensors.k_stream };
    layer.v_stream = { tensors.v_stream };

    for (auto & [ctx, buf] : kv.ctxs_bufs) {
        if (buf.get() == buf_old) {
            ctx = std::move(tensors.ctx);
            buf = std::move(tensors.buf);
            break;
        }
    }
}

bool llama_kvc::rebuild(uint32_t ikv, uint32_t n_rows_new, const kept_rows & rows) {
    layer_tensors tensors;
    try {
        if (!make_tensors(ikv, n_rows_new, tensors)) {
            return false;
        }
        move_tensors(ikv, tensors, rows);
    } catch (const std::bad_alloc &) {
        return false;
    }
    set_tensors(ikv, tensors);

    return true;
}

void llama_kvc::gather_in_place(uint32_t ikv, const kept_rows & rows, std::vector<uint8_t> & stage) {
    const auto & layer = kv.layers[ikv];

    const int64_t n_head_kv = kv.hparams.n_head_kv(layer.il);
    const bool    is_host   = ggml_backend_buffer_is_host(layer.k->buffer);

    const auto move = [&](ggml_tensor * t, bool trans, int64_t n_embd_head) {
        const strides s = strides_of(t, trans, n_head_kv, n_embd_head);

        uint8_t * data = is_host ? (uint8_t *) t->data : stage.data();
        if (!is_host) {
            ggml_backend_tensor_get(t, data, 0, ggml_nbytes(t));
        }
        move_gathered(data, data, rows.n, rows.from, rows.gather, s, s);
        if (!is_host) {
            ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
        }
    };

    move(layer.k, false,      kv.hparams.n_embd_head_k(layer.il));
    if (layer.v) {
        move(layer.v, kv.v_trans, kv.hparams.n_embd_head_v(layer.il));
    }
}
