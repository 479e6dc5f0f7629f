// Rows of a matrix in the type of accumulation: used in place where they can be, else converted and padded
// with zeros to whole vectors. Included once per level.

namespace gvit::GVIT_LEVEL {

template <class T>
constexpr index_t padded(index_t width) {
    return round_up<index_t>(width, kLanes<T>);
}

template <class T>
struct Rows {
    T* data;
    index_t row;
    T* operator[](index_t i) const { return data + i * row; }
};

// Whether rows of this storage type and width need no copy.
template <class S>
bool in_place(index_t width) {
    using T = accumulate_t<S>;
    return std::is_same_v<S, T> && width % kLanes<T> == 0;
}

// Between the storage type and the type of accumulation, in either direction.
template <class From, class To>
void convert_row(const From* from, To* __restrict__ to, index_t width) {
    if constexpr (std::is_same_v<From, To>)
        std::memcpy(to, from, width * sizeof(To));
    else if constexpr (std::is_same_v<To, accumulate_t<From>>)
        for (index_t j = 0; j < width; ++j) to[j] = widen(from[j]);
    else {
        index_t j = 0;
#if GVIT_BFLOAT_PRODUCTS
        if constexpr (std::is_same_v<To, bfloat16>)
            for (; j + kLanes<From> <= width; j += kLanes<From>) {
                const auto rounded = _mm512_cvtneps_pbh(load(from + j));
                __builtin_memcpy(to + j, &rounded, sizeof rounded);
            }
#endif
        for (; j < width; ++j) to[j] = narrow<To>(from[j]);
    }
}

// `count` rows starting at `from`; `scratch` holds count * padded(width) elements.
template <class S, class T = accumulate_t<S>>
Rows<T> read_rows(const S* from, index_t row, index_t count, index_t width, T* scratch) {
    if constexpr (std::is_same_v<S, T>)
        if (in_place<S>(width)) return {const_cast<T*>(from), row};
    const Rows<T> rows{scratch, padded<T>(width)};
    for (index_t i = 0; i < count; ++i) {
        convert_row(from + i * row, rows[i], width);
        for (index_t j = width; j < rows.row; ++j) rows[i][j] = 0;
    }
    return rows;
}

// Where `count` result rows are computed: the destination itself or `scratch`, to be followed by write_rows.
template <class S, class T = accumulate_t<S>>
Rows<T> result_rows(S* to, index_t row, index_t width, T* scratch) {
    if constexpr (std::is_same_v<S, T>)
        if (in_place<S>(width)) return {to, row};
    return {scratch, padded<T>(width)};
}

template <class S, class T = accumulate_t<S>>
void write_rows(Rows<T> rows, S* to, index_t row, index_t count, index_t width) {
    if (static_cast<const void*>(rows.data) == static_cast<const void*>(to)) return;
    for (index_t i = 0; i < count; ++i) convert_row(rows[i], to + i * row, width);
}

template <class T>
T dot(const T* a, const T* b, index_t padded_width) {
    Vector<T> sum{};
    for (index_t j = 0; j < padded_width; j += kLanes<T>) sum += load(a + j) * load(b + j);
    return sum_lanes<T>(sum);
}

// sums[j] += sum over i of rows[i][j], in blocks, so that rounding errors do not grow with the number of rows.
template <class T>
void add_column_sums(Rows<const T> rows, index_t count, index_t padded_width, T* sums) {
    constexpr index_t kBlock = 16;
    for (index_t j = 0; j < padded_width; j += kLanes<T>) {
        Vector<T> total{};
        for (index_t first = 0; first < count; first += kBlock) {
            Vector<T> block{};
            for (index_t i = first; i < smaller(first + kBlock, count); ++i) block += load(rows[i] + j);
            total += block;
        }
        store(sums + j, load(sums + j) + total);
    }
}

// to[column][i] = rows[i][column], i padded with zeros to whole vectors: the layout in which a product over
// `width` has its results along the vector. `row_of(i)` is where row i begins.
template <class T, class RowOf>
void transpose_by(RowOf row_of, index_t count, index_t width, T* to, index_t to_row) {
    constexpr int lanes = kLanes<T>;
    for (index_t i = 0; i < count; i += lanes) {
        const int block = static_cast<int>(smaller<index_t>(lanes, count - i));
        for (index_t j = 0; j < width; j += lanes) {
            Vector<T> square[lanes] = {};
            for (int k = 0; k < block; ++k) square[k] = load(row_of(i + k) + j);
            transpose_square<T>(square);
            for (int k = 0; k < lanes && j + k < width; ++k) store(to + (j + k) * to_row + i, square[k]);
        }
    }
}

template <class T>
void transpose_rows(Rows<T> rows, index_t count, index_t width, T* to, index_t to_row) {
    transpose_by<T>([rows](index_t i) { return rows[i]; }, count, width, to, to_row);
}

// The same for at most half a vector of rows, two columns at a time, as paired_product wants them: a pair moves
// as one element of twice the size, though a row need not begin at a multiple of one.
template <class E>
void transpose_pairs(Rows<E> rows, index_t count, index_t width, E* to) {
    static_assert(sizeof(double) == 2 * sizeof(E));
    const auto row_of = [rows](index_t i) { return reinterpret_cast<const double*>(rows[i]); };
    transpose_by<double>(row_of, count, width / 2, reinterpret_cast<double*>(to), kLanes<double>);
}

// Memory of one thread for one call, in pieces aligned for any vector.
class Workspace {
  public:
    template <class T>
    T* take(index_t count) {
        constexpr size_t alignment = 64;
        pieces_.emplace_back(new unsigned char[count * sizeof(T) + alignment]);
        const auto address = reinterpret_cast<uintptr_t>(pieces_.back().get());
        return reinterpret_cast<T*>((address + alignment - 1) / alignment * alignment);
    }

  private:
    std::vector<std::unique_ptr<unsigned char[]>> pieces_;
};

}  // namespace gvit::GVIT_LEVEL
