// One augmentation layer of an 8-bit RGB picture, to the formulas of Pillow.
#include <algorithm>
#include <array>
#include <cstring>

#include "csrc/cpu_dispatch.h"
#include "csrc/pictures.h"

namespace gvit {
namespace {

constexpr uint8_t kFill[3] = {124, 116, 104};  // FILL of groupvit_fast/data/augment.py

using Table = std::array<uint8_t, 256>;
using Tables = std::array<Table, 3>;
using Histograms = std::array<std::array<int64_t, 256>, 3>;

GVIT_INLINE uint8_t clamp_byte(float value) { return static_cast<uint8_t>(std::min(std::max(value, 0.f), 255.f)); }

// ImageEnhance: from `base` (factor 0) over the picture (factor 1) and beyond; the fraction is cut off.
GVIT_INLINE uint8_t blend_byte(float base, float value, float factor) {
    return clamp_byte(base + factor * (value - base));
}

GVIT_INLINE int32_t luma(const uint8_t* pixel) {
    return (pixel[0] * 19595 + pixel[1] * 38470 + pixel[2] * 7471 + 0x8000) >> 16;
}

Histograms histograms(const uint8_t* in, int64_t pixels) {
    Histograms counts{};
    for (int64_t i = 0; i < pixels; ++i) {
        for (int c = 0; c < 3; ++c) ++counts[c][in[3 * i + c]];
    }
    return counts;
}

template <class Entry>
Table table(const Entry& entry) {
    Table values;
    for (int i = 0; i < 256; ++i) values[i] = entry(i);
    return values;
}

Table identity() {
    return table([](int i) { return static_cast<uint8_t>(i); });
}

Table auto_contrast(const std::array<int64_t, 256>& counts) {
    int low = 0, high = 255;
    while (low < 255 && counts[low] == 0) ++low;
    while (high > 0 && counts[high] == 0) --high;
    if (high <= low) return identity();
    const double scale = 255.0 / (high - low), offset = -low * scale;
    return table([=](int i) { return static_cast<uint8_t>(std::clamp(static_cast<int>(i * scale + offset), 0, 255)); });
}

Table equalize(const std::array<int64_t, 256>& counts, int64_t pixels) {
    int last = 255;
    while (last > 0 && counts[last] == 0) --last;
    const int64_t step = (pixels - counts[last]) / 255;
    if (step == 0) return identity();
    int64_t below = step / 2;
    return table([&](int i) {
        const auto value = static_cast<uint8_t>(std::min<int64_t>(below / step, 255));
        below += counts[i];
        return value;
    });
}

Table point_table(PictureOperation operation, float value) {
    const int whole = static_cast<int>(value);
    return table([=](int i) -> uint8_t {
        switch (operation) {
            case PictureOperation::invert: return static_cast<uint8_t>(255 - i);
            case PictureOperation::posterize: return static_cast<uint8_t>(i & whole);
            case PictureOperation::solarize: return static_cast<uint8_t>(i < whole ? i : 255 - i);
            case PictureOperation::solarize_add: return static_cast<uint8_t>(i < 128 ? std::min(i + whole, 255) : i);
            default: return blend_byte(0.f, static_cast<float>(i), value);  // brightness
        }
    });
}

Table contrast_table(const uint8_t* in, int64_t pixels, float factor) {
    int64_t sum = 0;
    for (int64_t i = 0; i < pixels; ++i) sum += luma(in + 3 * i);
    const auto middle = static_cast<float>((2 * sum + pixels) / (2 * pixels));  // rounded
    return table([=](int i) { return blend_byte(middle, static_cast<float>(i), factor); });
}

void look_up(const uint8_t* in, int64_t pixels, const Tables& tables, uint8_t* out) {
    for (int64_t i = 0; i < 3 * pixels; i += 3) {
        for (int c = 0; c < 3; ++c) out[i + c] = tables[c][in[i + c]];
    }
}

struct Color {
    static GVIT_INLINE void run(const uint8_t* const& in, const int64_t& pixels, const float& factor,
                                uint8_t* const& out) {
        blend(in, pixels, factor, out);
    }

