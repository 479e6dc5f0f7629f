// group_attention for few groups, at most a quarter of a vector of them. Included once per level.
//
// Each group reads the tokens by itself, so that the lanes of a vector are tokens in the softmax and columns
// everywhere else, and none idles. A block of tokens stays in the first-level cache from its logits to the last
// sum; nothing is laid out anew.

namespace gvit::GVIT_LEVEL {

template <class S>
class FewGroups : AttentionHead<S> {
    using Head = AttentionHead<S>;
    using Head::p, Head::at, Head::select;
    using T = accumulate_t<S>;
    static constexpr index_t lanes = kLanes<T>;
    static constexpr index_t kBlock = 64;

  public:
    static constexpr index_t kMostGroups = larger<index_t>(lanes / 4, 1);

  private:
    const bool same = std::is_same_v<S, T>;
    const index_t depth_row = padded<T>(p.depth), width = same ? p.depth : depth_row;
    Workspace memory;
    T* const query_scratch = scratch(p.groups);
    T* const key_scratch = scratch(kBlock);
    T* const value_scratch = scratch(kBlock);
    T* const gradient_scratch = scratch(p.groups);
    T* const output_scratch = scratch(p.groups);
    T* const result_scratch = memory.take<T>(p.groups * depth_row);
    T* const weights = memory.take<T>(p.groups * kBlock);
    T* const d_logits = memory.take<T>(p.groups * kBlock);
    Vector<T> largest[kMostGroups], total[kMostGroups];

    // Rows of another type are converted, those of this one are used where they are.
    T* scratch(index_t rows) { return memory.take<T>(same ? 0 : rows * depth_row); }

  public:
    explicit FewGroups(const AttentionParams& params) : Head(params) {}

    void forward(index_t flat_head) {
        select(flat_head);
        const Rows<T> query = read(p.query, 0, p.groups, query_scratch);
        Rows<T> sums{result_scratch, depth_row};
        std::memset(sums.data, 0, p.groups * depth_row * sizeof(T));
        for (index_t s = 0; s < p.groups; ++s) {
            largest[s] = fill(-std::numeric_limits<T>::infinity());
            total[s] = Vector<T>{};
        }
        for (index_t first = 0; first < p.tokens; first += kBlock) {
            const index_t count = smaller(kBlock, p.tokens - first);
            const Rows<T> keys = read(p.key, first, count, key_scratch);
            const Rows<T> values = read(p.value, first, count, value_scratch);
            for (index_t s = 0; s < p.groups; ++s) dots(keys, count, query[s], weights + s * kBlock);
            for (index_t s = 0; s < p.groups; ++s) soften(s, count, sums[s]);
            for (index_t s = 0; s < p.groups; ++s) weigh(values, count, weights + s * kBlock, sums[s]);
        }
        T* lse = static_cast<T*>(p.lse) + flat_head * p.groups;
        for (index_t s = 0; s < p.groups; ++s) {
            const Vector<T> all = all_lanes<T>(total[s], [](auto a, auto b) { return a + b; });
            const Vector<T> inverse = p.tokens > 0 ? 1 / all : Vector<T>{};
            for (index_t d = 0; d < depth_row; d += lanes) store(sums[s] + d, load(sums[s] + d) * inverse);
            lse[s] = (largest[s] + (all == all ? logarithm(all) : all))[0];
        }
        write_rows<S>(sums, at(p.output, 0), p.output.row, p.groups, p.depth);
    }

    void backward(index_t flat_head) {
        select(flat_head);
        const Rows<T> query = read(p.query, 0, p.groups, query_scratch);
        const Rows<T> gradient = read(p.grad_output, 0, p.groups, gradient_scratch);
        const Rows<T> output = read(p.output, 0, p.groups, output_scratch);
        const T* lse = static_cast<const T*>(p.lse) + flat_head * p.groups;
        const Rows<T> grad_query{result_scratch, depth_row};
        std::memset(grad_query.data, 0, p.groups * depth_row * sizeof(T));
        T mean[kMostGroups] = {};
        for (index_t s = 0; s < p.groups; ++s) mean[s] = dot(gradient[s], output[s]);
        for (index_t first = 0; first < p.tokens; first += kBlock) {
            const index_t count = smaller(kBlock, p.tokens - first);
            const Rows<T> keys = read(p.key, first, count, key_scratch);
            const Rows<T> values = read(p.value, first, count, value_scratch);
            for (index_t s = 0; s < p.groups; ++s) {
                T *const weight = weights + s * kBlock, *const d_logit = d_logits + s * kBlock;
                dots(keys, count, query[s], weight);
                dots(values, count, gradient[s], d_logit);
                differentiate(count, lse[s], mean[s], weight, d_logit);
                weigh(keys, count, d_logit, grad_query[s]);
            }
            spread(weights, gradient, count, first, p.grad_value);
            spread(d_logits, query, count, first, p.grad_key);
        }
        write_rows<S>(grad_query, at(p.grad_query, 0), p.grad_query.row, p.groups, p.depth);
    }

