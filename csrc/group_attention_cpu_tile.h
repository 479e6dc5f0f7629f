// What the CPU kernels of group_attention and of its gradient share. Included once per level.
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
//
// A row of logits holds the groups of one token, padded to whole vectors; or, where they fill half a vector at
// most, a vector holds the rows of two tokens, and the products take two steps of depth at a time.
template <class S>
struct AttentionTile {
    using T = accumulate_t<S>;

    const AttentionParams& p;
    const index_t tile, groups_limit, depth_row;
    const bool paired;
    const index_t groups_row;  // from one token to the next
    const index_t vector_row;  // from one vector of a lane to the next: groups_row, or a vector where paired
    Workspace memory;
    T *query_t, *logits, *key_scratch, *value_scratch, *query_scratch, *scaled;
    Rows<T> query{}, keys{}, values{};
    index_t sample = 0, head = 0, first_group = 0, groups = 0;

    explicit AttentionTile(const AttentionParams& params)
        : p(params),
          tile(attention_tile(params.tokens)),
          groups_limit(smaller(kGroupTile, params.groups)),
          depth_row(padded<T>(params.depth)),
          paired(sizeof(T) == 4 && groups_limit <= kLanes<T> / 2 && params.depth % kLanes<T> == 0),
          groups_row(paired ? kLanes<T> / 2 : padded<T>(groups_limit)),
          vector_row(larger<index_t>(groups_row, kLanes<T>)) {
        query_t = memory.take<T>(p.depth * groups_row);
        logits = memory.take<T>((tile + 1) * groups_row);
        key_scratch = memory.take<T>(tile * depth_row);
        value_scratch = memory.take<T>(tile * depth_row);
        query_scratch = memory.take<T>(groups_limit * depth_row);
        scaled = memory.take<T>(groups_limit * depth_row);
    }

    S* at(const Matrices& m, index_t row) const {
        return static_cast<S*>(m.data) + sample * m.batch + head * m.head + row * m.row;
    }
    T* statistics(void* data) const {
        return static_cast<T*>(data) + (sample * p.heads + head) * p.groups + first_group;
    }

    // Vectors of one lane in the rows of `count` tokens.
    index_t vectors(index_t count) const { return paired ? (count + 1) / 2 : count; }

    // `flat_head` counts the heads of all samples.
    void start(index_t flat_head, index_t group) {
        sample = flat_head / p.heads;
        head = flat_head % p.heads;
        first_group = group;
        groups = smaller(groups_limit, p.groups - group);
        query = read_rows<S>(at(p.query, group), p.query.row, groups, p.depth, query_scratch);
        for (index_t s = 0; s < groups; ++s)
            for (index_t d = 0; d < depth_row; d += kLanes<T>)
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
            multiply({keys[l], keys.row}, query_t, block, logits + l * groups_row);
        }
    }

    // Rows of this tile of groups to the layout that `multiply` takes.
    void transpose(Rows<T> rows, T* to) const {
        if constexpr (sizeof(T) == 4)
            if (paired) return transpose_pairs(rows, groups, p.depth, to);
        transpose_rows<T>(rows, groups, p.depth, to, groups_row);
    }

    // to[token][group] = rows * transposed.
    void multiply(Rows<T> rows, const T* transposed, index_t count, T* to) const {
        if constexpr (sizeof(T) == 4)
            if (paired) return paired_product(rows.data, rows.row, transposed, to, count, p.depth);
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
