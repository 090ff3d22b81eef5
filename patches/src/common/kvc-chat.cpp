#include "kvc-chat.h"

#include "chat.h"
#include "json-schema-to-grammar.h"
#include "kvc-chat-time.h"
#include "log.h"
#include "server-chat.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

struct kvc_chat_template {
    common_chat_templates_ptr templates;
    std::string               begin; // what the tokenizer puts before a prompt, so that the template must not
};

struct kvc_chat_parser {
    common_chat_parser_params params;
    bool                      reads_json; // it calls itself for what is nested
    common_chat_msg           message;    // so far
    std::vector<std::string>  ids;        // of its tool calls
};

static char * text_of(const std::string & text) noexcept {
    char * res = (char *) std::malloc(text.size() + 1);
    if (res) {
        std::memcpy(res, text.c_str(), text.size() + 1);
    }

    return res;
}

static int32_t failed(kvc_chat_status status, const char * what, char ** out) noexcept {
    try {
        if (out) {
            *out = text_of(what);
        }
    } catch (...) {
        // no memory for the message; the status says enough
    }

    return status;
}

// Errors reach the caller as texts, so common's log is silent. Only its converter of JSON schemas still prints to stderr, which
// rules of a schema it leaves out.
static void be_quiet() {
    static const bool once = (common_log_set_verbosity_thold(-1), true);
    (void) once;
}

// calls fn() and returns KVC_CHAT_OK, or the status of what it throws
template <typename F>
static int32_t guarded(char ** out, F && fn) noexcept {
    try {
        if (out) {
            *out = nullptr;
        }
        be_quiet();
        fn();
    } catch (const std::bad_alloc &) {
        return failed(KVC_CHAT_ERR_MEMORY, "out of memory", out);
    } catch (const std::exception & err) {
        return failed(KVC_CHAT_ERR_ARGUMENT, err.what(), out);
    } catch (...) {
        return failed(KVC_CHAT_ERR_INTERNAL, "an exception of unknown type", out);
    }

    return KVC_CHAT_OK;
}

// the same for an fn() that returns the text for out
template <typename F>
static int32_t returned(char ** out, F && fn) noexcept {
    return guarded(out, [&] {
        if (!out) {
            throw std::invalid_argument("out is NULL");
        }
        *out = text_of(fn());
        if (!*out) {
            throw std::bad_alloc();
        }
    });
}

static json parsed(const char * text) {
    if (!text) {
        throw std::invalid_argument("a text is NULL");
    }

    return json::parse(text);
}

// llama.cpp's parsers call themselves for every level of a JSON text, until the stack ends
static void check_depth(const std::string & text) {
    static constexpr int max_depth = 256;

    int depth = 0;
    for (const char c : text) {
        if (c == '[' || c == '{') {
            if (++depth > max_depth) {
                throw std::invalid_argument("a text has more than " + std::to_string(max_depth) + " nested brackets");
            }
        } else if (c == ']' || c == '}') {
            depth = std::max(0, depth - 1);
        }
    }
}

template <typename T>
static T & checked(T * handle) {
    if (!handle) {
        throw std::invalid_argument("the handle is NULL");
    }

    return *handle;
}

int32_t kvc_chat_abi(void) {
    return KVC_CHAT_ABI;
}

void kvc_chat_text_free(char * text) {
    std::free(text);
}

int32_t kvc_chat_grammar_of_schema(const char * schema, char ** out) {
    return returned(out, [&] { return json_schema_to_grammar(parsed(schema)); });
}

int32_t kvc_chat_body_of_messages(const char * body, char ** out) {
    return returned(out, [&] { return server_chat_convert_anthropic_to_oai(parsed(body)).dump(); });
}

int32_t kvc_chat_body_of_responses(const char * body, char ** out) {
    return returned(out, [&] { return server_chat_convert_responses_to_chatcmpl(parsed(body)).dump(); });
}

//
// templates
//

int32_t kvc_chat_template_new(const char * source, const char * bos, const char * eos, int32_t adds_bos,
        kvc_chat_template ** handle, char ** out) {
    return guarded(out, [&] {
        if (!source || !*source || !bos || !eos || !handle) {
            throw std::invalid_argument("the source is empty, or an argument is NULL");
        }
        const bool is_name = std::strcmp(source, "chatml") == 0;
        if (!is_name) {
            common_chat_template(source, bos, eos); // the next call loses the message of a template that has mistakes
        }

        *handle = new kvc_chat_template{ common_chat_templates_init(nullptr, source, bos, eos), adds_bos ? bos : "" };
    });
}

void kvc_chat_template_free(kvc_chat_template * handle) {
    delete handle;
}

int32_t kvc_chat_template_caps(const kvc_chat_template * handle, char ** out) {
    return returned(out, [&] {
        json res = json::object();
        for (const auto & [name, value] : common_chat_templates_get_caps(checked(handle).templates.get())) {
            res[name] = value;
        }
        res["supports_thinking"] = common_chat_templates_support_enable_thinking(handle->templates.get());

        return res.dump();
    });
}

static thread_local std::time_t g_time = -1; // -1: now

std::time_t kvc_chat_time() {
    return g_time == -1 ? std::time(nullptr) : g_time;
}

// sets the time that templates see in this thread
struct at_time {
    explicit at_time(std::time_t time) { g_time = time; }
    ~at_time() { g_time = -1; }
};

