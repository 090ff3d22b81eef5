// common.cpp and server-chat.cpp refer to these functions of llama.cpp from parts that the chat API never calls. Their own
// sources would bring in all of llama.cpp's samplers and its multimodal library.

#include "build-info.h"
#include "fit.h"
#include "sampling.h"
#include "speculative.h"
#include "server-common.h"

#include <stdexcept>

[[noreturn]] static void unused(const char * name) {
    throw std::logic_error(std::string(name) + " is not part of this library");
}

struct common_sampler * common_sampler_init(const llama_model *, common_params_sampling &) {
    unused(__func__);
}

void common_sampler_free(struct common_sampler *) {
    // owners of a sampler that was never made call this
}

struct llama_sampler * common_sampler_get(const struct common_sampler *) {
    unused(__func__);
}

std::vector<enum common_sampler_type> common_sampler_types_from_names(const std::vector<std::string> &) {
    unused(__func__);
}

common_params_fit_status common_fit_params(const char *, llama_model_params *, llama_context_params *, float *,
        llama_model_tensor_buft_override *, size_t *, uint32_t, const common_fit_extra_model *, ggml_log_level) {
    unused(__func__);
}

common_params common_base_params_to_speculative(const common_params &) {
    unused(__func__);
}

const char * get_media_marker() {
    unused(__func__);
}

int llama_build_number(void) {
    return 0;
}

const char * llama_commit(void) {
    return "";
}

const char * llama_compiler(void) {
    return "";
}

const char * llama_build_target(void) {
    return "";
}
