#pragma once

#include <ctime>

// The time that a template sees: what kvc_chat_template_apply() was given in this thread, or now.
std::time_t kvc_chat_time();