    // Arguments by value: bytes that are written could alias what a reference points to.
    static GVIT_INLINE void blend(const uint8_t* __restrict__ in, int64_t pixels, float factor,
                                  uint8_t* __restrict__ out) {
        for (int64_t i = 0; i < pixels; ++i) {
            const auto grey = static_cast<float>(luma(in + 3 * i));
            for (int c = 0; c < 3; ++c) out[3 * i + c] = blend_byte(grey, in[3 * i + c], factor);
        }
    }
};

struct Sharpness {
    static GVIT_INLINE void run(const uint8_t* const& in, const int64_t& size, const float& factor,
                                uint8_t* const& out) {
        const int64_t row = 3 * size;
        std::memcpy(out, in, row);
        for (int64_t y = 1; y + 1 < size; ++y) {
            const uint8_t *above = in + (y - 1) * row, *here = above + row, *below = here + row;
            uint8_t* target = out + y * row;
            std::memcpy(target, here, 3);
            for (int64_t i = 3; i < row - 3; ++i) {
                const int sum = above[i - 3] + above[i] + above[i + 3] + here[i - 3] + 5 * here[i] + here[i + 3] +
                                below[i - 3] + below[i] + below[i + 3];
                const int smooth = (2 * sum + 13) / 26;
                target[i] = blend_byte(static_cast<float>(smooth), here[i], factor);
            }
            std::memcpy(target + row - 3, here + row - 3, 3);
        }
        if (size > 1) std::memcpy(out + (size - 1) * row, in + (size - 1) * row, row);
    }
};

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

// A pixel as floats; the fourth is the next pixel's red.
GVIT_INLINE Float4 load_pixel(const uint8_t* pixel) {
    int32_t bits;
    std::memcpy(&bits, pixel, sizeof bits);
    const Int4 bytes = (Int4{bits, bits, bits, bits} >> Int4{0, 8, 16, 24}) & 255;
    return __builtin_convertvector(bytes, Float4);
}

// Writes a fourth byte, which the next pixel overwrites.
GVIT_INLINE void store_pixel(uint8_t* target, Float4 values) {
    Int4 bytes = __builtin_convertvector(values, Int4) << Int4{0, 8, 16, 24};
    bytes |= __builtin_shufflevector(bytes, bytes, 2, 3, 0, 1);
    bytes |= __builtin_shufflevector(bytes, bytes, 1, 0, 3, 2);
    const int32_t bits = bytes[0];
    std::memcpy(target, &bits, sizeof bits);
}

// Output pixel (x, y) shows the input at matrix * (x + 1/2, y + 1/2, 1), blended from the four nearest; the
// fraction is cut off. Reads and writes one byte beyond the last pixel.
struct Affine {
    static GVIT_INLINE void run(const uint8_t* const& pixels, const int64_t& size, const float* const& matrix,
                                uint8_t* const& moved) {
        const uint8_t* const in = pixels;  // copies: bytes that are written could alias the originals
        uint8_t* const out = moved;
        const float m[6] = {matrix[0], matrix[1], matrix[2], matrix[3], matrix[4], matrix[5]};
        const auto side = static_cast<int32_t>(size), row = 3 * side;
        const auto limit = static_cast<float>(size);
        for (int32_t y = 0; y < side; ++y) {
            const float base_x = m[1] * (y + 0.5f) + m[2], base_y = m[4] * (y + 0.5f) + m[5];
            uint8_t* target = out + y * row;
            for (int32_t x = 0; x < side; ++x, target += 3) {
                const float u = m[0] * (x + 0.5f) + base_x, v = m[3] * (x + 0.5f) + base_y;
                if (!(u >= 0 && u < limit && v >= 0 && v < limit)) {
                    std::memcpy(target, kFill, 3);
                    continue;
                }
                // u - 1/2 is at least -1/2, so adding 1 makes cutting off and rounding down the same
                const auto x0 = static_cast<int32_t>(u + 0.5f) - 1, y0 = static_cast<int32_t>(v + 0.5f) - 1;
                const float dx = u - 0.5f - x0, dy = v - 0.5f - y0;
                const uint8_t* above = in + std::max(y0, 0) * row;
                const uint8_t* below = in + std::min(y0 + 1, side - 1) * row;
                const int32_t left = 3 * std::max(x0, 0), right = 3 * std::min(x0 + 1, side - 1);
                const Float4 a = load_pixel(above + left), c = load_pixel(below + left);
                const Float4 upper = a + dx * (load_pixel(above + right) - a);
                const Float4 lower = c + dx * (load_pixel(below + right) - c);
                store_pixel(target, upper + dy * (lower - upper));
            }
        }
    }
};

}  // namespace

void apply_layer(const uint8_t* in, int64_t size, PictureOperation operation, float value, const float* matrix,
                 uint8_t* out) {
    const int64_t pixels = size * size;
    Tables tables;
    switch (operation) {
        case PictureOperation::none: std::memcpy(out, in, 3 * pixels); return;
        case PictureOperation::color: dispatch<Color>(in, pixels, value, out); return;
        case PictureOperation::sharpness: dispatch<Sharpness>(in, size, value, out); return;
        case PictureOperation::affine: dispatch<Affine>(in, size, matrix, out); return;
        case PictureOperation::auto_contrast:
        case PictureOperation::equalize: {
            const Histograms counts = histograms(in, pixels);
            const bool stretch = operation == PictureOperation::auto_contrast;
            for (int c = 0; c < 3; ++c) tables[c] = stretch ? auto_contrast(counts[c]) : equalize(counts[c], pixels);
            break;
        }
        case PictureOperation::contrast: tables.fill(contrast_table(in, pixels, value)); break;
        default: tables.fill(point_table(operation, value));
    }
    look_up(in, pixels, tables, out);
}

}  // namespace gvit
