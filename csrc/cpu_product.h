// Matrix product of one level, small and register-blocked. Included once per level.
//
// Every element is summed over k in ascending order by one thread, so a result never depends on the number of
// threads or on the tile it was computed in.

namespace gvit::GVIT_LEVEL {

// A matrix whose element (i, j) is data[i * row + j * column].
template <class T>
struct Strided {
    const T* data;
    index_t row, column;
};

// What the sums of row i begin with where it is not zero: row of[i] of a matrix, times its factor.
template <class T>
struct Begin {
    const T* data = nullptr;
    index_t row = 0;
    const index_t* of = nullptr;
    const T* factor = nullptr;

    Begin from(index_t i, index_t j) const { return data == nullptr ? Begin{} : Begin{data + j, row, of + i, factor}; }
};

// What a product multiplies and in what it sums: a floating-point number in itself, or a pair of bfloat16, the two
// of a step beside each other, in float32.
using BfloatPair = uint32_t;
template <class E>
using Sum = std::conditional_t<std::is_same_v<E, BfloatPair>, float, E>;

template <class E>
GVIT_INLINE Vector<Sum<E>> multiply_add(Vector<E> a, Vector<E> b, Vector<Sum<E>> sum) {
#if GVIT_BFLOAT_PRODUCTS
    if constexpr (std::is_same_v<E, BfloatPair>)
        return _mm512_dpbf16_ps(sum, reinterpret<__m512bh>(a), reinterpret<__m512bh>(b));
    else
#endif
        return sum + a * b;
}

// Columns of a product that do not fill a vector, at its edge, are masked where that is free; elsewhere there must be
// none.
constexpr bool kMasksColumns = GVIT_VECTOR_BYTES == 64;

template <class T>
GVIT_INLINE Vector<T> load_edge(const T* from, bool edge, index_t last) {
    return kMasksColumns && edge ? load_part(from, last) : load(from);
}

template <class T>
GVIT_INLINE void store_edge(T* to, Vector<T> v, bool edge, index_t last) {
    if (kMasksColumns && edge)
        store_part(to, v, last);
    else
        store(to, v);
}

// c[m][...] (+)= sum over k of a(m, k) * b[k][...], for `rows` rows kept in registers and `vectors` vectors of
// columns, the last of `last` lanes.
template <class E, int rows, int vectors>
GVIT_INLINE void product_block(Strided<E> a, const E* b, index_t b_row, Sum<E>* c, index_t c_row, index_t depth,
                               index_t last, bool accumulate, Begin<Sum<E>> begin) {
    constexpr int lanes = kLanes<E>;
    using Sums = Vector<Sum<E>>;
    Sums sum[rows][vectors];
    for (int m = 0; m < rows; ++m)
        for (int v = 0; v < vectors; ++v)
            sum[m][v] = accumulate ? load_edge(c + m * c_row + v * lanes, v == vectors - 1, last) : Sums{};
    for (int m = 0; begin.data != nullptr && m < rows; ++m)
        for (int v = 0; v < vectors; ++v)
            sum[m][v] = load(begin.data + begin.of[m] * begin.row + v * lanes) * begin.factor[begin.of[m]];
    for (index_t k = 0; k < depth; ++k) {
        if (k % 16 == 0 && a.column == 1)
            for (int m = 0; m < rows; ++m) __builtin_prefetch(a.data + (m + rows) * a.row + k);
        Vector<E> right[vectors];
        for (int v = 0; v < vectors; ++v) right[v] = load_edge(b + k * b_row + v * lanes, v == vectors - 1, last);
        for (int m = 0; m < rows; ++m) {
            const Vector<E> left = fill(a.data[m * a.row + k * a.column]);
            for (int v = 0; v < vectors; ++v) sum[m][v] = multiply_add<E>(left, right[v], sum[m][v]);
        }
    }
    for (int m = 0; m < rows; ++m)
        for (int v = 0; v < vectors; ++v) store_edge(c + m * c_row + v * lanes, sum[m][v], v == vectors - 1, last);
}

template <class E, int rows, int vectors>
void product_rows(Strided<E> a, const E* b, index_t b_row, Sum<E>* c, index_t c_row, index_t count, index_t depth,
                  index_t last, bool accumulate, Begin<Sum<E>> begin) {
    index_t m = 0;
    for (; m + rows <= count; m += rows) {
        const Strided<E> block{a.data + m * a.row, a.row, a.column};
        product_block<E, rows, vectors>(block, b, b_row, c + m * c_row, c_row, depth, last, accumulate,
                                        begin.from(m, 0));
    }
    if constexpr (rows > 1) {
        constexpr int fewer = rows > 6 ? rows / 2 : rows - 1;
        const Strided<E> rest{a.data + m * a.row, a.row, a.column};
        if (m < count)
            product_rows<E, fewer, vectors>(rest, b, b_row, c + m * c_row, c_row, count - m, depth, last, accumulate,
                                            begin.from(m, 0));
    }
}

template <int count>
using Count = std::integral_constant<int, count>;

// c[m][n] (+)= sum over k of a(m, k) * b[k][n] for n < width, a multiple of the lanes of E unless kMasksColumns.
template <class E>
void product(Strided<E> a, const E* b, index_t b_row, Sum<E>* c, index_t c_row, index_t count, index_t width,
             index_t depth, bool accumulate, Begin<Sum<E>> begin = {}) {
    constexpr int lanes = kLanes<E>;
    constexpr index_t kDepthTile = 128;  // 128 rows of a panel of b stay in the first-level cache
    if (depth == 0 && !accumulate)
        for (index_t m = 0; m < count; ++m) std::memset(c + m * c_row, 0, width * sizeof(E));
    for (index_t k = 0; k < depth; k += kDepthTile) {
        const index_t tile = smaller(kDepthTile, depth - k);
        const Strided<E> left{a.data + k * a.column, a.row, a.column};
        const E* right = b + k * b_row;
        const bool add = accumulate || k > 0;
        const auto start = k > 0 ? Begin<Sum<E>>{} : begin;
        for (index_t n = 0; n < width;) {
            const index_t rest = width - n;
            const auto next = [&](auto rows, auto vectors) __attribute__((always_inline)) {
                const index_t last = smaller<index_t>(rest - (vectors - 1) * lanes, lanes);
                product_rows<E, rows, vectors>(left, right + n, b_row, c + n, c_row, count, tile, last, add,
                                               start.from(0, n));
                n += vectors * lanes;
            };
#if GVIT_VECTOR_REGISTERS >= 32
            if (rest > 3 * lanes)
                next(Count<6>{}, Count<4>{});
            else if (rest > lanes)
                next(Count<8>{}, Count<2>{});
            else
                next(Count<16>{}, Count<1>{});
#else
            if (rest > lanes)
                next(Count<6>{}, Count<2>{});
            else
                next(Count<8>{}, Count<1>{});
#endif
        }
    }
}

// The same for a result of half a vector's width, where a vector of b holds two steps of depth: lane 2n + i of
// vector k belongs to column n and step 2k + i (transpose_pairs). One broadcast brings two elements of a.
template <class E, int rows>
GVIT_INLINE void paired_block(const E* a, index_t a_row, const E* b, float* c, index_t depth) {
    constexpr int lanes = kLanes<float>;
    Vector<float> sum[rows] = {};
    for (index_t k = 0; k < depth; k += 2) {
        if (k % 16 == 0)
            for (int m = 0; m < rows; ++m) __builtin_prefetch(a + (m + rows) * a_row + k);
        const Vector<E> right = load(b + k / 2 * lanes);
        for (int m = 0; m < rows; ++m) {
            double pair;
            __builtin_memcpy(&pair, a + m * a_row + k, sizeof pair);
            sum[m] = multiply_add<E>(reinterpret<Vector<E>>(fill(pair)), right, sum[m]);
        }
    }
    for (int m = 0; m < rows; m += 2) {
        const Vector<float> even = shuffle<float, Every<2, 0>>(sum[m], sum[m + 1]);
        store(c + m * (lanes / 2), even + shuffle<float, Every<2, 1>>(sum[m], sum[m + 1]));
    }
}

// c[m][n] = sum over k of a[m][k] * b[k][n] for n < kLanes / 2, an even depth, and an even number of rows of c:
// an odd last row of a is computed twice.
template <class E>
void paired_product(const E* a, index_t a_row, const E* b, float* c, index_t count, index_t depth) {
    constexpr int rows = GVIT_VECTOR_REGISTERS >= 32 ? 16 : 8;
    constexpr index_t c_row = kLanes<float> / 2;
    index_t m = 0;
    for (; m + rows <= count; m += rows) paired_block<E, rows>(a + m * a_row, a_row, b, c + m * c_row, depth);
    for (; m < count; m += 2) paired_block<E, 2>(a + m * a_row, m + 1 < count ? a_row : 0, b, c + m * c_row, depth);
}

// Lane i of the result is the sum over the lanes of v[i]: neighbours are added until one vector is left.
template <class T>
GVIT_INLINE Vector<T> sum_of_each(Vector<T>* v) {
    for (int count = kLanes<T>; count > 1; count /= 2)
        for (int i = 0; i < count / 2; ++i)
            v[i] = shuffle<T, Every<2, 0>>(v[2 * i], v[2 * i + 1]) + shuffle<T, Every<2, 1>>(v[2 * i], v[2 * i + 1]);
    return v[0];
}

// c(m, n) = a[m] . b[n] for at most `a_rows` x `b_rows` pairs, one accumulator each; more rows of a block than
// there are repeat the last one.
template <class T, int a_rows, int b_rows>
GVIT_INLINE void dot_block(Rows<T> a, Rows<T> b, T* c, index_t c_row, index_t c_column, index_t a_count,
                           index_t b_count, index_t padded_depth) {
    static_assert(a_rows * b_rows == kLanes<T>);
    const T *left[a_rows], *right[b_rows];
    for (int m = 0; m < a_rows; ++m) left[m] = a[smaller<index_t>(m, a_count - 1)];
    for (int n = 0; n < b_rows; ++n) right[n] = b[smaller<index_t>(n, b_count - 1)];
    Vector<T> sum[kLanes<T>] = {};
    // Row by row where there is one to multiply with: the processor fetches ahead of a stream, not of many.
    if constexpr (b_rows == 1)
        for (int m = 0; m < a_rows; ++m)
            for (index_t k = 0; k < padded_depth; k += kLanes<T>) sum[m] += load(left[m] + k) * load(right[0] + k);
    for (index_t k = 0; b_rows > 1 && k < padded_depth; k += kLanes<T>) {
        Vector<T> other[b_rows];
        for (int n = 0; n < b_rows; ++n) other[n] = load(right[n] + k);
        for (int m = 0; m < a_rows; ++m) {
            const Vector<T> one = load(left[m] + k);
            for (int n = 0; n < b_rows; ++n) sum[m * b_rows + n] += one * other[n];
        }
    }
    const Vector<T> total = sum_of_each<T>(sum);
    if (b_rows == 1 && c_row == 1 && a_count >= a_rows) return store(c, total);
    for (int m = 0; m < smaller<index_t>(a_rows, a_count); ++m)
        for (int n = 0; n < smaller<index_t>(b_rows, b_count); ++n) c[m * c_row + n * c_column] = total[m * b_rows + n];
}

template <class T, int b_rows>
void dot_blocks(Rows<T> a, Rows<T> b, T* c, index_t c_row, index_t c_column, index_t a_count, index_t b_count,
                index_t padded_depth) {
    constexpr int a_rows = kLanes<T> / b_rows;
    for (index_t m = 0; m < a_count; m += a_rows)
        for (index_t n = 0; n < b_count; n += b_rows)
            dot_block<T, a_rows, b_rows>({a[m], a.row}, {b[n], b.row}, c + m * c_row + n * c_column, c_row, c_column,
                                         a_count - m, b_count - n, padded_depth);
}

// c(m, n) = a[m] . b[n]: both operands by rows, so nothing need be transposed and few columns waste no lanes.
template <class T>
void product_of_rows(Rows<T> a, Rows<T> b, T* c, index_t c_row, index_t c_column, index_t a_count, index_t b_count,
                     index_t padded_depth) {
    if (b_count == 1) return dot_blocks<T, 1>(a, b, c, c_row, c_column, a_count, 1, padded_depth);
    if constexpr (kLanes<T> >= 16)
        if (b_count > 2) return dot_blocks<T, 4>(a, b, c, c_row, c_column, a_count, b_count, padded_depth);
    dot_blocks<T, 2>(a, b, c, c_row, c_column, a_count, b_count, padded_depth);
}

// Whether that is cheaper for one operand of few rows: counted in multiplications of vectors, with the sums over
// lanes on one side, the transposition and idle lanes on the other. The factors fit what both took in float32, for
// 4 to 64 rows, 8 to 196 columns and depths of 64 to 768, on an AMD EPYC with AVX-512.
template <class T>
bool by_rows(index_t a_count, index_t b_count, index_t depth) {
    constexpr index_t lanes = kLanes<T>;
    const index_t by_rows = (11 * depth / 10 + 7 * lanes) * a_count * b_count / lanes;
    const index_t transposed = depth * a_count * ceil_div(b_count, lanes) + 7 * depth * b_count / 10;
    return by_rows < transposed;
}

}  // namespace gvit::GVIT_LEVEL
