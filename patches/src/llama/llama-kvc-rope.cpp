#include "llama-kvc-cache.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-model.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <cmath>
#include <new>
#include <stdexcept>

// Computes x = H x for every block of n elements. H is orthonormal and symmetric, so it is its own inverse.
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

// Returns the attn_factor that ggml_rope_ext needs. ggml multiplies by it, and for YaRN by a factor of its own; the inverse
// has to divide by both.
static float rope_attn_factor(const llama_cparams & cparams, float freq_scale, bool inverse) {
    const float attn_factor = cparams.yarn_attn_factor;
    if (!inverse) {
        return attn_factor;
    }
    const float yarn = cparams.yarn_ext_factor != 0.0f ? 1.0f + 0.1f*logf(1.0f/freq_scale) : 1.0f;

    return 1.0f/(attn_factor*yarn*yarn);
}

static void copy_factors(const ggml_tensor * src, ggml_tensor * dst) {
    std::vector<float> data(ggml_nelements(dst));
    ggml_backend_tensor_get(src, data.data(), 0, ggml_nbytes(dst));
    ggml_backend_tensor_set(dst, data.data(), 0, ggml_nbytes(dst));
}

// rotates with ggml's own operation on the CPU; to go back, it negates the positions
static void rope(const llama_context & lctx, int32_t il, float * rows, uint32_t n_rows, const int32_t * pos, bool inverse) {
    const auto & model   = lctx.get_model();
    const auto & hparams = model.hparams;
    const auto & cparams = lctx.get_cparams();

    const float freq_scale = model.get_rope_freq_scale(cparams, il);

    std::vector<int32_t> p(pos, pos + n_rows);
    if (inverse) {
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
    ggml_backend_cpu_set_n_threads(backend.get(), 1); // with more, ggml's threads would wait for each other at every node

    const ggml_tensor * model_factors = model.get_rope_factors(cparams, il);

    ggml_tensor * x       = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, hparams.n_embd_head_k(il), 1, n_rows);
    ggml_tensor * idx     = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, n_rows);
    ggml_tensor * factors = model_factors ? ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, ggml_nelements(model_factors)) : nullptr;
    ggml_tensor * res     = ggml_rope_ext(ctx.get(), x, idx, factors, hparams.n_rot(il), hparams.rope_type, cparams.n_ctx_orig_yarn,
            model.get_rope_freq_base(cparams, il), freq_scale, cparams.yarn_ext_factor,
            rope_attn_factor(cparams, freq_scale, inverse), cparams.yarn_beta_fast, cparams.yarn_beta_slow);

    ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()) };
    if (!buf) {
        throw std::bad_alloc();
    }

    ggml_backend_tensor_set(x, rows, 0, ggml_nbytes(x));
    ggml_backend_tensor_set(idx, p.data(), 0, ggml_nbytes(idx));
    if (factors) {
        copy_factors(model_factors, factors);
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

    // the size of the matrix as in llama_kv_cache::build_input_k_rot
    int64_t n_rot = 64;
    while (kv.attn_rot_k && kv.n_embd_head_k_all % (2*n_rot) == 0) {
        n_rot *= 2;
    }
    const auto rotate = [&] {
        if (kv.attn_rot_k) {
            hadamard(kv.attn_rot_hadamard.at(n_rot), n_rot, rows, int64_t(hparams.n_embd_head_k(il))*n_rows);
        }
    };

    // llama.cpp applies RoPE first and the Hadamard matrix second
    if (inverse) {
        rotate();
    }
    if (hparams.has_rope(il)) {
        rope(lctx, il, rows, n_rows, pos, inverse);
    }
    if (!inverse) {
        rotate();
    }
}
