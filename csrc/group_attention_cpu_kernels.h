// CPU kernels of group_attention for a range of heads. Included once per level, see csrc/cpu_levels.h.
//
// One pass with a running maximum (online softmax): logits are made for a tile of tokens and a tile of groups,
// stored [token][group], so that the softmax over tokens runs down the rows, lane by lane, without any
// reduction across lanes. The backward makes the probabilities of a tile again from lse.

namespace gvit::GVIT_LEVEL {

constexpr index_t kGroupTile = 64;

inline index_t attention_tile(index_t tokens) {
    constexpr index_t limit = 128;  // times kGroupTile logits: 32 KiB
    return tokens <= limit ? larger<index_t>(tokens, 1)
                           : round_up<index_t>(ceil_div(tokens, ceil_div(tokens, limit)), 12);
}

// One (sample, head, tile of groups): what forward and backward share.
template <class S>
struct AttentionTile {
    using T = accumulate_t<S>;

    const AttentionParams& p;
    const index_t tile, groups_limit, groups_row, depth_row;
    Workspace memory;
    T *query_t, *logits, *key_scratch, *value_scratch, *query_scratch;
    Rows<T> query{}, keys{}, values{};
    index_t sample = 0, head = 0, first_group = 0, groups = 0;

    explicit AttentionTile(const AttentionParams& params)
        : p(params),
          tile(attention_tile(params.tokens)),
          groups_limit(smaller(kGroupTile, params.groups)),
          groups_row(padded<T>(groups_limit)),
          depth_row(padded<T>(params.depth)) {
        query_t = memory.take<T>(p.depth * groups_row);
        logits = memory.take<T>(tile * groups_row);
        key_scratch = memory.take<T>(tile * depth_row);
        value_scratch = memory.take<T>(tile * depth_row);
        query_scratch = memory.take<T>(groups_limit * depth_row);
    }

    S* at(const Matrices& m, index_t row) const {
        return static_cast<S*>(m.data) + sample * m.batch + head * m.head + row * m.row;
    }
    T* statistics(void* data) const {
        return static_cast<T*>(data) + (sample * p.heads + head) * p.groups + first_group;
    }

    // `flat_head` counts the heads of all samples.
    void start(index_t flat_head, index_t group) {
        sample = flat_head / p.heads;
        head = flat_head % p.heads;
        first_group = group;
        groups = smaller(groups_limit, p.groups - group);
        query = read_rows<S>(at(p.query, group), p.query.row, groups, p.depth, query_scratch);
        transpose_to(query, static_cast<T>(p.scale), query_t);
    }

    // Transposed rows of this tile of groups, with the row length of a full tile.
    void transpose_to(Rows<T> rows, T factor, T* to) const {
        transpose_rows<T>(rows, groups, p.depth, factor, to, groups_row);
    }

    void load_tile(index_t first, index_t count) {
        keys = read_rows<S>(at(p.key, first), p.key.row, count, p.depth, key_scratch);
        values = read_rows<S>(at(p.value, first), p.value.row, count, p.depth, value_scratch);
        // The values are not read before the softmax: they come in while the keys are multiplied, where that is
        // enough work to hide it.
        constexpr index_t kBlock = 48;
        for (index_t l = 0; l < count; l += kBlock) {
            const index_t block = smaller(kBlock, count - l);
            if (groups > 16) prefetch_rows(values[l], values.row, block);
            product<T>({keys[l], keys.row, 1}, query_t, groups_row, logits + l * groups_row, groups_row, block,
                       groups_row, p.depth, false);
        }
    }

    GVIT_INLINE void prefetch_rows(const T* rows, index_t row, index_t count) const {
        constexpr index_t kLine = 64 / sizeof(T);
        for (index_t i = 0; i < count; ++i)
            for (index_t d = 0; d < p.depth; d += kLine) __builtin_prefetch(rows + i * row + d);
    }
};

template <class S>
class AttentionForward : AttentionTile<S> {
    using Base = AttentionTile<S>;
    using T = typename Base::T;
    using Base::p, Base::groups_row, Base::depth_row, Base::logits, Base::memory, Base::tile, Base::groups;

