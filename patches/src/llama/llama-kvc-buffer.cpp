#include "llama-kvc-buffer.h"

#include "ggml-backend.h"

#include <new>

llama_kvc_buffer::llama_kvc_buffer(const ggml_tensor * beside, int64_t ne0, int64_t ne1, const char * name, int32_t il) {
    const ggml_init_params params = {
        /*.mem_size   =*/ ggml_tensor_overhead(),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };
    ctx.reset(ggml_init(params));
    if (!ctx) {
        throw std::bad_alloc();
    }

    t = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ne0, ne1);
    ggml_format_name(t, "%s-%d", name, il);

    buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_buffer_get_type(beside->buffer)));
    if (!buf) {
        throw std::bad_alloc();
    }
    ggml_backend_buffer_clear(buf.get(), 0);
}
