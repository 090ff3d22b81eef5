#pragma once

// What every function of llama-kvc.h does around its own work: it checks the context, and it turns exceptions into a status
// and a message. The callers are not C++, so an exception that reaches them would abort the process.

#include "llama-kvc.h"

#include "llama-context.h"
#include "llama-kv-cache.h"

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

namespace llama_kvc_guard {

// ends an API function: its status and its message
struct error : std::runtime_error {
    error(llama_kvc_status status, const std::string & what) : std::runtime_error(what), status(status) {}

    const llama_kvc_status status;
};

[[noreturn]] inline void fail(llama_kvc_status status, const std::string & what) {
    throw error(status, what);
}

// what the functions of a cache and of one of its layers work on
struct cache {
    llama_context  & ctx;
    llama_kv_cache & kv;

    // made at first use: until then llama.cpp runs its own code only
    llama_kvc & kvc() const { return kv.make_kvc(); }

    // carries out the change that the cache has noted, if there is one
    void update() const;
};

struct layer : cache {
    uint32_t      ikv;
    int32_t       il;
    ggml_tensor * k;
    ggml_tensor * v;
};

// these check their arguments and fail()
cache get_cache(llama_context * ctx);
layer get_layer(llama_context * ctx, uint32_t ikv);

// keeps the message for llama_kvc_last_error(); returns the status
int32_t report(llama_kvc_status status, const char * what) noexcept;

// calls fn() and returns LLAMA_KVC_OK, or the status of what it throws
template <typename F>
int32_t guarded(F && fn) noexcept {
    try {
        fn();
    } catch (const error & err) {
        return report(err.status, err.what());
    } catch (const std::bad_alloc &) {
        return report(LLAMA_KVC_ERR_MEMORY, "out of memory");
    } catch (const std::exception & err) {
        return report(LLAMA_KVC_ERR_INTERNAL, err.what());
    } catch (...) {
        return report(LLAMA_KVC_ERR_INTERNAL, "an exception of unknown type");
    }

    return LLAMA_KVC_OK;
}

// fn(const cache &)
template <typename F>
int32_t with_cache(llama_context * ctx, F && fn) noexcept {
    return guarded([&] { fn(get_cache(ctx)); });
}

// fn(const layer &)
template <typename F>
int32_t with_layer(llama_context * ctx, uint32_t ikv, F && fn) noexcept {
    return guarded([&] { fn(get_layer(ctx, ikv)); });
}

} // namespace llama_kvc_guard
