// Sums over pairs of a token and a group, with weights that are never stored.
//
// Both operators' gradients, and the soft assignment, have one form: a weight w[l, s] for token l and group s
// follows from one or two products (token row . group row over all channels), and the result is
//   sum_over_groups_kernel   out[l] = sum over s of w[l, s] * row s of a group matrix
//   sum_over_tokens_kernel   out[s] = sum over l of w[l, s] * row l of a token matrix
// A block of eight warps handles tiles of 64 tokens x 64 groups: it streams the channels of both sides through
// shared memory, turns the products into weights in registers, rounds them into shared memory, and multiplies.
// Sums run in a fixed order inside one block: no atomics.
//
// What differs between the operators is an Op<T>, made from the parameters:
//   problems, tokens, groups, channels     a problem is a sample, or a head of one
//   sources(problem)                       the matrices of the products
//   Tile(op, problem, token, group)        what a thread keeps for its pairs of a tile
//   Tile::weight(kind, products, n, i)     the weight of pair (n, i)
// and, for the sums that it takes part in, what is said there.
#pragma once

#include "parameters.cuh"
#include "tile.cuh"

namespace gvit {

constexpr int kPairThreads = 256;
constexpr int kPairTile = 64;
// A warp's share of a tile: 16 tokens x 32 groups.
using PairValues = Accumulator<4>;

GVIT_DEVICE int pair_stripe() { return warp_index() % 4; }
GVIT_DEVICE int pair_half() { return warp_index() / 4; }

// Groups lie in tiles in an order that gives each thread eight consecutive ones (two calls of the noise
// generator), although a fragment deals columns to lanes in pairs. Its own inverse.
struct GroupOrder {
    int first = 0;
    GVIT_DEVICE int operator()(int row) const {
        const int r = first + row;
        return 32 * (r / 32) + 8 * (r % 8 / 2) + 2 * (r % 32 / 8) + r % 2;
    }
};

// Where pair (n, i) of this thread lies in its tile.
GVIT_DEVICE int pair_token(int i) { return 16 * pair_stripe() + fragment_row(i); }
GVIT_DEVICE int pair_group(int n, int i) { return 32 * pair_half() + 8 * (lane_index() % 4) + 2 * n + i % 2; }

template <class T, int kProducts>
struct PairSources {
    Rows<const T> tokens[kProducts], groups[kProducts];
    bool same_tokens;  // the second product has the first one's token matrix
};

// Shared memory, in elements: first the tiles of the products, two slots of them; afterwards, in the same place, the
// weights and the slots of the rows that they multiply.
template <class T>
constexpr int kWeightSize = kPairTile * kWeightStride<T>;
template <class T, int kProducts, int kSlots = 2>
constexpr int kPairMemory = kSlots * 2 * kProducts * kTileSize<T>;

// products[p] = token rows . group rows. All threads must be done with `memory` before, and are not after.
template <int kSlots = 2, class T, int kProducts>
GVIT_DEVICE void multiply_pairs(PairValues (&products)[kProducts], const PairSources<T, kProducts>& from, int token,
                                int group, T* memory) {
    constexpr int slot_size = 2 * kProducts * kTileSize<T>;
    const auto load = [&, column = 0](int slot) mutable {
        GVIT_UNROLL
        for (int p = 0; p < kProducts; ++p) {
            T* const tiles = memory + slot * slot_size + 2 * p * kTileSize<T>;
            if (p == 0 || !from.same_tokens) load_tile<kPairThreads>(tiles, from.tokens[p], token, column);
            load_tile<kPairThreads>(tiles + kTileSize<T>, from.groups[p], group, column, GroupOrder{});
        }
        column += kTileColumns<T>;
    };
    const int steps = ceil_div(from.tokens[0].columns, kTileColumns<T>);
    auto slots = make_pipeline<kSlots>(steps, load);
    GVIT_UNROLL
    for (int p = 0; p < kProducts; ++p) products[p].clear();
    for (int step = 0; step < steps; ++step) {
        const T* const slot = memory + slots.next() * slot_size;
        GVIT_UNROLL
        for (int p = 0; p < kProducts; ++p) {
            const T* const tokens = slot + (from.same_tokens ? 0 : 2 * p * kTileSize<T>);
            const T* const groups = slot + (2 * p + 1) * kTileSize<T>;
            multiply<Sum::along_rows, Sum::along_rows>(products[p], tokens + 16 * pair_stripe() * kTileStride<T>,
                                                       kTileStride<T>, groups + 32 * pair_half() * kTileStride<T>,
                                                       kTileStride<T>, kTileColumns<T>);
        }
    }
}

// The weights of one kind for a tile; nothing outside the tensors.
template <class Op>
GVIT_DEVICE PairValues pair_weights(const typename Op::Tile& tile, int kind, const PairValues (&products)[Op::kProducts],
                                    int tokens_left, int groups_left) {
    PairValues weights;
    GVIT_UNROLL
    for (int n = 0; n < 4; ++n) {
        GVIT_UNROLL
        for (int i = 0; i < 4; ++i) {
            const bool inside = pair_token(i) < tokens_left && pair_group(n, i) < groups_left;
            weights.value[n][i] = inside ? tile.weight(kind, products, n, i) : 0.0f;
        }
    }
    return weights;
}

// Rounds a warp's weights into the tile [64 tokens, 64 groups in GroupOrder].
template <class T>
GVIT_DEVICE void put_weights(const PairValues& weights, T* tile) {
    put_fragment(weights, tile + 16 * pair_stripe() * kWeightStride<T> + 32 * pair_half(), kWeightStride<T>);
}

// A warp's share of a result tile: 16 rows, half of the columns.
template <class T>
using PairSum = Accumulator<kTileColumns<T> / 16>;

template <bool kTokenRows, class T>
GVIT_DEVICE void add_weighted(PairSum<T>& sum, const T* weights, const T* rows) {
    const T* const columns = rows + kTileColumns<T> / 2 * pair_half();
    if constexpr (kTokenRows) {
        multiply<Sum::along_rows, Sum::down_rows>(sum, weights + 16 * pair_stripe() * kWeightStride<T>, kWeightStride<T>,
                                                  columns, kTileStride<T>, kPairTile);
    } else {
        multiply<Sum::down_rows, Sum::down_rows>(sum, weights + 16 * pair_stripe(), kWeightStride<T>, columns,
                                                 kTileStride<T>, kPairTile);
    }
}

// ---- out[l] = sum over s ------------------------------------------------------------------------------------
//
// Op: kTokenTerm, a weight needs a sum over all groups of its token: Tile::token_term(products, n, i) is summed into
//     Tile::term[token] and given to put_token_term(problem, token, term);
//     passes, pass(number): the results, each the sum of up to two kinds of weights; weights of kind k go with the
//     rows of sources.groups[k]; result(number, problem), its rows; gather(...), what else a result has.

struct TokenPass {
    bool kind[2];
    bool gathers;
};

// From a thread's shares to the terms of its two tokens: over the four lanes that share a token, then over the two
// halves of the groups.
GVIT_DEVICE void sum_token_terms(float (&term)[2]) {
    GVIT_SHARED(float, halves, 2 * kPairTile);
    GVIT_UNROLL
    for (int h = 0; h < 2; ++h) {
        term[h] += shuffle_xor(term[h], 1);
        term[h] += shuffle_xor(term[h], 2);
        if (lane_index() % 4 == 0) halves[kPairTile * pair_half() + pair_token(2 * h)] = term[h];
    }
    GVIT_SYNC();
    GVIT_UNROLL
    for (int h = 0; h < 2; ++h) term[h] = halves[pair_token(2 * h)] + halves[kPairTile + pair_token(2 * h)];
}

// A block's work on one tile of tokens.
template <class T, class Op>
struct TokenSide {
    const Op& op;
    T* memory;
    index_t problem;
    int token;
    PairSources<T, 2> sources;
    PairValues products[2];
    typename Op::Tile tile;
    float term[2];
    bool ready;  // products and tile are those of the only tile of groups

