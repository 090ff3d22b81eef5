#pragma once

// A tensor of our own beside the keys of a layer: scores, tapped vectors or a bias.

#include "ggml-cpp.h"

#include <cstdint>

struct llama_kvc_buffer {
    // F32 [ne0, ne1], zero, in the kind of memory that beside is in; throws std::bad_alloc
    llama_kvc_buffer(const ggml_tensor * beside, int64_t ne0, int64_t ne1, const char * name, int32_t il);

    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buf;
    ggml_tensor *           t = nullptr;
};
