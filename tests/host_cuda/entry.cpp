// The C interface that Python calls: every function returns null, or what went wrong.
#include <exception>
#include <string>

#include "csrc/launchers.h"
#include "fibers.h"

namespace gvit {
void launch_probe(const char* name, float* data);
}

namespace {

template <class Call>
const char* guarded(const Call& call) {
    static std::string text;
    try {
        call();
        return nullptr;
    } catch (const std::exception& error) {
        text = error.what();
        return text.c_str();
    }
}

}  // namespace

#define GVIT_ENTRY(launch, Params)                                           \
    GVIT_EXPORT const char* gvit_host_##launch(const gvit::Params* params) { \
        return guarded([&] { gvit::launch_##launch(*params, nullptr); });    \
    }

GVIT_EXPORT const char* gvit_host_probe(const char* name, float* data) {
    return guarded([&] { gvit::launch_probe(name, data); });
}

GVIT_ENTRY(group_attention, AttentionParams)
GVIT_ENTRY(gumbel_assign, AssignParams)
GVIT_ENTRY(group_attention_backward, AttentionParams)
GVIT_ENTRY(gumbel_assign_backward, AssignParams)
GVIT_ENTRY(upsample, UpsampleParams)
GVIT_ENTRY(upsample_backward, UpsampleParams)
GVIT_ENTRY(decode, DecodeParams)