    GVIT_DEVICE TokenSide(const Op& op_, T* memory_, index_t problem_, int token_)
        : op(op_), memory(memory_), problem(problem_), token(token_), sources(op_.sources(problem_)), term{}, ready(false) {}

    GVIT_DEVICE void make_products(int group) {
        GVIT_SYNC();
        tile = typename Op::Tile(op, problem, token, group);
        multiply_pairs(products, sources, token, group, memory);
        GVIT_UNROLL
        for (int h = 0; h < 2; ++h) tile.term[h] = term[h];
    }

    GVIT_DEVICE void make_terms() {
        for (int group = 0; group < op.groups; group += kPairTile) {
            make_products(group);
            GVIT_UNROLL
            for (int n = 0; n < 4; ++n) {
                GVIT_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const bool inside = token + pair_token(i) < op.tokens && group + pair_group(n, i) < op.groups;
                    if (inside) term[i / 2] += tile.token_term(products, n, i);
                }
            }
        }
        sum_token_terms(term);
        GVIT_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int mine = token + pair_token(2 * h);
            if (pair_half() == 0 && lane_index() % 4 == 0 && mine < op.tokens) op.put_token_term(problem, mine, term[h]);
            tile.term[h] = term[h];
        }
        ready = op.groups <= kPairTile;
    }

    // One result. With a single tile of groups the products serve all its chunks; with more, each chunk makes them anew.
    GVIT_DEVICE void make_result(int number) {
        constexpr int slots = 2;
        T* const weights = memory + slots * 2 * kTileSize<T>;
        const TokenPass pass = op.pass(number);
        const bool weighted = pass.kind[0] || pass.kind[1];
        const auto to = op.result(number, problem);
        const int chunks = ceil_div(op.channels, kTileColumns<T>);
        const int per_round = op.groups <= kPairTile ? chunks : 1;
        PairSum<T> sum;
        for (int first = 0; first < chunks; first += per_round) {
            for (int group = 0; group < op.groups; group += kPairTile) {
                if (weighted && !ready) make_products(group);
                ready = op.groups <= kPairTile;
                GVIT_SYNC();
                auto rows = make_pipeline<slots>(per_round, [&, chunk = first](int slot) mutable {
                    for (int kind = 0; kind < 2; ++kind) {
                        if (!pass.kind[kind]) continue;
                        load_tile<kPairThreads>(memory + (2 * slot + kind) * kTileSize<T>, sources.groups[kind], group,
                                                chunk * kTileColumns<T>, GroupOrder{});
                    }
                    ++chunk;
                });
                for (int kind = 0; kind < 2; ++kind) {
                    if (!pass.kind[kind]) continue;
                    put_weights(pair_weights<Op>(tile, kind, products, op.tokens - token, op.groups - group),
                                weights + kind * kWeightSize<T>);
                }
                for (int chunk = first; chunk < first + per_round; ++chunk) {
                    if (group == 0) sum.clear();
                    const int slot = rows.next();
                    for (int kind = 0; kind < 2; ++kind) {
                        if (!pass.kind[kind]) continue;
                        add_weighted<true>(sum, weights + kind * kWeightSize<T>, memory + (2 * slot + kind) * kTileSize<T>);
                    }
                    if (group + kPairTile < op.groups) continue;
                    const int column = chunk * kTileColumns<T> + kTileColumns<T> / 2 * pair_half();
                    const int row = token + 16 * pair_stripe();
                    if (pass.gathers) op.gather(sum, problem, row, column);
                    store_rows(sum, to, row, column);
                }
            }
        }
    }
};

