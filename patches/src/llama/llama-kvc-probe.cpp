#include "llama-kvc-cache.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-model.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <cmath>
#include <new>
#include <stdexcept>

// an F32 tensor [ne0, ne1] of its own beside the keys of a layer, zero
static llama_kvc::side_buffer make_side_buffer(const ggml_tensor * beside, int64_t ne0, int64_t ne1, const char * name, int il) {
    const ggml_init_params params = {
        /*.mem_size   =*/ ggml_tensor_overhead(),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };
    llama_kvc::side_buffer res;
    res.ctx.reset(ggml_init(params));
    if (!res.ctx) {
        throw std::bad_alloc();
    }
    res.t = ggml_new_tensor_2d(res.ctx.get(), GGML_TYPE_F32, ne0, ne1);
    ggml_format_name(res.t, "%s-%d", name, il);
    res.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(res.ctx.get(), ggml_backend_buffer_get_type(beside->buffer)));
    if (!res.buf) {
        throw std::bad_alloc();
    }
    ggml_backend_buffer_clear(res.buf.get(), 0);

    return res;
}

std::vector<llama_kvc::side_buffer> llama_kvc::side_buffers(const char * name, const std::function<std::pair<int64_t, int64_t>(int32_t)> & shape) const {
    std::vector<side_buffer> res;
    for (const auto & layer : kv.layers) {
        const auto [ne0, ne1] = shape(layer.il);
        res.push_back(make_side_buffer(layer.k, ne0, ne1, name, layer.il));
    }

    return res;
}

void llama_kvc::taps_begin(bool queries, bool outputs, uint32_t n_tokens) {
    std::vector<side_buffer> q;
    std::vector<side_buffer> o;
    if (queries) {
        q = side_buffers("kvc_queries", [&](int32_t il) { return std::make_pair<int64_t, int64_t>(kv.hparams.n_embd_head_k(il)*kv.hparams.n_head(il), n_tokens); });
    }
    if (outputs) {
        o = side_buffers("kvc_outputs", [&](int32_t il) { return std::make_pair<int64_t, int64_t>(kv.hparams.n_embd_head_v(il)*kv.hparams.n_head(il), n_tokens); });
    }

    tap_queries = std::move(q);
    tap_outputs = std::move(o);

    ++n_epoch;
}

void llama_kvc::taps_end() {
    tap_queries.clear();
    tap_outputs.clear();

    ++n_epoch;
}

const ggml_tensor * llama_kvc::tap(uint32_t ikv, bool outputs) const {
    const auto & taps = outputs ? tap_outputs : tap_queries;

    return taps.empty() ? nullptr : taps[ikv].t;
}

// src: [n_embd_head, n_head, n_tokens]
static void copy_rows(const llm_graph_context & g, ggml_tensor * src, ggml_tensor * dst, float scale) {
    const int64_t n_embd = dst->ne[0];
    const int64_t n      = std::min(dst->ne[1], src->ne[2]);

    ggml_tensor * rows = ggml_view_3d(g.ctx0, src, src->ne[0], src->ne[1], n, src->nb[1], src->nb[2], 0);

    ggml_tensor * res = ggml_cpy(g.ctx0, rows, ggml_view_2d(g.ctx0, dst, n_embd, n, dst->nb[1], 0));
    if (scale != 1.0f) {
        res = ggml_scale_inplace(g.ctx0, res, scale);
    }
    ggml_build_forward_expand(g.gf, res);
}

void llama_kvc::copy_taps(const llm_graph_context & g, ggml_tensor * q, ggml_tensor * cur, float kq_scale, uint32_t ikv) const {
    if (!tap_queries.empty()) {
        copy_rows(g, q, tap_queries[ikv].t, kq_scale);
    }
    if (!tap_outputs.empty()) {
        const int64_t n_head = q->ne[1];
        copy_rows(g, ggml_reshape_3d(g.ctx0, cur, cur->ne[0]/n_head, n_head, cur->ne[1]), tap_outputs[ikv].t, 1.0f);
    }
}

void llama_kvc::set_bias(uint32_t ikv, const float * bias, uint32_t n_rows) {
    if (biases.empty()) {
        biases = side_buffers("kvc_bias", [&](int32_t il) { return std::make_pair<int64_t, int64_t>(kv.get_size(), kv.hparams.n_head(il)); });
        ++n_epoch;
    }

    ggml_tensor * t = biases[ikv].t;

    const int64_t n_group = t->ne[1]/kv.hparams.n_head_kv(kv.layers[ikv].il);
    ggml_backend_buffer_clear(biases[ikv].buf.get(), 0);
    for (int64_t h = 0; h < t->ne[1]; ++h) {
        ggml_backend_tensor_set(t, bias + (h/n_group)*n_rows, h*t->nb[1], n_rows*sizeof(float));
    }
}

void llama_kvc::drop_bias() {
    n_epoch += !biases.empty();
    biases.clear();
}