  private:
    Rows<T> read(const Matrices& m, index_t first, index_t count, T* to) const {
        if constexpr (std::is_same_v<S, T>) return {at(m, first), m.row};
        return read_rows<S>(at(m, first), m.row, count, p.depth, to);
    }

    // Calls body(d, vectors, last) for the columns of a row by up to four vectors, the last of `last` lanes.
    template <class Body>
    GVIT_INLINE void by_columns(const Body& body) const {
        index_t d = 0;
        for (; d + 4 * lanes <= width; d += 4 * lanes) body(d, Count<4>{}, lanes);
        const index_t last = width % lanes == 0 ? lanes : width % lanes;
        switch (ceil_div(width - d, lanes)) {
            case 4: return body(d, Count<4>{}, last);
            case 3: return body(d, Count<3>{}, last);
            case 2: return body(d, Count<2>{}, last);
            case 1: return body(d, Count<1>{}, last);
        }
    }

    template <int vectors>
    static GVIT_INLINE void load_columns(const T* from, index_t last, Vector<T>* to) {
        for (int v = 0; v + 1 < vectors; ++v) to[v] = load(from + v * lanes);
        to[vectors - 1] = load_part(from + (vectors - 1) * lanes, last);
    }

    template <int vectors>
    static GVIT_INLINE void store_columns(T* to, index_t last, const Vector<T>* from) {
        for (int v = 0; v + 1 < vectors; ++v) store(to + v * lanes, from[v]);
        store_part(to + (vectors - 1) * lanes, from[vectors - 1], last);
    }

    // to[l] = rows[l] . other; up to a whole vector more is written.
    void dots(Rows<T> rows, index_t count, const T* other, T* to) const {
        for (index_t l = 0; l < count; l += lanes) {
            Vector<T> sum[lanes] = {};
            by_columns([&](index_t d, auto vectors, index_t last) __attribute__((always_inline)) {
                Vector<T> right[vectors], left[vectors];
                load_columns<vectors>(other + d, last, right);
                for (int m = 0; m < lanes; ++m) {
                    load_columns<vectors>(rows[smaller(l + m, count - 1)] + d, last, left);
                    for (int v = 0; v < vectors; ++v) sum[m] += left[v] * right[v];
                }
            });
            store(to + l, sum_of_each<T>(sum));
        }
    }

    // Logits of a group to weights: e^(scale * logit - running maximum); shrinks the earlier sums.
    GVIT_INLINE void soften(index_t s, index_t count, T* sums) {
        const T lowest = -std::numeric_limits<T>::infinity();
        T* const weight = weights + s * kBlock;
        Vector<T> top = largest[s];
        for (index_t l = 0; l < count; l += lanes) {
            Vector<T> logit = load(weight + l) * static_cast<T>(p.scale);
            if (l + lanes > count)
                logit = lane_numbers<T>() < static_cast<Integer<T>>(count - l) ? logit : fill(lowest);
            store(weight + l, logit);
            top = larger_of(logit, top);
        }
        top = all_lanes<T>(top, [](auto a, auto b) { return larger_of(a, b); });
        // Only -inf so far: any finite reference gives e^-inf = 0 without a NaN.
        const Vector<T> reference = top == lowest ? Vector<T>{} : top;
        Vector<T> sum{};
        for (index_t l = 0; l < count; l += lanes) {
            const Vector<T> e = exponential(load(weight + l) - reference);
            store(weight + l, e);
            sum += e;
        }
        if (top[0] != largest[s][0]) {
            const Vector<T> shrink = exponential(largest[s] - reference);
            total[s] *= shrink;
            for (index_t d = 0; d < depth_row; d += lanes) store(sums + d, load(sums + d) * shrink);
        }
        total[s] += sum;
        largest[s] = top;
    }

