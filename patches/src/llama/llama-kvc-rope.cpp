#include "llama-kvc-cache.h"

#include "llama-hparams.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>

// places in the op_params of GGML_OP_ROPE (ggml.c, ggml_rope_impl)
static constexpr int PARAM_N_DIMS      = 1;
static constexpr int PARAM_MODE        = 2;
static constexpr int PARAM_FREQ_SCALE  = 6;
static constexpr int PARAM_EXT_FACTOR  = 7;
static constexpr int PARAM_ATTN_FACTOR = 8;

static bool has_sections(int32_t mode) {
    return mode & GGML_ROPE_TYPE_MROPE;
}

// Returns the rotation of the queries of an attention, nullptr if there is none. Throws if it cannot be told. In some models
// (Hunyuan) a norm with weights follows it; rows are rotated back as they are, with these weights.
//   first  receives the first element of a head that belongs to the rotated part
static const ggml_tensor * find_rope(const ggml_tensor * q, int64_t & first) {
    for (const ggml_tensor * t = q; t; t = t->src[0]) {
        switch (t->op) {
            case GGML_OP_ROPE:
                return t;
            case GGML_OP_CONCAT: { // one of both parts is rotated
                if (t->op_params[0] != 0) {
                    throw std::runtime_error("the keys are joined in an unknown way");
                }
                const ggml_tensor * node = find_rope(t->src[0], first);
                if (!node) {
                    first = 0;
                    node  = find_rope(t->src[1], first);
                    first += t->src[0]->ne[0];
                }
                return node;
            }
            case GGML_OP_NONE: // an input
            case GGML_OP_ADD:  // a bias
                return nullptr;
            case GGML_OP_MUL_MAT: // the projection, or the Hadamard matrix of quantized caches
                return strcmp(t->src[0]->name, "attn_inp_k_rot") == 0 ? find_rope(t->src[1], first) : nullptr;
            case GGML_OP_MUL: // a temperature, or the weights of a norm
            case GGML_OP_VIEW:
            case GGML_OP_RESHAPE:
            case GGML_OP_PERMUTE:
            case GGML_OP_CONT:
            case GGML_OP_SCALE:
            case GGML_OP_RMS_NORM:
            case GGML_OP_CLAMP:
                break;
            default:
                throw std::runtime_error(std::string("it is not known what ") + ggml_op_name(t->op) + " does to the rotation of the keys");
        }
    }

    return nullptr;
}

void llama_kvc::note_rope(const ggml_tensor * q, uint32_t ikv) const {
    ropes.resize(kv.layers.size());

    rotation & res = ropes[ikv];

    res = {};
    try {
        const ggml_tensor * node = find_rope(q, res.first);
        if (node && node->src[2] && node->src[2]->op != GGML_OP_NONE) {
            throw std::runtime_error("the factors of the rotation are computed");
        }
        if (node) {
            std::copy_n(node->op_params, res.params.size(), res.params.begin());
            res.factors = node->src[2];
            res.n_embd  = node->ne[0];
        }
        res.is_known = true;
    } catch (const std::runtime_error & e) {
        res.why = e.what();
    }
}

std::string llama_kvc::rope_unknown(uint32_t ikv) const {
    if (ikv >= ropes.size() || (!ropes[ikv].is_known && ropes[ikv].why.empty())) {
        return "the layer has not computed anything yet";
    }

    return ropes[ikv].why;
}

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

static float param(const int32_t * params, int i) {
    float res;
    memcpy(&res, params + i, sizeof(res));

    return res;
}

// Returns the attn_factor with which a rotation goes back. ggml multiplies by it, and for YaRN by a factor of its own; the
// inverse has to divide by both.
static float inverse_attn_factor(const int32_t * params) {
    const float yarn = param(params, PARAM_EXT_FACTOR) != 0.0f ? 1.0f + 0.1f*logf(1.0f/param(params, PARAM_FREQ_SCALE)) : 1.0f;

    return 1.0f/(param(params, PARAM_ATTN_FACTOR)*yarn*yarn);
}

// returns the positions as the graph has them (llm_graph_input_pos::set_input); to go back, ggml rotates to -pos
static std::vector<int32_t> positions(const int32_t * pos, uint32_t n, int32_t mode, bool inverse) {
    std::vector<int32_t> res(pos, pos + n);
    if (inverse) {
        for (auto & x : res) {
            x = -x;
        }
    }
    if (has_sections(mode)) { // those of text: all the same, but for the last one
        res.resize(size_t(n)*GGML_MROPE_SECTIONS);
        std::copy_n(res.begin(), n, res.begin() + n);
        std::copy_n(res.begin(), n, res.begin() + 2*n);
    }

    return res;
}

