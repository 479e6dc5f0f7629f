// Vectors of one level of instructions: loads, stores, reductions, exp and log. Included once per level, see
// csrc/cpu_levels.h; hence no include guard.

namespace gvit::GVIT_LEVEL {

template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(GVIT_VECTOR_BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr int kLanes = GVIT_VECTOR_BYTES / static_cast<int>(sizeof(T));

// The signed integer as wide as T: what a comparison of vectors yields.
template <class T>
using Integer = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

template <class T>
GVIT_INLINE Vector<T> load(const T* from) {
    Vector<T> v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}

template <class T>
GVIT_INLINE void store(T* to, Vector<T> v) {
    __builtin_memcpy(to, &v, sizeof v);
}

// The first `count` lanes alone, 1 <= count <= kLanes; the others are zero, or stay in memory as they are.
template <class T>
GVIT_INLINE Vector<T> load_part(const T* from, index_t count) {
#if GVIT_VECTOR_BYTES == 64
    const uint32_t mask = (uint32_t{2} << (count - 1)) - 1;
    if constexpr (sizeof(T) == 4)
        return reinterpret_cast<Vector<T>>(_mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), from));
    else
        return reinterpret_cast<Vector<T>>(_mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), from));
#else
    if (count == kLanes<T>) return load(from);
    Vector<T> v{};
    __builtin_memcpy(&v, from, count * sizeof(T));
    return v;
#endif
}

template <class T>
GVIT_INLINE void store_part(T* to, Vector<T> v, index_t count) {
#if GVIT_VECTOR_BYTES == 64
    const uint32_t mask = (uint32_t{2} << (count - 1)) - 1;
    if constexpr (sizeof(T) == 4)
        _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(mask), reinterpret_cast<__m512i>(v));
    else
        _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(mask), reinterpret_cast<__m512i>(v));
#else
    if (count == kLanes<T>) return store(to, v);
    __builtin_memcpy(to, &v, count * sizeof(T));
#endif
}

template <class T>
GVIT_INLINE Vector<T> fill(T value) {
    return value - Vector<T>{};
}

template <class To, class From>
GVIT_INLINE To reinterpret(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

template <class T, class From>
GVIT_INLINE Vector<T> load_converted(const From* from) {
    typedef From Loaded __attribute__((vector_size(sizeof(From) * kLanes<T>)));
    Loaded v;
    __builtin_memcpy(&v, from, sizeof v);
    return __builtin_convertvector(v, Vector<T>);
}

template <class T>
GVIT_INLINE Vector<Integer<T>> lane_numbers() {
    Vector<Integer<T>> v;
    for (int i = 0; i < kLanes<T>; ++i) v[i] = i;
    return v;
}

template <class V>
GVIT_INLINE V larger_of(V a, V b) {
    return a > b ? a : b;
}

template <class V>
GVIT_INLINE V smaller_of(V a, V b) {
    return a < b ? a : b;
}

// The orders that lanes are taken in: at(i) is the lane, of a vector followed by another, that becomes lane i.
template <int distance>
struct Exchange {
    static constexpr int at(int i) { return i ^ distance; }
};
template <int step, int first>
struct Every {
    static constexpr int at(int i) { return step * i + first; }
};
template <int lanes, int first>
struct Interleave {
    static constexpr int at(int i) { return first + i / 2 + i % 2 * lanes; }
};

template <class Order, class V, int... i>
GVIT_INLINE V shuffle_lanes(V a, V b, std::integer_sequence<int, i...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Order::at(i)...);
#else
    typedef decltype(a == b) Lanes;
    return __builtin_shuffle(a, b, Lanes{Order::at(i)...});
#endif
}