template <class T, template <class> class Operator, class Params>
GVIT_GLOBAL(kPairThreads)
sum_over_groups_kernel(Params params) {
    using Op = Operator<T>;
    GVIT_DYNAMIC_SHARED(shared);
    const Op op(params);
    const int tiles = ceil_div(op.tokens, kPairTile);
    for (index_t item = blockIdx.x; item < op.problems * tiles; item += gridDim.x) {
        TokenSide<T, Op> side(op, reinterpret_cast<T*>(shared), item / tiles, static_cast<int>(item % tiles) * kPairTile);
        if constexpr (Op::kTokenTerm) side.make_terms();
        for (int number = 0; number < op.passes; ++number) side.make_result(number);
        GVIT_SYNC();
    }
}

// ---- out[s] = sum over l ------------------------------------------------------------------------------------
//
// Op: token_kind, the kind of weights; token_rows(problem), the rows that they multiply; group_result(problem);
//     finish_group(problem, group, sum of the weights, writes): what the group's row is multiplied by.

// Threads' sums over their tokens of each of their eight groups, to the block's sums, and these to factors.
template <class Finish>
GVIT_DEVICE void finish_groups(const float (&share)[8], float (&factor)[2], const Finish& finish) {
    GVIT_SHARED(float, stripes, 4 * kPairTile);
    GVIT_SHARED(float, factors, kPairTile);
    GVIT_UNROLL
    for (int k = 0; k < 8; ++k) {
        float sum = share[k];
        GVIT_UNROLL
        for (int mask = 4; mask < kWarpSize; mask *= 2) sum += shuffle_xor(sum, mask);
        if (lane_index() < 4) stripes[kPairTile * pair_stripe() + pair_group(k / 2, k % 2)] = sum;
    }
    GVIT_SYNC();
    if (thread_index() < kPairTile) {
        const float* const sum = stripes + thread_index();
        factors[thread_index()] = finish(thread_index(), (sum[0] + sum[kPairTile]) + (sum[2 * kPairTile] + sum[3 * kPairTile]));
    }
    GVIT_SYNC();
    const GroupOrder order{16 * pair_stripe()};
    GVIT_UNROLL
    for (int h = 0; h < 2; ++h) factor[h] = factors[order(fragment_row(2 * h))];
}

