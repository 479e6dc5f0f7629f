// CPU kernels of group_attention for a range of heads. Included once per level, see csrc/cpu_levels.h.
#include "csrc/group_attention_cpu_tile.h"

#include "csrc/group_attention_cpu_few.h"
#include "csrc/group_attention_cpu_single.h"

#if GVIT_BFLOAT_PRODUCTS
#include "csrc/group_attention_cpu_bfloat.h"
#endif

namespace gvit::GVIT_LEVEL {

template <class Products>
class AttentionForward : Products {
    using Base = Products;
    using S = typename Base::Storage;
    using T = typename Base::T;
    using Base::groups_row, Base::vector_step;
    using Base::lanes, Base::p, Base::groups, Base::depth_row, Base::logits, Base::memory, Base::tile;

    T* const sums_scratch = memory.template take<T>(Base::groups_limit * depth_row);
    T* const largest = memory.template take<T>(Base::statistics_size());
    T* const total = memory.template take<T>(Base::statistics_size());
    T* const correction = memory.template take<T>(Base::statistics_size());
    Rows<T> sums{};

  public:
    explicit AttentionForward(const AttentionParams& params) : Base(params) {
        std::memset(sums_scratch, 0, Base::groups_limit * depth_row * sizeof(T));
    }
    void run(index_t flat_head, index_t group) {
        this->start(flat_head, group);
        sums = result_rows<S>(this->at(p.output, group), p.output.row, p.depth, sums_scratch);
        for (index_t s = 0; s < this->statistics_size(); ++s) {
            largest[s] = -std::numeric_limits<T>::infinity();
            total[s] = 0;
        }
        for (index_t first = 0; first < p.tokens; first += tile) {
            const index_t count = smaller(tile, p.tokens - first);
            this->load_tile(first, count);
            exclude_beyond(count);
            soften(count);
            if (first > 0) correct_sums();
            this->weigh_values(count, sums, first > 0);
        }
        finish();
    }

  private:
    // The tokens that fill the last vector of a block take no part in the softmax.
    void exclude_beyond(index_t count) {
        const index_t end = this->vectors(count) * vector_step;
        for (index_t i = count * groups_row; i < end; ++i) logits[i] = -std::numeric_limits<T>::infinity();
    }

    // Up to four blocks at a time, because one chain of sums would wait for its own result at every step.
    void soften(index_t count) {
        const index_t blocks = this->blocks(), vectors = this->vectors(count);
        index_t block = 0;
        for (; block + 4 <= blocks; block += 4) soften<4>(block * lanes, vectors);
        if (blocks - block == 3) soften<3>(block * lanes, vectors);
        if (blocks - block == 2) soften<2>(block * lanes, vectors);
        if (blocks - block == 1) soften<1>(block * lanes, vectors);
    }

    // Logits of the blocks from column s on to e^(logit - running maximum); notes by how much the earlier sums shrink.
    template <int blocks>
    GVIT_INLINE void soften(index_t s, index_t vectors) {
        constexpr int chains = 4 / blocks;
        T* const column = logits + s;
        const auto each = [&](auto reduce) __attribute__((always_inline)) {
            index_t i = 0;
            for (; i + chains <= vectors; i += chains)
                for (int c = 0; c < chains; ++c)
                    for (int b = 0; b < blocks; ++b) reduce(column + (i + c) * vector_step + b * lanes, c, b);
            for (; i < vectors; ++i)
                for (int b = 0; b < blocks; ++b) reduce(column + i * vector_step + b * lanes, 0, b);
        };
        Vector<T> maximum[chains][blocks], sum[chains][blocks] = {}, reference[blocks];
        for (int c = 0; c < chains; ++c)
            for (int b = 0; b < blocks; ++b) maximum[c][b] = load(largest + s + b * lanes);
        each([&](const T* logit, int c, int b)
                 __attribute__((always_inline)) { maximum[c][b] = larger_of(load(logit), maximum[c][b]); });
        for (int b = 0; b < blocks; ++b) {
            Vector<T> top = maximum[0][b];
            for (int c = 1; c < chains; ++c) top = larger_of(top, maximum[c][b]);
            top = this->across_lanes(top, [](auto a, auto b) { return larger_of(a, b); });
            // Only -inf so far: any finite reference gives e^-inf = 0 without a NaN.
            reference[b] = top == -std::numeric_limits<T>::infinity() ? Vector<T>{} : top;
            store(correction + s + b * lanes, exponential(load(largest + s + b * lanes) - reference[b]));
            store(largest + s + b * lanes, top);
        }
        each([&](T* logit, int c, int b)
                 __attribute__((always_inline)) { sum[c][b] += exponentiate(logit, reference[b]); });
        for (int b = 0; b < blocks; ++b) {
            Vector<T> all = sum[0][b];
            for (int c = 1; c < chains; ++c) all += sum[c][b];
            all = this->across_lanes(all, [](auto a, auto b) { return a + b; });
            T* const to = total + s + b * lanes;
            store(to, load(to) * load(correction + s + b * lanes) + all);
        }
    }