    // weight becomes the probability of a token, d_logit scale * the gradient of its logit.
    GVIT_INLINE void differentiate(index_t count, T lse, T mean, T* weight, T* d_logit) const {
        const T scale = static_cast<T>(p.scale);
        for (index_t l = 0; l < count; l += lanes) {
            const Vector<T> probability = exponential(load(weight + l) * scale - lse);
            store(weight + l, probability);
            store(d_logit + l, probability * (load(d_logit + l) - mean) * scale);
        }
    }

    // Rows from `first` on of `result` = weights [group][token], transposed, times rows of the groups.
    void spread(const T* weight, Rows<T> rows, index_t count, index_t first, const Matrices& result) const {
        Rows<T> to{key_scratch, depth_row};
        if constexpr (std::is_same_v<S, T>) to = {at(result, first), result.row};
        for (index_t s = 0; s < p.groups; s += 2) {
            const bool two = s + 1 < p.groups;
            if (s == 0)
                two ? spread<2, false>(weight, rows, count, to) : spread<1, false>(weight, rows, count, to);
            else
                two ? spread<2, true>(weight + s * kBlock, {rows[s], rows.row}, count, to)
                    : spread<1, true>(weight + s * kBlock, {rows[s], rows.row}, count, to);
        }
        if constexpr (!std::is_same_v<S, T>) write_rows<S>(to, at(result, first), result.row, count, p.depth);
    }

    template <int groups, bool add>
    void spread(const T* weight, Rows<T> rows, index_t count, Rows<T> to) const {
        by_columns([&](index_t d, auto vectors, index_t last) __attribute__((always_inline)) {
            Vector<T> row[groups][vectors], sum[vectors] = {};
            for (int s = 0; s < groups; ++s) load_columns<vectors>(rows[s] + d, last, row[s]);
            for (index_t l = 0; l < count; ++l) {
                if (add) load_columns<vectors>(to[l] + d, last, sum);
                for (int v = 0; v < vectors; ++v) {
                    Vector<T> all = row[0][v] * weight[l];
                    for (int s = 1; s < groups; ++s) all += row[s][v] * weight[s * kBlock + l];
                    sum[v] = add ? sum[v] + all : all;
                }
                store_columns<vectors>(to[l] + d, last, sum);
            }
        });
    }

    T dot(const T* a, const T* b) const {
        Vector<T> sum{};
        by_columns([&](index_t d, auto vectors, index_t last) __attribute__((always_inline)) {
            Vector<T> left[vectors], right[vectors];
            load_columns<vectors>(a + d, last, left);
            load_columns<vectors>(b + d, last, right);
            for (int v = 0; v < vectors; ++v) sum += left[v] * right[v];
        });
        return sum_lanes<T>(sum);
    }

    // sums += the sum over l of weight[l] * rows[l].
    void weigh(Rows<T> rows, index_t count, const T* weight, T* sums) const {
        by_columns([&](index_t d, auto vectors, index_t last) __attribute__((always_inline)) {
            constexpr int chains = 4 / vectors;  // so many at least that none waits for its own result
            Vector<T> sum[chains][vectors] = {}, row[vectors];
            index_t l = 0;
            for (; l + chains <= count; l += chains)
                for (int c = 0; c < chains; ++c) {
                    load_columns<vectors>(rows[l + c] + d, last, row);
                    for (int v = 0; v < vectors; ++v) sum[c][v] += row[v] * weight[l + c];
                }
            for (; l < count; ++l) {
                load_columns<vectors>(rows[l] + d, last, row);
                for (int v = 0; v < vectors; ++v) sum[0][v] += row[v] * weight[l];
            }
            for (int v = 0; v < vectors; ++v) {
                Vector<T> all = load(sums + d + v * lanes);
                for (int c = 0; c < chains; ++c) all += sum[c][v];
                store(sums + d + v * lanes, all);
            }
        });
    }
};

}  // namespace gvit::GVIT_LEVEL
