// Both operators on a CPU, lane by lane as on a GPU; see attention_cpu.cc.
#pragma once

#include "attention_call.h"

namespace nuwa {

// Null, or why the call cannot be done.
const char* attend_on_cpu(const AttentionCall& call);

}  // namespace nuwa
