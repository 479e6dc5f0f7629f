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
//   problems, tokens, groups, channels                 a problem is a sample, or a head of one
//   sources(problem)                                   the matrices of the products
//   to_softmax(values, problem, token, group)          products in, softmax and its like out, 0 outside the tensors
//   to_weights(values, term, problem, group)           these in, weights out: values[0] and values[1] by their kind
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

// The entries of this thread's two tokens; 0 where there is none.
GVIT_DEVICE void load_pair_rows(float (&value)[2], const float* from, int token, int tokens) {
    GVIT_UNROLL
    for (int h = 0; h < 2; ++h) {
        const int mine = token + pair_token(2 * h);
        value[h] = mine < tokens ? from[mine] : 0.0f;
    }
}

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
        multiply<Sum::along_rows, Sum::down_rows>(sum, weights + 16 * pair_stripe() * kWeightStride<T>,
                                                  kWeightStride<T>, columns, kTileStride<T>, kPairTile);
    } else {
        multiply<Sum::down_rows, Sum::down_rows>(sum, weights + 16 * pair_stripe(), kWeightStride<T>, columns,
                                                 kTileStride<T>, kPairTile);
    }
}

// out[i] = row i of a . row i of b, rows counted through the batch; one warp a row.
constexpr int kRowDotThreads = 128;

template <class T>
GVIT_GLOBAL(kRowDotThreads) row_dot_kernel(Matrices a, Matrices b, index_t matrices, int heads, int rows, int columns,
                                           float* out) {
    constexpr index_t warps = kRowDotThreads / kWarpSize;
    for (index_t i = blockIdx.x * warps + warp_index(); i < matrices * rows; i += gridDim.x * warps) {
        const index_t matrix = i / rows;
        const int row = static_cast<int>(i % rows);
        const T* const left = rows_of<const T>(a, matrix / heads, matrix % heads, rows, columns).row(row);
        const T* const right = rows_of<const T>(b, matrix / heads, matrix % heads, rows, columns).row(row);
        float sum = 0.0f;
        for (int k = lane_index(); k < columns; k += kWarpSize) sum += to_float(left[k]) * to_float(right[k]);
        sum = warp_sum(sum);
        if (lane_index() == 0) out[i] = sum;
    }
}

// ---- out[l] = sum over s ------------------------------------------------------------------------------------
//
// Op: kTokenTerm, whether weights need a sum over all groups of their token, of the two values that to_softmax makes
//     multiplied; it is also given to put_token_term(problem, token, term);
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

// A block's work on one tile of tokens. With one tile of groups its weights are made once and serve all chunks of all
// results; with more, each chunk makes them anew.
template <class T, class Op, bool kOneTile>
struct TokenSide {
    const Op& op;
    T* memory;
    index_t problem;
    int token;
    PairSources<T, 2> sources;
    PairValues values[2];
    float term[2] = {0.0f, 0.0f};

    GVIT_DEVICE TokenSide(const Op& op_, T* memory_, index_t problem_, int token_)
        : op(op_), memory(memory_), problem(problem_), token(token_), sources(op_.sources(problem_)) {}

    GVIT_DEVICE void make_softmax(int group) {
        GVIT_SYNC();
        multiply_pairs(values, sources, token, group, memory);
        op.to_softmax(values, problem, token, group);
    }

    GVIT_DEVICE void make_weights(int group) {
        make_softmax(group);
        op.to_weights(values, term, problem, group);
    }