    static GVIT_INLINE Vector<T> exponentiate(T* logit, Vector<T> reference) {
        const Vector<T> e = exponential(load(logit) - reference);
        store(logit, e);
        return e;
    }

    void correct_sums() {
        for (index_t s = 0; s < groups; ++s) multiply_row(sums[s], correction[s]);
    }

    GVIT_INLINE void multiply_row(T* row, T factor) const {
        for (index_t d = 0; d < depth_row; d += lanes) store(row + d, load(row + d) * factor);
    }

    void finish() {
        T* lse = this->statistics(p.lse);
        for (index_t i = 0; i < this->statistics_size(); i += lanes) {
            const Vector<T> all = load(total + i);
            store(total + i, 1 / all);
            store(largest + i, load(largest + i) + (all == all ? logarithm(all) : all));
        }
        for (index_t s = 0; s < groups; ++s) {
            if (p.tokens == 0) std::memset(sums[s], 0, depth_row * sizeof(T));
            if (p.tokens > 0) multiply_row(sums[s], total[s]);
            lse[s] = largest[s];
        }
        write_rows<S>(sums, this->at(p.output, this->first_group), p.output.row, groups, p.depth);
    }
};

// All tiles of groups of one head: gradients of keys and values are summed over them in order.
template <class Products>
class AttentionBackward : Products {
    using Base = Products;
    using S = typename Base::Storage;
    using T = typename Base::T;
    using Base::groups_row, Base::vector_step;
    using Base::lanes, Base::p, Base::groups, Base::depth_row, Base::logits, Base::memory, Base::tile;

    T* const gradient_scratch = memory.template take<T>(Base::groups_limit * depth_row);
    T* const output_scratch = memory.template take<T>(Base::groups_limit * depth_row);
    T* const d_logits = this->take_logits();
    T* const grad_query = memory.template take<T>(Base::groups_limit * depth_row);
    T* const output_dot = memory.template take<T>(Base::statistics_size());
    T* const lse = memory.template take<T>(Base::statistics_size());
    const bool direct = Base::masked || in_place<S>(p.depth);  // sums of tokens are computed where they belong
    T* const key_sums = memory.template take<T>(direct ? 0 : p.tokens * depth_row);
    T* const value_sums = memory.template take<T>(direct ? 0 : p.tokens * depth_row);

  public:
    explicit AttentionBackward(const AttentionParams& params) : Base(params) {}

    void run(index_t flat_head) {
        Rows<T> grad_key{}, grad_value{};
        for (index_t group = 0; group < p.groups; group += kGroupTile) {
            start(flat_head, group);
            grad_key = token_sums(p.grad_key, key_sums);
            grad_value = token_sums(p.grad_value, value_sums);
            for (index_t first = 0; first < p.tokens; first += tile) {
                const index_t count = smaller(tile, p.tokens - first);
                this->load_tile(first, count);
                differentiate(count);
                this->add_products(count, d_logits, {grad_query, depth_row}, {grad_key[first], grad_key.row},
                                   {grad_value[first], grad_value.row}, group > 0);
            }
            const S* to = this->at(p.grad_query, group);
            write_rows<S>({grad_query, depth_row}, const_cast<S*>(to), p.grad_query.row, groups, p.depth);
        }
        write_rows<S>(grad_key, this->at(p.grad_key, 0), p.grad_key.row, p.tokens, p.depth);
        write_rows<S>(grad_value, this->at(p.grad_value, 0), p.grad_value.row, p.tokens, p.depth);
    }

  private:
    Rows<T> token_sums(const Matrices& m, T* scratch) const {
        if constexpr (std::is_same_v<S, T>)
            if (direct) return {this->at(m, 0), m.row};
        return {scratch, depth_row};
    }

