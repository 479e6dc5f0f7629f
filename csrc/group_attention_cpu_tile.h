// What the CPU kernels of group_attention and of its gradient share. Included once per level.
//
// One pass with a running maximum (online softmax): logits are made for a tile of tokens and a tile of groups,
// stored [token][group], so that the softmax over tokens runs down the rows, lane by lane, without any
// reduction across lanes. The backward makes the probabilities of a tile again from lse.

namespace gvit::GVIT_LEVEL {

constexpr index_t kGroupTile = 64;

// Tokens per tile: 32 KiB of logits, 512 tokens at most.
inline index_t attention_tile(index_t tokens, index_t groups) {
    const index_t limit = smaller<index_t>(512, 2 * kGroupTile * kGroupTile / smaller(groups, kGroupTile));
    return tokens <= limit ? larger<index_t>(tokens, 1)
                           : round_up<index_t>(ceil_div(tokens, ceil_div(tokens, limit)), 12);
}

// How the logits of a tile lie, so that few lanes idle; the vectors over which a softmax runs, down the tokens,
// form a block:
//   columns   [token][group], groups padded to whole vectors; a block is a vector of groups, one token each
//   pairs     the same for at most half a vector of groups: a vector holds two tokens, and the products take two
//             steps of depth at a time; the only block is all of them
enum class Layout { columns, pairs };

// One head of one sample, and where its rows lie.
template <class S>
struct AttentionHead {
    const AttentionParams& p;
    index_t sample = 0, head = 0;

    explicit AttentionHead(const AttentionParams& params) : p(params) {}

    // `flat_head` counts the heads of all samples.
    void select(index_t flat_head) {
        sample = flat_head / p.heads;
        head = flat_head % p.heads;
    }

    S* at(const Matrices& m, index_t row) const {
        return static_cast<S*>(m.data) + sample * m.batch + head * m.head + row * m.row;
    }
};

// A tile of groups of a head: the logits of a tile of tokens, and where what belongs to them lies.
template <class S>
struct AttentionTile : AttentionHead<S> {
    using Head = AttentionHead<S>;
    using Head::p, Head::sample, Head::head;
    using Storage = S;
    using T = accumulate_t<S>;
    static constexpr index_t lanes = kLanes<T>;

    // Whether rows of tokens that do not fill vectors are computed with where they are.
    static constexpr bool masked = kMasksColumns && std::is_same_v<S, T>;
    const index_t tile, groups_limit, depth_row, width;  // columns computed of a sum over tokens or of one a token
    const Layout layout;
    const index_t groups_row;   // groups, padded as far as the layout needs
    const index_t vector_step;  // to the next vector of a block
    Workspace memory;
    T* const logits;
    index_t first_group = 0, groups = 0;

    AttentionTile(const AttentionParams& params, Layout layout_of_logits)
        : Head(params),
          tile(attention_tile(params.tokens, params.groups)),
          groups_limit(smaller(kGroupTile, params.groups)),
          depth_row(padded<T>(params.depth)),
          width(masked ? params.depth : depth_row),
          layout(layout_of_logits),
          groups_row(layout == Layout::pairs ? lanes / 2 : padded<T>(groups_limit)),
          vector_step(larger(groups_row, lanes)),
          logits(take_logits()) {}

    // Lanes of no group or no token are computed with, and so need a value.
    T* take_logits() {
        const index_t size = (tile + 3) * groups_row;
        T* memory_of_tile = memory.take<T>(size);
        std::memset(memory_of_tile, 0, size * sizeof(T));
        return memory_of_tile;
    }

    T* statistics(void* data) const {
        return static_cast<T*>(data) + (sample * p.heads + head) * p.groups + first_group;
    }

    // Vectors of a block for `count` tokens.
    index_t vectors(index_t count) const { return layout == Layout::columns ? count : ceil_div<index_t>(count, 2); }
    index_t blocks() const { return larger<index_t>(groups_row / lanes, 1); }
    index_t statistics_size() const { return padded<T>(groups_row); }  // one vector a block

    // A reduction over the vectors of a block, to be finished over those of its lanes that belong together.
    template <class Combine>
    GVIT_INLINE Vector<T> across_lanes(Vector<T> v, Combine combine) const {
        return layout == Layout::pairs ? combine(v, shuffle<T, Exchange<lanes / 2>>(v, v)) : v;
    }

    void select(index_t flat_head, index_t group) {
        Head::select(flat_head);
        first_group = group;
        groups = smaller(groups_limit, p.groups - group);
    }
};

template <class T>
Layout layout_of(index_t groups, index_t depth) {
    return sizeof(T) == 4 && groups <= kLanes<T> / 2 && depth % 2 == 0 ? Layout::pairs : Layout::columns;
}

// The products of a tile in the type of accumulation.
template <class S>
struct AttentionProducts : AttentionTile<S> {
    using Base = AttentionTile<S>;
    using T = typename Base::T;
    using Base::lanes, Base::p, Base::tile, Base::groups, Base::groups_limit, Base::groups_row, Base::depth_row,
        Base::width;
    using Base::logits, Base::layout, Base::memory;