    GVIT_DEVICE void make_terms() {
        for (int group = 0; group < (kOneTile ? 1 : op.groups); group += kPairTile) {
            make_softmax(group);
            GVIT_UNROLL
            for (int n = 0; n < 4; ++n) {
                GVIT_UNROLL
                for (int i = 0; i < 4; ++i) term[i / 2] += values[0].value[n][i] * values[1].value[n][i];
            }
        }
        sum_token_terms(term);
        GVIT_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int mine = token + pair_token(2 * h);
            const bool writes = pair_half() == 0 && lane_index() % 4 == 0 && mine < op.tokens;
            if (writes) op.put_token_term(problem, mine, term[h]);
        }
        if (kOneTile) op.to_weights(values, term, problem, 0);
    }

    // Adds this tile of groups to `count` chunks of a result, one after the other; done(sum, chunk) after each.
    template <class Done>
    GVIT_DEVICE void add_tile(const TokenPass& pass, int group, int first, int count, PairSum<T>& sum,
                              const Done& done) {
        constexpr int slots = 2;
        T* const weights = memory + slots * 2 * kTileSize<T>;
        GVIT_SYNC();
        auto rows = make_pipeline<slots>(count, [&, chunk = first](int slot) mutable {
            GVIT_UNROLL
            for (int kind = 0; kind < 2; ++kind) {
                if (!pass.kind[kind]) continue;
                load_tile<kPairThreads>(memory + (2 * slot + kind) * kTileSize<T>, sources.groups[kind], group,
                                        chunk * kTileColumns<T>, GroupOrder{});
            }
            ++chunk;
        });
        GVIT_UNROLL
        for (int kind = 0; kind < 2; ++kind) {
            if (pass.kind[kind]) put_weights(values[kind], weights + kind * kWeightSize<T>);
        }
        for (int chunk = first; chunk < first + count; ++chunk) {
            if (group == 0) sum.clear();
            const int slot = rows.next();
            GVIT_UNROLL
            for (int kind = 0; kind < 2; ++kind) {
                if (!pass.kind[kind]) continue;
                add_weighted<true>(sum, weights + kind * kWeightSize<T>, memory + (2 * slot + kind) * kTileSize<T>);
            }
            done(chunk);
        }
    }

    GVIT_DEVICE void make_result(int number) {
        const TokenPass pass = op.pass(number);
        const auto to = op.result(number, problem);
        const int chunks = ceil_div(op.channels, kTileColumns<T>);
        PairSum<T> sum;
        const auto store = [&](int chunk) {
            const int column = chunk * kTileColumns<T> + kTileColumns<T> / 2 * pair_half();
            const int row = token + 16 * pair_stripe();
            if (pass.gathers) op.gather(sum, problem, row, column);
            store_rows(sum, to, row, column);
        };
        if constexpr (kOneTile) {
            add_tile(pass, 0, 0, chunks, sum, store);
        } else {
            for (int chunk = 0; chunk < chunks; ++chunk) {
                for (int group = 0; group < op.groups; group += kPairTile) {
                    if (pass.kind[0] || pass.kind[1]) make_weights(group);
                    add_tile(pass, group, chunk, 1, sum, [](int) {});
                }
                store(chunk);
            }
        }
    }
};

template <class T, template <class> class Operator, bool kOneTile, class Params>
GVIT_GLOBAL(kPairThreads, kOneTile && sizeof(T) == 2 ? 2 : 1) sum_over_groups_kernel(Params params) {
    using Op = Operator<T>;
    GVIT_DYNAMIC_SHARED(shared);
    const Op op(params);
    const int tiles = ceil_div(op.tokens, kPairTile);
    for (index_t item = blockIdx.x; item < op.problems * tiles; item += gridDim.x) {
        TokenSide<T, Op, kOneTile> side(op, reinterpret_cast<T*>(shared), item / tiles,
                                        static_cast<int>(item % tiles) * kPairTile);
        if constexpr (Op::kTokenTerm) {
            side.make_terms();
        } else if (kOneTile) {
            side.make_weights(0);
        }
        for (int number = 0; number < op.passes; ++number) side.make_result(number);
    }
}

// ---- out[s] = sum over l ------------------------------------------------------------------------------------
//
// Op: weights of kind 0 go with token_rows(problem); kTokenTerm as above, read back by load_token_terms(...);
//     group_result(problem); finish_group(problem, group, sum of the weights, writes): what the group's row is
//     multiplied by.

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
        factors[thread_index()] =
            finish(thread_index(), (sum[0] + sum[kPairTile]) + (sum[2 * kPairTile] + sum[3 * kPairTile]));
    }
    GVIT_SYNC();
    const GroupOrder order{16 * pair_stripe()};
    GVIT_UNROLL
    for (int h = 0; h < 2; ++h) factor[h] = factors[order(fragment_row(2 * h))];
}

// A result of more than kChunks chunks is several work items.
template <class T, template <class> class Operator, int kChunks, class Params>
GVIT_GLOBAL(kPairThreads, kChunks == 1 ? 2 : 1) sum_over_tokens_kernel(Params params) {
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
            PairValues values[Op::kProducts];
            multiply_pairs(values, sources, token, group, memory);
            op.to_softmax(values, problem, token, group);
            float term[2] = {0.0f, 0.0f};
            if constexpr (Op::kTokenTerm) op.load_token_terms(term, problem, token);
            op.to_weights(values, term, problem, group);
            GVIT_SYNC();
            auto slots = make_pipeline<kSlots>(chunks, [&, chunk = 0](int slot) mutable {
                load_tile<kPairThreads>(memory + slot * kTileSize<T>, rows, token, column + chunk++ * kTileColumns<T>);
            });
            put_weights(values[0], weights);
            GVIT_UNROLL
            for (int k = 0; k < 8; ++k) share[k] += values[0].value[k / 2][k % 2] + values[0].value[k / 2][2 + k % 2];
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
