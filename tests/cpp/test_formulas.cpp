// The formulas of kernels/ as plain C++ sees them: number types, resampling, argmax.
#include <cmath>
#include <cstdio>
#include <limits>

#include "kernels/mask_upsample.cuh"

namespace {

using namespace gvit;

int failures = 0;

#define CHECK(condition)                                                    \
    do {                                                                    \
        if (!(condition)) {                                                 \
            std::printf("%s:%d: not %s\n", __FILE__, __LINE__, #condition); \
            ++failures;                                                     \
        }                                                                   \
    } while (false)

template <class T>
bool is_nan(T stored) {
    return std::isnan(to_float(stored));
}

// Every 16-bit number survives the way to float32 and back.
template <class T>
void check_round_trip() {
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const T stored{static_cast<uint16_t>(bits)};
        const T back = from_float<T>(to_float(stored));
        CHECK(is_nan(stored) ? is_nan(back) : back.bits == stored.bits);
    }
}

// A number half-way between two neighbours goes to the even one, a bit more or less to the nearer.
template <class T>
void check_rounding() {
    for (uint32_t bits = 0; bits + 1 < 65536; ++bits) {
        const T below{static_cast<uint16_t>(bits)}, above{static_cast<uint16_t>(bits + 1)};
        const float low = to_float(below), high = to_float(above);
        if (!std::isfinite(low) || !std::isfinite(high) || (low < 0) != (high < 0)) continue;
        const float half = low + (high - low) / 2;
        CHECK(from_float<T>(half).bits == (bits % 2 == 0 ? below : above).bits);
        CHECK(from_float<T>(std::nextafter(half, low)).bits == below.bits);
        CHECK(from_float<T>(std::nextafter(half, high)).bits == above.bits);
    }
}

template <class A>
void check_axis(index_t in, index_t out) {
    const Axis<A> axis = make_axis<A>(in, out);
    index_t before = 0;
    for (index_t position = 0; position < out; ++position) {
        const Tap<A> tap = tap_of(axis, position);
        CHECK(tap.low >= before && tap.low < in);
        CHECK(tap.high == tap.low || (tap.high == tap.low + 1 && tap.high < in));
        CHECK(tap.low_weight >= 0 && tap.high_weight >= 0 && tap.low_weight + tap.high_weight == 1);
        before = tap.low;
        // The gradient must find this output from either input, and nowhere else.
        for (index_t input = 0; input < in; ++input) {
            const Span span = outputs_of(axis, input);
            CHECK(span.first >= 0 && span.last <= out);
            if (weight_in(tap, input) != 0) CHECK(span.first <= position && position < span.last);
        }
    }
}

// source = max(in / out * (p + 0.5) - 0.5, 0)
void check_known_taps() {
    const Axis<double> up = make_axis<double>(14, 224), down = make_axis<double>(9, 3);
    CHECK(tap_of(up, 7).low == 0 && tap_of(up, 7).high_weight == 0.0);
    CHECK(tap_of(up, 8).low == 0 && tap_of(up, 8).high == 1 && tap_of(up, 8).high_weight == 0.03125);
    CHECK(tap_of(up, 223).low == 13 && tap_of(up, 223).high == 13);
    CHECK(tap_of(down, 1).low == 4 && tap_of(down, 1).high_weight == 0.0);
}

void check_argmax() {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    CHECK(beats(2.0, 1.0) && !beats(1.0, 1.0) && !beats(1.0, 2.0));
    CHECK(beats(nan, 1.0) && !beats(1.0, nan) && !beats(nan, nan));
    CHECK(better({1, 4}, {2, 5}).index == 5);
    CHECK(better({1, 4}, {1, 3}).index == 3 && better({1, 3}, {1, 4}).index == 3);
    CHECK(better({nan, 4}, {nan, 3}).index == 3 && better({nan, 4}, {9, 3}).index == 4);
}

void check_confusion_cell() {
    CHECK(confusion_cell(2, 1, 3) == 7);
    CHECK(confusion_cell(3, 0, 3) == -1 && confusion_cell(-1, 0, 3) == -1);
    CHECK(confusion_cell(0, 3, 3) == -1 && confusion_cell(0, -1, 3) == -1);
}

}  // namespace

int main() {
    check_round_trip<float16>();
    check_round_trip<bfloat16>();
    check_rounding<float16>();
    check_rounding<bfloat16>();
    for (index_t in = 1; in < 20; ++in) {
        for (index_t out = 1; out < 60; ++out) {
            check_axis<float>(in, out);
            check_axis<double>(in, out);
        }
    }
    check_axis<float>(28, 448);
    check_axis<float>(1000, 37);
    check_known_taps();
    check_argmax();
    check_confusion_cell();
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
