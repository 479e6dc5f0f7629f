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

// One (sample, head, tile of groups): what forward and backward share.
//
// How the logits of a tile lie, so that few lanes idle (`Layout`); the vectors over which a softmax runs, one
// lane or all lanes of them belonging to a group, form a block:
//   columns   [token][group], groups padded to whole vectors; a block is a vector of groups, one token each
//   pairs     the same for at most half a vector of groups: a vector holds two tokens, and the products take two
//             steps of depth at a time; the only block is all of them
//   rows      [group][token] for at most a quarter of a vector of groups; a block is a group
enum class Layout { columns, pairs, rows };

template <class T>
Layout layout_of(index_t groups, index_t depth) {
    if (groups <= kLanes<T> / 4) return Layout::rows;
    return sizeof(T) == 4 && groups <= kLanes<T> / 2 && depth % 2 == 0 ? Layout::pairs : Layout::columns;
}

template <class S>
struct AttentionTile {
    using T = accumulate_t<S>;
    static constexpr index_t lanes = kLanes<T>;

    const AttentionParams& p;
    const index_t tile, groups_limit, depth_row;
    const Layout layout;
    const bool dots;           // logits as products of rows with rows, nothing transposed
    const index_t groups_row;  // groups, padded as far as `columns` and `pairs` need
    const index_t token_step, group_step;
    const index_t vector_step, block_step;  // to the next vector of a block, to the next block
    Workspace memory;
    T *query_t, *logits, *key_scratch, *value_scratch, *query_scratch, *scaled;
    Rows<T> query{}, keys{}, values{};
    index_t sample = 0, head = 0, first_group = 0, groups = 0;

    explicit AttentionTile(const AttentionParams& params)
        : p(params),
          tile(attention_tile(params.tokens, params.groups)),
          groups_limit(smaller(kGroupTile, params.groups)),
          depth_row(padded<T>(params.depth)),
          layout(layout_of<T>(groups_limit, params.depth)),
          dots(layout == Layout::rows || ((layout == Layout::columns || params.tokens <= lanes) &&
                                          by_rows<T>(params.tokens, groups_limit, params.depth))),
          groups_row(layout == Layout::pairs ? lanes / 2 : padded<T>(groups_limit)),
          token_step(layout == Layout::rows ? 1 : groups_row),
          group_step(layout == Layout::rows ? padded<T>(tile) : 1),
          vector_step(larger(token_step, lanes)),
          block_step(layout == Layout::rows ? group_step : lanes) {
        query_t = memory.take<T>(dots ? 0 : p.depth * groups_row);
        logits = take_logits();
        key_scratch = memory.take<T>(tile * depth_row);
        value_scratch = memory.take<T>(tile * depth_row);
        query_scratch = memory.take<T>(groups_limit * depth_row);
        scaled = memory.take<T>(groups_limit * depth_row);
    }

    // Lanes of no group or no token are computed with, and so need a value.
    T* take_logits() {
        const index_t size = layout == Layout::rows ? groups_limit * group_step : (tile + 1) * groups_row;
        T* memory_of_tile = memory.take<T>(size);
        std::memset(memory_of_tile, 0, size * sizeof(T));
        return memory_of_tile;
    }

    S* at(const Matrices& m, index_t row) const {
        return static_cast<S*>(m.data) + sample * m.batch + head * m.head + row * m.row;
    }
    T* statistics(void* data) const {
        return static_cast<T*>(data) + (sample * p.heads + head) * p.groups + first_group;
    }

    // Vectors of a block for `count` tokens.
    index_t vectors(index_t count) const {
        return layout == Layout::columns ? count : ceil_div(count, layout == Layout::pairs ? 2 : lanes);
    }
    index_t blocks() const { return layout == Layout::rows ? groups : larger<index_t>(groups_row / lanes, 1); }
    // Where the statistic of a group lies, in memory of one vector a block.
    index_t lane_of(index_t group) const { return layout == Layout::rows ? group * lanes : group; }
    index_t statistics_size() const { return layout == Layout::rows ? groups_limit * lanes : padded<T>(groups_row); }

    // A reduction over the vectors of a block, to be finished over those of its lanes that belong together.
    template <class Combine>
    GVIT_INLINE Vector<T> across_lanes(Vector<T> v, Combine combine) const {
        if (layout == Layout::pairs) return combine(v, shuffle<T, Exchange<lanes / 2>>(v, v));
        if (layout == Layout::columns) return v;
        return all_lanes<T>(v, combine);
    }

    // `flat_head` counts the heads of all samples.
    void start(index_t flat_head, index_t group) {
        sample = flat_head / p.heads;
        head = flat_head % p.heads;
        first_group = group;
        groups = smaller(groups_limit, p.groups - group);
        query = read_rows<S>(at(p.query, group), p.query.row, groups, p.depth, query_scratch);
        for (index_t s = 0; s < groups; ++s)
            for (index_t d = 0; d < depth_row; d += lanes)
                store(scaled + s * depth_row + d, load(query[s] + d) * static_cast<T>(p.scale));
        transpose({scaled, depth_row}, query_t);
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
            multiply({keys[l], keys.row}, {scaled, depth_row}, query_t, block, logits + l * token_step);
        }
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
        if (dots) return product_of_rows<T>(rows, others, to, token_step, group_step, count, groups, depth_row);
        if constexpr (sizeof(T) == 4)
            if (layout == Layout::pairs) return paired_product(rows.data, rows.row, transposed, to, count, p.depth);
        product<T>({rows.data, rows.row, 1}, transposed, groups_row, to, groups_row, count, groups_row, p.depth, false);
    }

  private:
    GVIT_INLINE void prefetch_rows(const T* rows, index_t row, index_t count) const {
        constexpr index_t kLine = 64 / sizeof(T);
        for (index_t i = 0; i < count; ++i)
            for (index_t d = 0; d < p.depth; d += kLine) __builtin_prefetch(rows + i * row + d);
    }
};

}  // namespace gvit::GVIT_LEVEL