    void start(index_t flat_head, index_t group) {
        Base::start(flat_head, group);
        const Rows<T> gradient =
            read_rows<S>(this->at(p.grad_output, group), p.grad_output.row, groups, p.depth, gradient_scratch);
        this->start_gradient(gradient);
        std::memset(grad_query, 0, groups * depth_row * sizeof(T));
        const T* saved = this->statistics(p.lse);
        for (index_t s = 0; s < this->statistics_size(); ++s) lse[s] = output_dot[s] = 0;
        const Rows<T> output = read_rows<S>(this->at(p.output, group), p.output.row, groups, p.depth, output_scratch);
        for (index_t s = 0; s < groups; ++s) {
            output_dot[s] = dot(gradient[s], output[s], depth_row);
            lse[s] = saved[s];
            if (Base::layout == Layout::columns) continue;
            output_dot[s + groups_row] = output_dot[s];  // in every lane that belongs to the group
            lse[s + groups_row] = lse[s];
        }
    }

    // logits become probabilities, d_logits scale * their gradient.
    void differentiate(index_t count) {
        this->multiply_gradient(count, d_logits);
        const index_t size = this->vectors(count) * vector_step, row = this->blocks() * lanes;
        const T scale = static_cast<T>(p.scale);
        for (index_t first = 0; first < size; first += row)
            for (index_t s = 0; s < row; s += lanes) {
                T *const logit = logits + first + s, *const d_logit = d_logits + first + s;
                const Vector<T> probability = exponential(load(logit) - load(lse + s));
                store(logit, probability);
                store(d_logit, probability * (load(d_logit) - load(output_dot + s)) * scale);
            }
    }
};

// Units are the tiles of groups of all heads.
template <class Products>
void attend(const AttentionParams& p, index_t first, index_t last) {
    using T = typename Products::T;
    const index_t tiles = ceil_div(p.groups, kGroupTile);
    if constexpr (std::is_same_v<typename Products::Storage, T>)
        if (p.tokens == 1) {
            SingleToken<T> kernel(p);
            for (index_t unit = first; unit < last; ++unit) {
                const index_t group = unit % tiles * kGroupTile;
                kernel.forward(unit / tiles, group, smaller(kGroupTile, p.groups - group));
            }
            return;
        }
    using Few = FewGroups<typename Products::Storage>;
    if (p.groups <= Few::kMostGroups) {
        Few kernel(p);
        for (index_t unit = first; unit < last; ++unit) kernel.forward(unit);
        return;
    }
    AttentionForward<Products> kernel(p);
    for (index_t unit = first; unit < last; ++unit) kernel.run(unit / tiles, unit % tiles * kGroupTile);
}

// Units are the heads.
template <class Products>
void differentiate_attention(const AttentionParams& p, index_t first, index_t last) {
    using T = typename Products::T;
    if constexpr (std::is_same_v<typename Products::Storage, T>)
        if (p.tokens == 1) {
            SingleToken<T> kernel(p);
            for (index_t unit = first; unit < last; ++unit) kernel.backward(unit);
            return;
        }
    using Few = FewGroups<typename Products::Storage>;
    if (p.groups <= Few::kMostGroups) {
        Few kernel(p);
        for (index_t unit = first; unit < last; ++unit) kernel.backward(unit);
        return;
    }
    AttentionBackward<Products> kernel(p);
    for (index_t unit = first; unit < last; ++unit) kernel.run(unit);
}

#if GVIT_BFLOAT_PRODUCTS
inline void group_attention(const AttentionParams& p, index_t first, index_t last) {
    attend<BfloatProducts>(p, first, last);
}

inline void group_attention_backward(const AttentionParams& p, index_t first, index_t last) {
    differentiate_attention<BfloatGradientProducts>(p, first, last);
}
#else
inline void group_attention(const AttentionParams& p, index_t first, index_t last) {
    with_storage_type(p.storage, [&](auto type) { attend<AttentionProducts<decltype(type)> >(p, first, last); });
}

inline void group_attention_backward(const AttentionParams& p, index_t first, index_t last) {
    with_storage_type(p.storage, [&](auto type) {
        differentiate_attention<AttentionGradientProducts<decltype(type)> >(p, first, last);
    });
}
#endif

}  // namespace gvit::GVIT_LEVEL