    const bool dots;  // logits as products of rows with rows, nothing transposed
    T* const query_t = memory.template take<T>(dots ? 0 : p.depth * groups_row);
    T* const key_scratch = memory.template take<T>(tile * depth_row);
    T* const value_scratch = memory.template take<T>(tile * depth_row);
    T* const query_scratch = memory.template take<T>(groups_limit * depth_row);
    T* const scaled = memory.template take<T>(groups_limit * depth_row);
    Rows<T> query{}, keys{}, values{};

    explicit AttentionProducts(const AttentionParams& params)
        : Base(params, layout_of<T>(smaller(kGroupTile, params.groups), params.depth)),
          dots((layout == Layout::columns || p.tokens <= lanes) && by_rows<T>(p.tokens, groups_limit, p.depth)) {}

    void start(index_t flat_head, index_t group) {
        this->select(flat_head, group);
        query = read_rows<S>(this->at(p.query, group), p.query.row, groups, p.depth, query_scratch);
        for (index_t s = 0; s < groups; ++s)
            for (index_t d = 0; d < depth_row; d += lanes)
                store(scaled + s * depth_row + d, load(query[s] + d) * static_cast<T>(p.scale));
        transpose({scaled, depth_row}, query_t);
    }

    // Logits of `count` tokens from `first` on.
    void load_tile(index_t first, index_t count) {
        keys = read_tokens(p.key, first, count, key_scratch);
        values = read_tokens(p.value, first, count, value_scratch);
        // The values are not read before the softmax: they come in while the keys are multiplied, where that is
        // enough work to hide it.
        constexpr index_t kBlock = 48;
        for (index_t l = 0; l < count; l += kBlock) {
            const index_t block = smaller(kBlock, count - l);
            if (groups > 16) prefetch_rows(values[l], values.row, block);
            multiply({keys[l], keys.row}, {scaled, depth_row}, query_t, block, logits + l * groups_row);
        }
    }

    // sums (+)= weights of the tile, in place of its logits, times values.
    void weigh_values(index_t count, Rows<T> sums, bool add) const {
        product<T>({logits, 1, groups_row}, values.data, values.row, sums.data, sums.row, groups, width, count, add);
    }

    // Rows of this tile of groups to the layout that `multiply` takes.
    void transpose(Rows<T> rows, T* to) const {
        if (dots) return;
        if constexpr (sizeof(T) == 4)
            if (layout == Layout::pairs) return transpose_pairs(rows, groups, p.depth, to);
        transpose_rows<T>(rows, groups, p.depth, to, groups_row);
    }

    // Logits of `count` tokens = rows * others, of which `transposed` is the transpose.
    void multiply(Rows<T> rows, Rows<T> others, const T* transposed, index_t count, T* to) const {
        if (dots) return product_of_rows<T>(rows, others, to, groups_row, 1, count, groups, depth_row);
        if constexpr (sizeof(T) == 4)
            if (layout == Layout::pairs) return paired_product(rows.data, rows.row, transposed, to, count, p.depth);
        product<T>({rows.data, rows.row, 1}, transposed, groups_row, to, groups_row, count, groups_row, p.depth, false);
    }

  private:
    Rows<T> read_tokens(const Matrices& m, index_t first, index_t count, T* scratch) const {
        if constexpr (Base::masked)
            if (!dots) return {this->at(m, first), m.row};
        return read_rows<S>(this->at(m, first), m.row, count, p.depth, scratch);
    }

    GVIT_INLINE void prefetch_rows(const T* rows, index_t row, index_t count) const {
        constexpr index_t kLine = 64 / sizeof(T);
        for (index_t i = 0; i < count; ++i)
            for (index_t d = 0; d < p.depth; d += kLine) __builtin_prefetch(rows + i * row + d);
    }
};

// The products of the gradient of a tile.
template <class S>
struct AttentionGradientProducts : AttentionProducts<S> {
    using Base = AttentionProducts<S>;
    using T = typename Base::T;
    using Base::p, Base::groups, Base::width, Base::logits, Base::groups_row, Base::memory;

    T* const gradient_t = memory.template take<T>(Base::dots ? 0 : p.depth * Base::groups_row);
    Rows<T> gradient{};

    using Base::Base;

    void start_gradient(Rows<T> grad_output) {
        gradient = grad_output;
        this->transpose(gradient, gradient_t);
    }

    // Gradient of the weights of the tile.
    void multiply_gradient(index_t count, T* d_weights) const {
        this->multiply(this->values, gradient, gradient_t, count, d_weights);
    }

    // From the weights, in place of the logits, and the gradient of the logits.
    void add_products(index_t count, T* d_logits, Rows<T> grad_query, Rows<T> grad_key, Rows<T> grad_value,
                      bool add) const {
        product<T>({logits, groups_row, 1}, gradient.data, gradient.row, grad_value.data, grad_value.row, count, width,
                   groups, add);
        product<T>({d_logits, groups_row, 1}, this->query.data, this->query.row, grad_key.data, grad_key.row, count,
                   width, groups, add);
        product<T>({d_logits, 1, groups_row}, this->keys.data, this->keys.row, grad_query.data, grad_query.row, groups,
                   width, count, true);
    }
};

}  // namespace gvit::GVIT_LEVEL