    T* const sums = memory.template take<T>(Base::groups_limit * depth_row);
    T* const largest = memory.template take<T>(groups_row);
    T* const total = memory.template take<T>(groups_row);
    T* const correction = memory.template take<T>(groups_row);

  public:
    explicit AttentionForward(const AttentionParams& params) : Base(params) {}

    void run(index_t flat_head, index_t group) {
        this->start(flat_head, group);
        std::memset(sums, 0, groups * depth_row * sizeof(T));
        for (index_t s = 0; s < groups_row; ++s) {
            largest[s] = -std::numeric_limits<T>::infinity();
            total[s] = 0;
        }
        for (index_t first = 0; first < p.tokens; first += tile) {
            const index_t count = smaller(tile, p.tokens - first);
            this->load_tile(first, count);
            for (index_t s = 0; s < groups_row; s += kLanes<T>) soften(s, count);
            if (first > 0) correct_sums();
            product<T>({logits, 1, groups_row}, this->values.data, this->values.row, sums, depth_row, groups, depth_row,
                       count, true);
        }
        finish();
    }

  private:
    // Logits of lanes s.. to e^(logit - running maximum); notes by how much the earlier sums shrink. Four chains,
    // because one would wait for its own result at every step.
    GVIT_INLINE void soften(index_t s, index_t count) {
        constexpr int chains = 4;
        const Vector<T> before = load(largest + s);
        Vector<T> maximum[chains] = {before, before, before, before}, sum[chains] = {};
        index_t l = 0;
        for (; l + chains <= count; l += chains)
            for (int c = 0; c < chains; ++c)
                maximum[c] = larger_of(load(logits + (l + c) * groups_row + s), maximum[c]);
        for (; l < count; ++l) maximum[0] = larger_of(load(logits + l * groups_row + s), maximum[0]);
        const Vector<T> top = larger_of(larger_of(maximum[0], maximum[1]), larger_of(maximum[2], maximum[3]));
        // Only -inf so far: any finite reference gives e^-inf = 0 without a NaN.
        const Vector<T> reference = top == -std::numeric_limits<T>::infinity() ? Vector<T>{} : top;
        const auto soften_row = [&](index_t row, Vector<T>& total_of_chain) {
            T* logit = logits + row * groups_row + s;
            const Vector<T> e = exponential(load(logit) - reference);
            store(logit, e);
            total_of_chain += e;
        };
        for (l = 0; l + chains <= count; l += chains)
            for (int c = 0; c < chains; ++c) soften_row(l + c, sum[c]);
        for (; l < count; ++l) soften_row(l, sum[0]);
        const Vector<T> shrink = exponential(before - reference);
        store(largest + s, top);
        store(total + s, load(total + s) * shrink + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
        store(correction + s, shrink);
    }

    void correct_sums() {
        for (index_t s = 0; s < groups; ++s)
            for (index_t d = 0; d < depth_row; d += kLanes<T>)
                store(sums + s * depth_row + d, load(sums + s * depth_row + d) * correction[s]);
    }

    void finish() {
        T* lse = this->statistics(p.lse);
        for (index_t s = 0; s < groups; ++s) {
            const T inverse = p.tokens == 0 ? T(0) : 1 / total[s];
            S* to = this->at(p.output, this->first_group + s);
            for (index_t d = 0; d < p.depth; ++d) to[d] = narrow<S>(sums[s * depth_row + d] * inverse);
            lse[s] = largest[s] + std::log(total[s]);
        }
    }
};

// All tiles of groups of one head: gradients of keys and values are summed over them in order.
template <class S>
class AttentionBackward : AttentionTile<S> {
    using Base = AttentionTile<S>;
    using T = typename Base::T;
    using Base::p, Base::groups_row, Base::depth_row, Base::logits, Base::memory, Base::tile, Base::groups;

    T* const gradient_scratch = memory.template take<T>(Base::groups_limit * depth_row);
    T* const output_scratch = memory.template take<T>(Base::groups_limit * depth_row);
    T* const gradient_t = memory.template take<T>(p.depth * groups_row);
    T* const d_logits = memory.template take<T>(tile * groups_row);
    T* const grad_query = memory.template take<T>(Base::groups_limit * depth_row);
    T* const output_dot = memory.template take<T>(groups_row);
    T* const lse = memory.template take<T>(groups_row);
    T* const key_sums = memory.template take<T>(in_place<S>(p.depth) ? 0 : p.tokens * depth_row);
    T* const value_sums = memory.template take<T>(in_place<S>(p.depth) ? 0 : p.tokens * depth_row);
    Rows<T> gradient{};

