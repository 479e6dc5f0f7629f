// CPU kernels of group_attention for a range of heads. Included once per level, see csrc/cpu_levels.h.
#include "csrc/group_attention_cpu_tile.h"

namespace gvit::GVIT_LEVEL {

template <class S>
class AttentionForward : AttentionTile<S> {
    using Base = AttentionTile<S>;
    using T = typename Base::T;
    using Base::groups, Base::paired;
    using Base::p, Base::groups_row, Base::vector_row, Base::depth_row, Base::logits, Base::memory, Base::tile;

    T* const sums = memory.template take<T>(Base::groups_limit * depth_row);
    T* const largest = memory.template take<T>(vector_row);
    T* const total = memory.template take<T>(vector_row);
    T* const correction = memory.template take<T>(vector_row);

  public:
    explicit AttentionForward(const AttentionParams& params) : Base(params) {}

    void run(index_t flat_head, index_t group) {
        this->start(flat_head, group);
        std::memset(sums, 0, groups * depth_row * sizeof(T));
        for (index_t s = 0; s < vector_row; ++s) {
            largest[s] = -std::numeric_limits<T>::infinity();
            total[s] = 0;
        }
        for (index_t first = 0; first < p.tokens; first += tile) {
            const index_t count = smaller(tile, p.tokens - first);
            this->load_tile(first, count);
            if (paired && count % 2 == 1) exclude_row(count);
            for (index_t s = 0; s < vector_row; s += kLanes<T>) soften(s, this->vectors(count));
            if (first > 0) correct_sums();
            product<T>({logits, 1, groups_row}, this->values.data, this->values.row, sums, depth_row, groups, depth_row,
                       count, true);
        }
        finish();
    }

  private:
    void exclude_row(index_t token) {
        for (index_t s = 0; s < groups_row; ++s) logits[token * groups_row + s] = -std::numeric_limits<T>::infinity();
    }

    // Logits of lanes s.. to e^(logit - running maximum); notes by how much the earlier sums shrink. Four chains,
    // because one would wait for its own result at every step.
    GVIT_INLINE void soften(index_t s, index_t vectors) {
        constexpr int chains = 4;
        const Vector<T> before = load(largest + s);
        Vector<T> maximum[chains] = {before, before, before, before}, sum[chains] = {};
        index_t i = 0;
        for (; i + chains <= vectors; i += chains)
            for (int c = 0; c < chains; ++c)
                maximum[c] = larger_of(load(logits + (i + c) * vector_row + s), maximum[c]);
        for (; i < vectors; ++i) maximum[0] = larger_of(load(logits + i * vector_row + s), maximum[0]);
        Vector<T> top = larger_of(larger_of(maximum[0], maximum[1]), larger_of(maximum[2], maximum[3]));
        if (paired) top = larger_of(top, other_half(top));
        // Only -inf so far: any finite reference gives e^-inf = 0 without a NaN.
        const Vector<T> reference = top == -std::numeric_limits<T>::infinity() ? Vector<T>{} : top;
        for (i = 0; i + chains <= vectors; i += chains)
            for (int c = 0; c < chains; ++c) sum[c] += exponentiate(logits + (i + c) * vector_row + s, reference);
        for (; i < vectors; ++i) sum[0] += exponentiate(logits + i * vector_row + s, reference);
        Vector<T> all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        if (paired) all += other_half(all);
        const Vector<T> shrink = exponential(before - reference);
        store(largest + s, top);
        store(total + s, load(total + s) * shrink + all);
        store(correction + s, shrink);
    }

    static GVIT_INLINE Vector<T> exponentiate(T* logit, Vector<T> reference) {
        const Vector<T> e = exponential(load(logit) - reference);
        store(logit, e);
        return e;
    }

    // Where a vector holds two tokens: the same group of the other one.
    static GVIT_INLINE Vector<T> other_half(Vector<T> v) { return shuffle<T, Exchange<kLanes<T> / 2>>(v, v); }

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
    using Base::groups, Base::paired;
    using Base::p, Base::groups_row, Base::vector_row, Base::depth_row, Base::logits, Base::memory, Base::tile;

    T* const gradient_scratch = memory.template take<T>(Base::groups_limit * depth_row);
    T* const output_scratch = memory.template take<T>(Base::groups_limit * depth_row);
    T* const gradient_t = memory.template take<T>(p.depth * groups_row);
    T* const d_logits = memory.template take<T>((tile + 1) * groups_row);
    T* const grad_query = memory.template take<T>(Base::groups_limit * depth_row);
    T* const output_dot = memory.template take<T>(vector_row);
    T* const lse = memory.template take<T>(vector_row);
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
        this->transpose(gradient, gradient_t);
        std::memset(grad_query, 0, groups * depth_row * sizeof(T));
        const T* saved = this->statistics(p.lse);
        for (index_t s = 0; s < vector_row; ++s) lse[s] = output_dot[s] = 0;
        const Rows<T> output = read_rows<S>(this->at(p.output, group), p.output.row, groups, p.depth, output_scratch);
        for (index_t s = 0; s < groups; ++s) {
            output_dot[s] = dot(gradient[s], output[s], depth_row);
            lse[s] = saved[s];
        }
        for (index_t s = 0; paired && s < groups_row; ++s) {
            output_dot[groups_row + s] = output_dot[s];
            lse[groups_row + s] = lse[s];
        }
    }

    // logits become probabilities, d_logits scale * their gradient.
    void differentiate(index_t count) {
        this->multiply(this->values, gradient_t, count, d_logits);
        for (index_t i = 0; i < this->vectors(count); ++i) {
            T* row = logits + i * vector_row;
            T* d_row = d_logits + i * vector_row;
            for (index_t s = 0; s < vector_row; s += kLanes<T>) {
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
