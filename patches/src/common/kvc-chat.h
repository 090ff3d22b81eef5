#pragma once

// Chat templates, tool calls and grammars of llama.cpp's `common` as a C API: JSON in, JSON out, and a status. No exception
// and no abort crosses it.
//
// All texts are UTF-8 and end with a 0. Every function that has an `out` fills it with its result, or with a message if it
// fails (NULL without memory); free it with kvc_chat_text_free(). A handle is for one thread at a time, except that any
// number of threads may apply one template.

#include <stdint.h>

#if defined(_WIN32)
#    define KVC_CHAT_API __declspec(dllexport)
#else
#    define KVC_CHAT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define KVC_CHAT_ABI 1

enum kvc_chat_status {
    KVC_CHAT_OK           = 0,
    KVC_CHAT_ERR_ARGUMENT = 1, // a NULL, or what is given is no JSON, or not what llama.cpp wants
    KVC_CHAT_ERR_MEMORY   = 2,
    KVC_CHAT_ERR_INTERNAL = 3,
};

typedef struct kvc_chat_template kvc_chat_template;
typedef struct kvc_chat_parser   kvc_chat_parser;

KVC_CHAT_API int32_t kvc_chat_abi(void);

KVC_CHAT_API void kvc_chat_text_free(char * text);

// A GBNF grammar that matches the JSON texts of a JSON schema.
KVC_CHAT_API int32_t kvc_chat_grammar_of_schema(const char * schema, char ** out);

// Bodies of Anthropic's Messages API and OpenAI's Responses API as bodies of OpenAI's chat completions.
KVC_CHAT_API int32_t kvc_chat_body_of_messages (const char * body, char ** out);
KVC_CHAT_API int32_t kvc_chat_body_of_responses(const char * body, char ** out);

// source: Jinja, or "chatml"; bos, eos: the texts of the model's tokens, "" if it has none; adds_bos: whether the tokenizer
// adds it, so that a prompt must not begin with it. out is only filled if the function fails.
KVC_CHAT_API int32_t kvc_chat_template_new(const char * source, const char * bos, const char * eos, int32_t adds_bos,
        kvc_chat_template ** handle, char ** out);
KVC_CHAT_API void    kvc_chat_template_free(kvc_chat_template * handle);

// What the template can do: {"supports_tools": true, ...}
KVC_CHAT_API int32_t kvc_chat_template_caps(const kvc_chat_template * handle, char ** out);

// request: an object with the fields of OpenAI's chat completions that decide the prompt: "messages"; and optionally
// "tools", "tool_choice", "parallel_tool_calls", "json_schema", "grammar", "reasoning_format", "enable_thinking",
// "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "force_pure_content", "use_jinja"
// (false: the source is the name of a format that llama_chat_apply_template() knows), and "now", the time that the template
// sees, in seconds since 1970.
// out: {"prompt", "generation_prompt", "grammar", "grammar_lazy", "grammar_triggers": [{"type", "value", "token"}],
// "preserved_tokens", "stops", "thinking_start", "thinking_ends", "format", "parser"}
KVC_CHAT_API int32_t kvc_chat_template_apply(const kvc_chat_template * handle, const char * request, char ** out);

// applied: what kvc_chat_template_apply() returned, with these fields added: "reasoning_format", "reasoning_in_content",
// "parse_tool_calls", "is_continuation", "echo". out is only filled if the function fails.
KVC_CHAT_API int32_t kvc_chat_parser_new(const char * applied, kvc_chat_parser ** handle, char ** out);
KVC_CHAT_API void    kvc_chat_parser_free(kvc_chat_parser * handle);

// answer: all of the model's answer so far; is_partial: more of it follows.
// out: {"deltas": [what is new in OpenAI's message since the call before], "message": the message, unless is_partial}
KVC_CHAT_API int32_t kvc_chat_parser_read(kvc_chat_parser * handle, const char * answer, int32_t is_partial, char ** out);

// llama_sampler_accept(): a grammar throws if it does not allow the token, and then must not be used any more. A lazy one
// finds that out only when it begins within a token. out is only filled if the function fails.
struct llama_sampler;
KVC_CHAT_API int32_t kvc_chat_sampler_accept(struct llama_sampler * sampler, int32_t token, char ** out);

#ifdef __cplusplus
}
#endif
