// The products of group_attention in bfloat16 with sums in float32, for processors that multiply pairs of
// bfloat16. Included once, at level avx512_bfloat.
//
// Queries, keys, values and the gradient are multiplied as they are stored; only the weights and the gradient of
// the logits are rounded to bfloat16. A product takes two steps at a time: a pair is two neighbours of a row, or,
// where the sum runs over rows, the elements of two rows in one column (`pair_rows`).

namespace gvit::GVIT_LEVEL {

static_assert(sizeof(bfloat16) == 2);

// Lane i is the pair (low[i], high[i]), rounded.
GVIT_INLINE Vector<BfloatPair> pair_up(Vector<float> low, Vector<float> high) {
    const auto halves = reinterpret<Vector<uint16_t>>(_mm512_cvtne2ps_pbh(high, low));
    return reinterpret<Vector<BfloatPair>>(shuffle<uint16_t, Interleave<16, 0>>(halves, halves));
}

GVIT_INLINE Vector<BfloatPair> load_low_halves(const bfloat16* from) {
    __m256i halves;
    __builtin_memcpy(&halves, from, sizeof halves);
    return reinterpret<Vector<BfloatPair>>(_mm512_maskz_cvtepu16_epi32(0xFFFF, halves));
}

// to[i][j] = the pair of rows 2i and 2i + 1 in column j; what is beyond the last row or column is zero.
inline void pair_rows(const bfloat16* from, index_t row, index_t count, index_t width, BfloatPair* to) {
    constexpr index_t lanes = kLanes<float>;
    const index_t to_row = padded<float>(width);
    for (index_t i = 0; i < count; i += 2, from += 2 * row, to += to_row) {
        const bool both = i + 1 < count;
        index_t j = 0;
        for (; j + lanes <= width; j += lanes) {
            const Vector<BfloatPair> high = both ? load_low_halves(from + row + j) << 16 : Vector<BfloatPair>{};
            store(to + j, load_low_halves(from + j) | high);
        }
        for (index_t rest = j; rest < to_row; ++rest) {
            const BfloatPair high = both && rest < width ? from[row + rest].bits : 0;
            to[rest] = rest < width ? high << 16 | from[rest].bits : 0;
        }
    }
}

// Lane i: of half `which` of a vector, then of the same half of another.
template <int which>
struct HalfOfBoth {
    static constexpr int at(int i) { return i % 8 + 8 * which + i / 8 * 16; }
};

struct BfloatProducts : AttentionTile<bfloat16> {
    static constexpr index_t kBlock = 48;  // tokens multiplied at a time
    // Of a row; the layout of pairs takes two of them at a time.
    const index_t pairs = layout == Layout::pairs ? round_up<index_t>(p.depth, 4) / 2 : ceil_div<index_t>(p.depth, 2);
    const index_t pairs_row = padded<float>(pairs);
    BfloatPair* const token_scratch = memory.take<BfloatPair>(kBlock * pairs_row);
    BfloatPair* const row_scratch = memory.take<BfloatPair>(groups_limit * pairs_row);
    BfloatPair* const query_t = memory.take<BfloatPair>(pairs_row * groups_row);
    BfloatPair* const weight_pairs = memory.take<BfloatPair>((tile + 4) / 2 * groups_row);
    BfloatPair* const row_pairs = memory.take<BfloatPair>((tile + 1) / 2 * depth_row);
    index_t first_token = 0;

    explicit BfloatProducts(const AttentionParams& params)
        : AttentionTile(params, params.groups <= lanes / 2 ? Layout::pairs : Layout::columns) {}

    void start(index_t flat_head, index_t group) {
        select(flat_head, group);
        transpose(p.query, query_t);
    }

    void load_tile(index_t first, index_t count) {
        first_token = first;
        // Scaled after the product, because a scaled query would have to be rounded.
        multiply(p.key, count, query_t, logits, static_cast<float>(p.scale));
    }

    void weigh_values(index_t count, Rows<float> sums, bool add) const {
        sum_over_tokens(logits, p.value, count, sums, add);
    }

  protected:
    // Rows of this tile of groups to the layout that `multiply` takes.
    void transpose(const Matrices& rows, BfloatPair* to) const {
        copy_rows(at(rows, first_group), rows.row, groups, row_scratch);
        if (layout == Layout::pairs) return transpose_pairs<BfloatPair>({row_scratch, pairs_row}, groups, pairs, to);
        transpose_rows<BfloatPair>({row_scratch, pairs_row}, groups, pairs, to, groups_row);
    }

    // to = factor * `count` rows of the tile times the groups: two neighbours of a row are one step.
    void multiply(const Matrices& rows, index_t count, const BfloatPair* transposed, float* to, float factor) const {
        for (index_t l = 0; l < count; l += kBlock, to += kBlock * groups_row) {
            const index_t block = smaller(kBlock, count - l);
            const Strided<BfloatPair> tokens = read_pairs(rows, first_token + l, block);
            if (&rows == &p.key) prefetch(at(p.value, first_token + l), p.value.row, block);
            if (layout == Layout::pairs)
                paired_product(tokens.data, tokens.row, transposed, to, block, pairs);
            else
                product(tokens, transposed, groups_row, to, groups_row, block, groups_row, pairs, false);
            for (index_t i = 0; i < block * groups_row; i += lanes) store(to + i, load(to + i) * factor);
        }
    }