template <class T, class Order>
GVIT_INLINE Vector<T> shuffle(Vector<T> a, Vector<T> b) {
    return shuffle_lanes<Order>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

// Reductions over the lanes, by halves: the order depends on the width of the vector only.
#define GVIT_REDUCE_LANES(name, combine)                              \
    template <class T, int half = kLanes<T> / 2>                      \
    GVIT_INLINE T name(Vector<T> v) {                                 \
        if constexpr (half == 0) return v[0];                         \
        if constexpr (half != 0) {                                    \
            const Vector<T> other = shuffle<T, Exchange<half>>(v, v); \
            return name<T, half / 2>(combine);                        \
        }                                                             \
    }
GVIT_REDUCE_LANES(sum_lanes, v + other)
GVIT_REDUCE_LANES(largest_lane, larger_of(v, other))
GVIT_REDUCE_LANES(smallest_lane, smaller_of(v, other))
#undef GVIT_REDUCE_LANES

// A reduction whose result is in every lane.
template <class T, int half = kLanes<T> / 2, class Combine>
GVIT_INLINE Vector<T> all_lanes(Vector<T> v, Combine combine) {
    v = combine(v, shuffle<T, Exchange<half>>(v, v));
    if constexpr (half > 1) return all_lanes<T, half / 2>(v, combine);
    return v;
}

// Transposes a square of kLanes rows: log2 rounds of perfect shuffles of row i with row i + half.
template <class T>
GVIT_INLINE void transpose_square(Vector<T>* row) {
    constexpr int n = kLanes<T>, half = n / 2;
    for (int round = 1; round < n; round *= 2) {
        Vector<T> shuffled[n];
        for (int i = 0; i < half; ++i) {
            shuffled[2 * i] = shuffle<T, Interleave<n, 0>>(row[i], row[i + half]);
            shuffled[2 * i + 1] = shuffle<T, Interleave<n, half>>(row[i], row[i + half]);
        }
        for (int i = 0; i < n; ++i) row[i] = shuffled[i];
    }
}

// e^x for x <= 88 (below -87.3: 0), NaN for NaN; error under 2 units in the last place. Cody and Waite's
// reduction to |r| <= ln2 / 2, then the polynomial of the Cephes library.
GVIT_INLINE Vector<float> exponential(Vector<float> x) {
#if GVIT_VECTOR_BYTES == 64
    const auto power = _mm512_maskz_roundscale_ps(0xFFFF, reinterpret<__m512>(x * 1.44269504f), 0);
    const auto n = reinterpret<Vector<float>>(power);
#else
    const auto underflow = x < -87.3f;
    const Vector<float> shifter = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vector<float> rounded = (underflow ? fill(-87.3f) : x) * 1.44269504f + shifter;
    const Vector<float> n = rounded - shifter;
#endif
    const Vector<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector<float> p = fill(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
#if GVIT_VECTOR_BYTES == 64
    const __mmask16 normal = _mm512_cmp_ps_mask(reinterpret<__m512>(x), _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
    return reinterpret<Vector<float>>(_mm512_maskz_scalef_ps(normal, reinterpret<__m512>(p), power));
#else
    using Bits = Vector<int32_t>;
    const Bits exponent = reinterpret<Bits>(rounded) - reinterpret<Bits>(shifter) + 127;
    return underflow ? fill(0.0f) : p * reinterpret<Vector<float>>(exponent << 23);
#endif
}

// ln x for normal x > 0; error under 2 units in the last place, also near 1. Polynomial of Cephes.
GVIT_INLINE Vector<float> logarithm(Vector<float> x) {
    using Bits = Vector<int32_t>;
    const Bits shifted = reinterpret<Bits>(x) + (0x3F800000 - 0x3F3504F3);  // splits at sqrt(1/2)
    const Vector<float> e = __builtin_convertvector((shifted >> 23) - 127, Vector<float>);
    const Vector<float> f = reinterpret<Vector<float>>((shifted & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
    Vector<float> p = fill(7.0376836292e-2f);
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const Vector<float> square = f * f;
    p = p * square * f - e * 2.12194440e-4f - square * 0.5f;
    return (f + p) + e * 0.693359375f;
}

// float64 is for gradient checks: exactness matters, speed does not.
GVIT_INLINE Vector<double> exponential(Vector<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
    return x;
}
GVIT_INLINE Vector<double> logarithm(Vector<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log(x[i]);
    return x;
}

}  // namespace gvit::GVIT_LEVEL