static common_chat_templates_inputs inputs_of(const json & request, bool supports_parallel_calls) {
    common_chat_templates_inputs res;

    const json messages = request.at("messages");
    if (!messages.is_array()) {
        throw std::invalid_argument("\"messages\" is no array");
    }
    res.messages = common_chat_msgs_parse_oaicompat(messages);
    for (const auto & message : res.messages) {
        for (const auto & call : message.tool_calls) {
            check_depth(call.arguments);
        }
    }
    if (request.contains("tools")) {
        res.tools = common_chat_tools_parse_oaicompat(request.at("tools"));
    }
    if (request.contains("json_schema")) {
        res.json_schema = request.at("json_schema").dump();
    }
    if (request.contains("chat_template_kwargs")) {
        for (const auto & item : request.at("chat_template_kwargs").items()) {
            res.chat_template_kwargs[item.key()] = item.value().dump();
        }
    }
    if (request.contains("continue_final_message")) {
        res.continue_final_message = common_chat_continuation_parse(request.at("continue_final_message"));
    }

    res.grammar               = request.value("grammar", std::string());
    res.tool_choice           = common_chat_tool_choice_parse_oaicompat(request.value("tool_choice", std::string("auto")));
    res.parallel_tool_calls   = request.value("parallel_tool_calls", supports_parallel_calls);
    res.reasoning_format      = common_reasoning_format_from_name(request.value("reasoning_format", std::string("none")));
    res.enable_thinking       = request.value("enable_thinking", true);
    res.add_generation_prompt = request.value("add_generation_prompt", true);
    res.force_pure_content    = request.value("force_pure_content", false);
    res.use_jinja             = request.value("use_jinja", true);
    return res;
}

static json json_of(const common_chat_params & params) {
    std::vector<json> triggers;
    for (const auto & trigger : params.grammar_triggers) {
        triggers.push_back({
            {"type",  (int) trigger.type},
            {"value", trigger.value},
            {"token", (int) trigger.token},
        });
    }

    return {
        {"prompt",            params.prompt},
        {"generation_prompt", params.generation_prompt},
        {"grammar",           params.grammar},
        {"grammar_lazy",      params.grammar_lazy},
        {"grammar_triggers",  triggers},
        {"preserved_tokens",  params.preserved_tokens},
        {"stops",             params.additional_stops},
        {"thinking_start",    params.thinking_start_tag},
        {"thinking_ends",     params.thinking_end_tags},
        {"format",            (int) params.format},
        {"parser",            params.parser},
    };
}

int32_t kvc_chat_template_apply(const kvc_chat_template * handle, const char * request, char ** out) {
    return returned(out, [&] {
        const auto * templates = checked(handle).templates.get();
        auto         caps      = common_chat_templates_get_caps(templates);
        const json   given     = parsed(request);
        const auto   inputs    = inputs_of(given, caps["supports_parallel_tool_calls"]);
        at_time      time(given.value("now", int64_t(-1)));

        auto params = common_chat_templates_apply(templates, inputs);
        if (params.prompt.compare(0, handle->begin.size(), handle->begin) == 0) {
            params.prompt.erase(0, handle->begin.size());
        }

        return json_of(params).dump();
    });
}

//
// answers
//

int32_t kvc_chat_parser_new(const char * applied, kvc_chat_parser ** handle, char ** out) {
    return guarded(out, [&] {
        const json given = parsed(applied);
        if (!handle) {
            throw std::invalid_argument("handle is NULL");
        }

        common_chat_parser_params params;
        params.format               = (common_chat_format) given.value("format", 0);
        params.generation_prompt    = given.value("generation_prompt", std::string());
        params.reasoning_format     = common_reasoning_format_from_name(given.value("reasoning_format", std::string("none")));
        params.reasoning_in_content = given.value("reasoning_in_content", false);
        params.parse_tool_calls     = given.value("parse_tool_calls", true);
        params.is_continuation      = given.value("is_continuation", false);
        params.echo                 = given.value("echo", false);
        if (params.format < 0 || params.format >= COMMON_CHAT_FORMAT_COUNT) {
            throw std::invalid_argument("there is no such format");
        }
        const std::string parser = given.value("parser", std::string());
        if (!parser.empty()) {
            params.parser.load(parser);
        }

        auto res        = std::make_unique<kvc_chat_parser>();
        res->reads_json = parser.find("json") != std::string::npos;
        if (params.is_continuation && !params.echo) {
            res->message = common_chat_parse("", true, params); // deltas begin behind what the caller has said
        }
        res->params = std::move(params);
        *handle     = res.release();
    });
}

void kvc_chat_parser_free(kvc_chat_parser * handle) {
    delete handle;
}

static std::string random_id() {
    static const char chars[] = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

    std::random_device                    device;
    std::uniform_int_distribution<size_t> any(0, sizeof(chars) - 2);

    std::string res(32, ' ');
    for (char & c : res) {
        c = chars[any(device)];
    }

    return res;
}

int32_t kvc_chat_parser_read(kvc_chat_parser * handle, const char * answer, int32_t is_partial, char ** out) {
    return returned(out, [&] {
        auto & parser = checked(handle);
        if (!answer) {
            throw std::invalid_argument("the answer is NULL");
        }
        if (parser.reads_json) {
            check_depth(answer);
        }

        auto              message = common_chat_parse(answer, is_partial != 0, parser.params);
        std::vector<json> deltas;
        if (!message.empty()) { // a longer answer may be understood again
            message.set_tool_call_ids(parser.ids, random_id);
            for (const auto & diff : common_chat_msg_diff::compute_diffs(parser.message, message)) {
                deltas.push_back(server_chat_msg_diff_to_json_oaicompat(diff));
            }
            parser.message = std::move(message);
        }
        parser.message.role = "assistant";

        json res = { {"deltas", deltas} };
        if (!is_partial) {
            res["message"] = parser.message.to_json_oaicompat();
        }

        return res.dump();
    });
}

int32_t kvc_chat_sampler_accept(llama_sampler * sampler, int32_t token, char ** out) {
    return guarded(out, [&] { llama_sampler_accept(&checked(sampler), token); });
}