  public:
    explicit AttentionBackward(const AttentionParams& params) : Base(params) {}

    void run(index_t flat_head) {
        Rows<T> grad_key{}, grad_value{};
        for (index_t group = 0; group < p.groups; group += kGroupTile) {
            start(flat_head, group);
            grad_key = result_rows<S>(this->at(p.grad_key, 0), p.grad_key.row, p.depth, key_sums);
            grad_value = result_rows<S>(this->at(p.grad_value, 0), p.grad_value.row, p.depth, value_sums);
            for (index_t first = 0; first < p.tokens; first += tile) {
                const index_t count = smaller(tile, p.tokens - first);
                this->load_tile(first, count);
                differentiate(count);
                const bool add = group > 0;
                product<T>({logits, groups_row, 1}, gradient.data, gradient.row, grad_value[first], grad_value.row,
                           count, depth_row, groups, add);
                product<T>({d_logits, groups_row, 1}, this->query.data, this->query.row, grad_key[first], grad_key.row,
                           count, depth_row, groups, add);
                product<T>({d_logits, 1, groups_row}, this->keys.data, this->keys.row, grad_query, depth_row, groups,
                           depth_row, count, true);
            }
            const S* to = this->at(p.grad_query, group);
            write_rows<S>({grad_query, depth_row}, const_cast<S*>(to), p.grad_query.row, groups, p.depth);
        }
        write_rows<S>(grad_key, this->at(p.grad_key, 0), p.grad_key.row, p.tokens, p.depth);
        write_rows<S>(grad_value, this->at(p.grad_value, 0), p.grad_value.row, p.tokens, p.depth);
    }

  private:
    void start(index_t flat_head, index_t group) {
        Base::start(flat_head, group);
        gradient = read_rows<S>(this->at(p.grad_output, group), p.grad_output.row, groups, p.depth, gradient_scratch);
        this->transpose_to(gradient, T(1), gradient_t);
        std::memset(grad_query, 0, groups * depth_row * sizeof(T));
        const T* saved = this->statistics(p.lse);
        for (index_t s = 0; s < groups_row; ++s) lse[s] = output_dot[s] = 0;
        const Rows<T> output = read_rows<S>(this->at(p.output, group), p.output.row, groups, p.depth, output_scratch);
        for (index_t s = 0; s < groups; ++s) {
            output_dot[s] = dot(gradient[s], output[s], depth_row);
            lse[s] = saved[s];
        }
    }

    // logits become probabilities, d_logits scale * their gradient.
    void differentiate(index_t count) {
        product<T>({this->values.data, this->values.row, 1}, gradient_t, groups_row, d_logits, groups_row, count,
                   groups_row, p.depth, false);
        for (index_t l = 0; l < count; ++l) {
            T* row = logits + l * groups_row;
            T* d_row = d_logits + l * groups_row;
            for (index_t s = 0; s < groups_row; s += kLanes<T>) {
                const Vector<T> probability = exponential(load(row + s) - load(lse + s));
                store(row + s, probability);
                store(d_row + s, probability * (load(d_row + s) - load(output_dot + s)) * static_cast<T>(p.scale));
            }
        }
    }
};

// Forward: units are the tiles of groups of all heads.
inline void group_attention(const AttentionParams& p, index_t first, index_t last) {
    with_storage_type(p.storage, [&](auto type) {
        AttentionForward<decltype(type)> kernel(p);
        const index_t tiles = ceil_div(p.groups, kGroupTile);
        for (index_t unit = first; unit < last; ++unit) kernel.run(unit / tiles, unit % tiles * kGroupTile);
    });
}

// Backward: units are the heads.
inline void group_attention_backward(const AttentionParams& p, index_t first, index_t last) {
    with_storage_type(p.storage, [&](auto type) {
        AttentionBackward<decltype(type)> kernel(p);
        for (index_t unit = first; unit < last; ++unit) kernel.run(unit);
    });
}

}  // namespace gvit::GVIT_LEVEL
