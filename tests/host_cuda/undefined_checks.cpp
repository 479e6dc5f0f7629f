// What -fsanitize=undefined calls when it finds something: here an exception with file and line instead of
// the end of the process. Each handler's first argument begins with the place in the source.
#include <cstdint>
#include <stdexcept>
#include <string>

#include "fibers.h"

namespace {

struct Place {
    const char* file;
    uint32_t line, column;
};

void report(const char* what, const Place& place) {
    if (gvit::host::in_kernel()) gvit::host::fault("%s at %s:%u", what, place.file, place.line);
    throw std::runtime_error(std::string(what) + " at " + place.file + ":" + std::to_string(place.line));
}

}  // namespace

#define GVIT_HANDLER(name, what) \
    extern "C" void __ubsan_handle_##name##_abort(const Place* place) { report(what, *place); }

GVIT_HANDLER(type_mismatch_v1, "null or misaligned address")
GVIT_HANDLER(out_of_bounds, "array index out of bounds")
GVIT_HANDLER(shift_out_of_bounds, "shift out of range")
GVIT_HANDLER(add_overflow, "integer overflow in +")
GVIT_HANDLER(sub_overflow, "integer overflow in -")
GVIT_HANDLER(mul_overflow, "integer overflow in *")
GVIT_HANDLER(negate_overflow, "integer overflow in negation")
GVIT_HANDLER(divrem_overflow, "integer division by zero or overflow")
GVIT_HANDLER(pointer_overflow, "pointer overflow")
GVIT_HANDLER(load_invalid_value, "invalid bool or enum value")
GVIT_HANDLER(vla_bound_not_positive, "array of no positive size")
GVIT_HANDLER(nonnull_arg, "null argument")
extern "C" void __ubsan_handle_builtin_unreachable(const Place* place) { report("unreachable code reached", *place); }
extern "C" void __ubsan_handle_missing_return(const Place* place) { report("no value returned", *place); }
