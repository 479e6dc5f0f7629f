// Numbers: 64-bit indices, and the 16-bit storage types with float32 arithmetic.
#pragma once

#include <cmath>
#include <cstring>

#include "portability.cuh"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace gvit {

// Every index into a tensor: 2^31 elements is a batch of 8192 images.
using index_t = int64_t;

template <class T>
GVIT_HD constexpr T ceil_div(T value, T step) {
    return (value + step - 1) / step;
}

template <class T>
GVIT_HD constexpr T round_up(T value, T step) {
    return ceil_div(value, step) * step;
}

template <class T>
GVIT_HD constexpr T smaller(T a, T b) {
    return b < a ? b : a;
}

template <class T>
GVIT_HD constexpr T larger(T a, T b) {
    return a < b ? b : a;
}

// Storage only, bit for bit as in memory; all arithmetic is float32.
struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

template <class T>
constexpr bool kIsBfloat16 = false;
template <>
inline constexpr bool kIsBfloat16<bfloat16> = true;

GVIT_HD uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

GVIT_HD float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

GVIT_HD float to_float(float value) { return value; }
GVIT_HD float to_float(bfloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

// Exact for every float16: the exponent is moved by a multiplication, which also makes subnormals normal.
GVIT_HD float to_float(float16 value) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(value.bits));
#else
    const uint32_t sign = (value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7FFFu;
    constexpr uint32_t infinity = 0x7C00u;
    const float scaled = float_from_bits(magnitude << 13) * 0x1p112f;
    const uint32_t bits = magnitude < infinity ? float_bits(scaled) : 0x7F800000u | (magnitude & 0x3FFu) << 13;
    return float_from_bits(sign | bits);
#endif
}

template <class T>
GVIT_HD T from_float(float value);

template <>
GVIT_HD float from_float<float>(float value) {
    return value;
}

// To nearest, ties to even; a NaN stays a (quiet) NaN.
template <>
GVIT_HD bfloat16 from_float<bfloat16>(float value) {
#if defined(__CUDA_ARCH__)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
GVIT_HD float16 from_float<float16>(float value) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const uint32_t bits = float_bits(value);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};
    constexpr uint32_t overflow = 0x477FF000u;         // 65520 rounds to infinity
    constexpr uint32_t smallest_normal = 0x38800000u;  // 2^-14
    if (magnitude >= overflow) return {static_cast<uint16_t>(sign | 0x7C00u)};
    if (magnitude < smallest_normal) {
        // Adding 0.5 leaves a multiple of 2^-24, the step of float16 subnormals, in the low bits.
        const uint32_t steps = float_bits(float_from_bits(magnitude) + 0.5f) - float_bits(0.5f);
        return {static_cast<uint16_t>(sign | steps)};
    }
    const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
    return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

// How a tensor's elements are stored, where no template argument tells.
enum class Storage { float64, float32, bfloat16, float16 };

// What a storage type is computed in: float64 for itself, float32 for all others.
template <class T>
struct Accumulate {
    using type = float;
};
template <>
struct Accumulate<double> {
    using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

template <class T>
GVIT_HD accumulate_t<T> widen(T value) {
    return to_float(value);
}
template <>
GVIT_HD double widen<double>(double value) {
    return value;
}

template <class T>
GVIT_HD T narrow(accumulate_t<T> value) {
    return from_float<T>(value);
}
template <>
GVIT_HD double narrow<double>(double value) {
    return value;
}

// One element of a tensor whose storage type is known at run time only; exact.
GVIT_HD double element_of(const void* tensor, Storage storage, index_t i) {
    switch (storage) {
        case Storage::float64: return static_cast<const double*>(tensor)[i];
        case Storage::float32: return static_cast<const float*>(tensor)[i];
        case Storage::bfloat16: return to_float(static_cast<const bfloat16*>(tensor)[i]);
        default: return to_float(static_cast<const float16*>(tensor)[i]);
    }
}

// Several elements moved by one instruction; the address must be a multiple of the size.
template <class T, int count>
struct alignas(sizeof(T) * count) Pack {
    T element[count];
};

template <class T>
constexpr int kPackSize = 16 / static_cast<int>(sizeof(T));

// Whether rows of this length starting here can be moved 16 bytes at a time.
template <class T>
GVIT_HD bool can_pack(const T* start, index_t row_length) {
    return reinterpret_cast<uintptr_t>(start) % 16 == 0 && row_length % kPackSize<T> == 0;
}

}  // namespace gvit