static void copy_factors(const ggml_tensor * src, ggml_tensor * dst) {
    std::vector<float> data(ggml_nelements(dst));
    ggml_backend_tensor_get(src, data.data(), 0, ggml_nbytes(dst));
    ggml_backend_tensor_set(dst, data.data(), 0, ggml_nbytes(dst));
}

// with more threads, ggml's would wait for each other at every node; looked up, because a backend may be loaded at run time
static void use_one_thread(ggml_backend_t backend) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    auto set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (set_n_threads) {
        set_n_threads(backend, 1);
    }
}

// rotates rows of n_embd elements with ggml's own operation on the CPU
static void rope(const int32_t * params, const ggml_tensor * graph_factors, int64_t n_embd, float * rows, uint32_t n_rows, const int32_t * pos, bool inverse) {
    const int32_t mode = params[PARAM_MODE];

    const ggml_init_params init = {
        /*.mem_size   =*/ 8*ggml_tensor_overhead() + ggml_graph_overhead(),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx { ggml_init(init) };
    ggml_backend_ptr backend { ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };
    if (!ctx || !backend) {
        throw std::bad_alloc();
    }
    use_one_thread(backend.get());

    const std::vector<int32_t> p = positions(pos, n_rows, mode, inverse);

    ggml_tensor * x       = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_embd, 1, n_rows);
    ggml_tensor * idx     = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, p.size());
    ggml_tensor * factors = graph_factors ? ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, ggml_nelements(graph_factors)) : nullptr;

    int sections[GGML_MROPE_SECTIONS] = { 1 };
    ggml_tensor * res = has_sections(mode) ?
            ggml_rope_multi(ctx.get(), x, idx, factors, params[PARAM_N_DIMS], sections, mode, 0, 1.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f) :
            ggml_rope_ext  (ctx.get(), x, idx, factors, params[PARAM_N_DIMS],           mode, 0, 1.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);

    memcpy(res->op_params, params, sizeof(res->op_params));
    if (inverse) {
        const float factor = inverse_attn_factor(params);
        memcpy(res->op_params + PARAM_ATTN_FACTOR, &factor, sizeof(factor));
    }

    ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()) };
    if (!buf) {
        throw std::bad_alloc();
    }

    ggml_backend_tensor_set(x, rows, 0, ggml_nbytes(x));
    ggml_backend_tensor_set(idx, p.data(), 0, ggml_nbytes(idx));
    if (factors) {
        copy_factors(graph_factors, factors);
    }

    ggml_cgraph * gf = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(gf, res);
    if (ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("the rotation could not be computed");
    }

    ggml_backend_tensor_get(res, rows, 0, ggml_nbytes(res));
}

void llama_kvc::rope_rows(uint32_t ikv, float * rows, uint32_t n_rows, const int32_t * pos, bool inverse) const {
    const int64_t n_embd = kv.hparams.n_embd_head_k(kv.layers[ikv].il);

    // the size of the matrix as in llama_kv_cache::build_input_k_rot
    int64_t n_rot = 64;
    while (kv.attn_rot_k && kv.n_embd_head_k_all % (2*n_rot) == 0) {
        n_rot *= 2;
    }
    const auto rotate = [&] {
        if (kv.attn_rot_k && kv.layers[ikv].v) { // latent keys are stored as they are
            hadamard(kv.attn_rot_hadamard.at(n_rot), n_rot, rows, n_embd*n_rows);
        }
    };

    const rotation & of_layer = ropes.at(ikv);

    // llama.cpp applies RoPE first and the Hadamard matrix second
    if (inverse) {
        rotate();
    }
    if (of_layer.params[PARAM_N_DIMS] > 0) {
        const int64_t n = of_layer.n_embd;

        std::vector<float> part(n*n_rows);
        for (uint32_t i = 0; i < n_rows; ++i) {
            std::copy_n(rows + i*n_embd + of_layer.first, n, part.data() + i*n);
        }
        rope(of_layer.params.data(), of_layer.factors, n, part.data(), n_rows, pos, inverse);
        for (uint32_t i = 0; i < n_rows; ++i) {
            std::copy_n(part.data() + i*n, n, rows + i*n_embd + of_layer.first);
        }
    }
    if (!inverse) {
        rotate();
    }
}