ggml_tensor * llama_kvc::bias(ggml_context * ctx, ggml_tensor * kq_b, const ggml_tensor * k, float kq_scale, int32_t il) const {
    if (biases.empty()) {
        return kq_b;
    }

    ggml_tensor * t = biases[ikv_of(il)].t;

    // llama.cpp scales the logits after it has added their bias
    return ggml_scale(ctx, ggml_cont(ctx, ggml_view_3d(ctx, t, k->ne[2], 1, t->ne[1], t->nb[1], t->nb[1], 0)), 1.0f/kq_scale);
}

// x = H x for every block of a row: H is orthonormal and symmetric, its own inverse
static void hadamard(const std::vector<float> & h, int64_t n, float * x, int64_t n_elements) {
    std::vector<float> y(n);
    for (int64_t first = 0; first < n_elements; first += n) {
        for (int64_t i = 0; i < n; ++i) {
            y[i] = 0.0f;
            for (int64_t j = 0; j < n; ++j) {
                y[i] += h[i*n + j]*x[first + j];
            }
        }
        std::copy(y.begin(), y.end(), x + first);
    }
}

static void rope_plain_rows(const llama_context & lctx, int32_t il, float * rows, uint32_t n_rows, const int32_t * pos, bool inverse) {
    const auto & model   = lctx.get_model();
    const auto & hparams = model.hparams;
    const auto & cparams = lctx.get_cparams();

    const float freq_scale = model.get_rope_freq_scale(cparams, il);

    float attn_factor = cparams.yarn_attn_factor;
    std::vector<int32_t> p(pos, pos + n_rows);
    if (inverse) {
        // ggml multiplies by attn_factor, and by one more for YaRN: the inverse has to divide by both
        const float yarn = cparams.yarn_ext_factor != 0.0f ? 1.0f + 0.1f*logf(1.0f/freq_scale) : 1.0f;
        attn_factor = 1.0f/(attn_factor*yarn*yarn);
        for (auto & x : p) {
            x = -x;
        }
    }

    const ggml_init_params params = {
        /*.mem_size   =*/ 8*ggml_tensor_overhead() + ggml_graph_overhead(),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx { ggml_init(params) };
    ggml_backend_ptr backend { ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };
    if (!ctx || !backend) {
        throw std::bad_alloc();
    }
    ggml_backend_cpu_set_n_threads(backend.get(), 1); // ggml's four would wait for each other at every node

    const ggml_tensor * model_factors = model.get_rope_factors(cparams, il);

    ggml_tensor * x       = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, hparams.n_embd_head_k(il), 1, n_rows);
    ggml_tensor * idx     = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, n_rows);
    ggml_tensor * factors = model_factors ? ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, ggml_nelements(model_factors)) : nullptr;
    ggml_tensor * res     = ggml_rope_ext(ctx.get(), x, idx, factors, hparams.n_rot(il), hparams.rope_type, cparams.n_ctx_orig_yarn,
            model.get_rope_freq_base(cparams, il), freq_scale, cparams.yarn_ext_factor, attn_factor, cparams.yarn_beta_fast, cparams.yarn_beta_slow);

    ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()) };
    if (!buf) {
        throw std::bad_alloc();
    }

    ggml_backend_tensor_set(x, rows, 0, ggml_nbytes(x));
    ggml_backend_tensor_set(idx, p.data(), 0, ggml_nbytes(idx));
    if (factors) {
        std::vector<float> data(ggml_nelements(factors));
        ggml_backend_tensor_get(model_factors, data.data(), 0, ggml_nbytes(factors));
        ggml_backend_tensor_set(factors, data.data(), 0, ggml_nbytes(factors));
    }

    ggml_cgraph * gf = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(gf, res);
    if (ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("the rotation could not be computed");
    }

    ggml_backend_tensor_get(res, rows, 0, ggml_nbytes(res));
}

void llama_kvc::rope_rows(const llama_context & lctx, uint32_t ikv, float * rows, uint32_t n_rows, const int32_t * pos, bool inverse) const {
    const int32_t il = kv.layers[ikv].il;

    const auto & hparams = lctx.get_model().hparams;

    const int64_t n_embd_head = hparams.n_embd_head_k(il);

    // llama_kv_cache::build_input_k_rot
    int64_t n_rot = 64;
    while (kv.attn_rot_k && kv.n_embd_head_k_all % (2*n_rot) == 0) {
        n_rot *= 2;
    }
    const auto rotate = [&] {
        if (kv.attn_rot_k) {
            hadamard(kv.attn_rot_hadamard.at(n_rot), n_rot, rows, n_embd_head*n_rows);
        }
    };

    if (inverse) {
        rotate();
    }
    if (hparams.has_rope(il)) {
        rope_plain_rows(lctx, il, rows, n_rows, pos, inverse);
    }
    if (!inverse) {
        rotate();
    }
}