    // sums (+)= weights [token][group], transposed, times rows of the tile: two tokens are one step.
    void sum_over_tokens(const float* weights, const Matrices& rows, index_t count, Rows<float> sums, bool add) const {
        pair_tokens(weights, count);
        pair_rows(at(rows, first_token), rows.row, count, p.depth, row_pairs);
        product<BfloatPair>({weight_pairs, 1, groups_row}, row_pairs, depth_row, sums.data, sums.row, groups, depth_row,
                            ceil_div<index_t>(count, 2), add);
    }

  private:
    // The values are not read before the softmax: they come in while the keys are multiplied.
    void prefetch(const bfloat16* rows, index_t row, index_t count) const {
        constexpr index_t kLine = 64 / sizeof(bfloat16);
        for (index_t i = 0; i < count; ++i, rows += row)
            for (index_t d = 0; d < p.depth; d += kLine) __builtin_prefetch(rows + d);
    }

    // Neighbours of a row as pairs: in place where every row begins with a whole pair and ends with one.
    Strided<BfloatPair> read_pairs(const Matrices& rows, index_t first, index_t count) const {
        const bfloat16* from = at(rows, first);
        if (p.depth == 2 * pairs && rows.row % 2 == 0 && reinterpret_cast<uintptr_t>(from) % sizeof(BfloatPair) == 0)
            return {reinterpret_cast<const BfloatPair*>(from), rows.row / 2, 1};
        copy_rows(from, rows.row, count, token_scratch);
        return {token_scratch, pairs_row, 1};
    }

    // Padded with zeros to `pairs_row`.
    void copy_rows(const bfloat16* from, index_t row, index_t count, BfloatPair* to) const {
        for (index_t i = 0; i < count; ++i, from += row, to += pairs_row) {
            std::memset(to + p.depth / 2, 0, (pairs_row - p.depth / 2) * sizeof(BfloatPair));
            std::memcpy(to, from, p.depth * sizeof(bfloat16));
        }
    }

    // weight_pairs[i][s] = (weight of token 2i, of token 2i + 1); a last odd token is paired with zero, or, in the
    // layout of pairs, with a weight that meets a zero of `pair_rows`.
    void pair_tokens(const float* weights, index_t count) const {
        if (layout == Layout::pairs) {
            for (index_t l = 0; l < count; l += 4) {
                const Vector<float> first = load(weights + l * groups_row),
                                    second = load(weights + (l + 2) * groups_row);
                const auto even = shuffle<float, HalfOfBoth<0>>(first, second);
                store(weight_pairs + l / 2 * groups_row, pair_up(even, shuffle<float, HalfOfBoth<1>>(first, second)));
            }
            return;
        }
        for (index_t l = 0; l < count; l += 2) {
            const float* row = weights + l * groups_row;
            for (index_t s = 0; s < groups_row; s += lanes) {
                const Vector<float> next = l + 1 < count ? load(row + groups_row + s) : Vector<float>{};
                store(weight_pairs + l / 2 * groups_row + s, pair_up(load(row + s), next));
            }
        }
    }
};

struct BfloatGradientProducts : BfloatProducts {
    BfloatPair* const gradient_t = memory.take<BfloatPair>(pairs_row * groups_row);
    BfloatPair* const query_pairs = memory.take<BfloatPair>((groups_limit + 1) / 2 * depth_row);
    BfloatPair* const gradient_pairs = memory.take<BfloatPair>((groups_limit + 1) / 2 * depth_row);
    BfloatPair* const rounded = memory.take<BfloatPair>((tile + 4) / 2 * groups_row);

    using BfloatProducts::BfloatProducts;

    void start_gradient(Rows<float>) {
        transpose(p.grad_output, gradient_t);
        pair_rows(at(p.query, first_group), p.query.row, groups, p.depth, query_pairs);
        pair_rows(at(p.grad_output, first_group), p.grad_output.row, groups, p.depth, gradient_pairs);
    }

    void multiply_gradient(index_t count, float* d_weights) const {
        multiply(p.value, count, gradient_t, d_weights, 1);
    }

    void add_products(index_t count, float* d_logits, Rows<float> grad_query, Rows<float> grad_key,
                      Rows<float> grad_value, bool add) const {
        sum_over_groups(logits, gradient_pairs, count, grad_value, add);
        sum_over_groups(d_logits, query_pairs, count, grad_key, add);
        sum_over_tokens(d_logits, p.key, count, grad_query, true);
    }

  private:
    // sums (+)= weights [token][group] times rows of the groups: two groups are one step.
    void sum_over_groups(const float* weights, const BfloatPair* rows, index_t count, Rows<float> sums,
                         bool add) const {
        auto* to = reinterpret_cast<bfloat16*>(rounded);
        convert_row(weights, to, count * groups_row);
        // The last of an odd number of groups is paired with a row of zeros, which a NaN must not meet.
        if (groups % 2 != 0)
            for (index_t l = 0; l < count; ++l) to[l * groups_row + groups].bits = 0;
        product<BfloatPair>({rounded, groups_row / 2, 1}, rows, depth_row, sums.data, sums.row, count, depth_row,
                            ceil_div<index_t>(groups, 2), add);
    }
};

}  // namespace gvit::GVIT_LEVEL
