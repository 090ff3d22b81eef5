# libkvc-chat: the sources of llama.cpp's `common` that chats need, behind the C API of kvc-chat.h. Included by llama.cpp's
# own CMakeLists.txt; `common` as a whole would bring in downloads, argument parsers and speculative decoding.

include(${CMAKE_CURRENT_LIST_DIR}/parsers/sources.cmake)

add_library(kvc-chat SHARED
    ${LLAMA_CHAT_PARSERS_SOURCES}
    common/chat-auto-parser-generator.cpp
    common/chat-auto-parser-helpers.cpp
    common/chat-diff-analyzer.cpp
    common/chat-peg-parser.cpp
    common/chat.cpp
    common/common.cpp
    common/jinja/caps.cpp
    common/jinja/lexer.cpp
    common/jinja/parser.cpp
    common/jinja/runtime.cpp
    common/jinja/string.cpp
    common/jinja/value.cpp
    common/json-schema-to-grammar.cpp
    common/json-schema.cpp
    common/json.cpp
    common/kvc-chat-unused.cpp
    common/kvc-chat.cpp
    common/log.cpp
    common/peg-parser.cpp
    common/trie.cpp
    common/unicode.cpp
    tools/server/server-chat.cpp
    )

target_include_directories(kvc-chat PRIVATE common tools/mtmd tools/server)
target_compile_features   (kvc-chat PRIVATE cxx_std_17)
target_link_libraries     (kvc-chat PRIVATE llama vendor::nlohmann vendor::sheredom)

set_target_properties(kvc-chat PROPERTIES
    CXX_VISIBILITY_PRESET     hidden
    VISIBILITY_INLINES_HIDDEN ON
    )

# a chat is parsed in microseconds either way, and -O1 compiles in half the time
if (NOT MSVC)
    target_compile_options(kvc-chat PRIVATE -O1)
endif()