// A result of more than kChunks chunks is several work items.
template <class T, template <class> class Operator, int kChunks, class Params>
GVIT_GLOBAL(kPairThreads)
sum_over_tokens_kernel(Params params) {
    using Op = Operator<T>;
    constexpr int kSlots = 2 * Op::kProducts;
    GVIT_DYNAMIC_SHARED(shared);
    T* const memory = reinterpret_cast<T*>(shared);
    T* const weights = memory + kSlots * kTileSize<T>;
    const Op op(params);
    const int group_tiles = ceil_div(op.groups, kPairTile), slices = ceil_div(op.channels, kChunks * kTileColumns<T>);

    for (index_t item = blockIdx.x; item < op.problems * group_tiles * slices; item += gridDim.x) {
        const index_t problem = item / (group_tiles * slices);
        const int group = static_cast<int>(item / slices % group_tiles) * kPairTile;
        const int column = static_cast<int>(item % slices) * kChunks * kTileColumns<T>;
        const int chunks = smaller(kChunks, ceil_div(op.channels - column, kTileColumns<T>));
        const auto sources = op.sources(problem);
        const auto rows = op.token_rows(problem);
        PairSum<T> sum[kChunks];
        float share[8] = {};
        GVIT_UNROLL
        for (int c = 0; c < kChunks; ++c) sum[c].clear();

        for (int token = 0; token < op.tokens; token += kPairTile) {
            GVIT_SYNC();
            PairValues products[Op::kProducts];
            const typename Op::Tile tile(op, problem, token, group);
            multiply_pairs(products, sources, token, group, memory);
            GVIT_SYNC();
            auto slots = make_pipeline<kSlots>(chunks, [&, chunk = 0](int slot) mutable {
                load_tile<kPairThreads>(memory + slot * kTileSize<T>, rows, token, column + chunk++ * kTileColumns<T>);
            });
            const auto values = pair_weights<Op>(tile, op.token_kind, products, op.tokens - token, op.groups - group);
            put_weights(values, weights);
            GVIT_UNROLL
            for (int k = 0; k < 8; ++k) share[k] += values.value[k / 2][k % 2] + values.value[k / 2][2 + k % 2];
            GVIT_UNROLL
            for (int c = 0; c < kChunks; ++c) {
                if (c < chunks) add_weighted<false>(sum[c], weights, memory + slots.next() * kTileSize<T>);
            }
        }

        float factor[2];
        finish_groups(share, factor, [&](int mine, float total) {
            return group + mine < op.groups ? op.finish_group(problem, group + mine, total, column == 0) : 0.0f;
        });
        const auto to = op.group_result(problem);
        GVIT_UNROLL
        for (int c = 0; c < kChunks; ++c) {
            sum[c].scale_rows(factor);
            const int first = column + c * kTileColumns<T> + kTileColumns<T> / 2 * pair_half();
            store_rows(sum[c], to, group, first, GroupOrder{16 * pair_stripe()});
        }
    }
}

}  // namespace gvit
