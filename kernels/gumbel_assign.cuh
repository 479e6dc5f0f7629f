// Assignment of image tokens to groups by a Gumbel-softmax over the groups, and the mean of each group.
//
// Forward. assign_kernel makes the logits of 64 tokens against all groups, 64 groups at a time, and keeps for each
// token only the winner and the log of its softmax sum. With hard assignment average_kernel then adds up the winners'
// values, as a product with ones and zeros that the tensor cores do in the shadow of reading the values; with soft
// assignment sum_over_tokens_kernel makes the logits again.
// The gradients are in gumbel_assign_backward.cuh.
#pragma once

#include "philox.cuh"
#include "token_group.cuh"

namespace gvit {

// ---- the formulas ---------------------------------------------------------------------------------------------

GVIT_HD float assign_logit(float product, float bias, float noise, float scale, float inverse_tau) {
    return (scale * (product + bias) + noise) * inverse_tau;
}

// Which call of the noise generator serves groups 4 quad .. 4 quad + 3 of a token.
GVIT_HD uint64_t noise_call(index_t sample, index_t quads, index_t quad, index_t tokens, index_t token) {
    return static_cast<uint64_t>((sample * quads + quad) * tokens + token);
}

// A NaN counts as the largest value.
GVIT_HD bool exceeds(float value, float best) { return value > best || (value != value && best == best); }

// The largest logit of a token so far, the first group that has it, and the sum of exp(logit - value).
struct Winner {
    float value;
    int group;
    float sum;

    // Before the first logit: loses against every group.
    GVIT_HD static Winner none() { return {-HUGE_VALF, 0x7FFFFFFF, 0.0f}; }

    // Logits of consecutive groups; those that do not exist are -inf, and lose each tie by their number.
    template <int kCount>
    GVIT_HD void add(const float (&logit)[kCount], int first_group) {
        Winner part = none();
        GVIT_UNROLL
        for (int k = 0; k < kCount; ++k) {
            if (!exceeds(logit[k], part.value) && part.group <= first_group + k) continue;
            part.value = logit[k];
            part.group = first_group + k;
        }
        GVIT_UNROLL
        for (int k = 0; k < kCount; ++k) part.sum += logit[k] == -HUGE_VALF ? 0.0f : expf(logit[k] - part.value);
        merge(part);
    }

    GVIT_HD void merge(const Winner& other) {
        const bool tie = !exceeds(value, other.value) && !exceeds(other.value, value);
        const bool replaced = tie ? other.group < group : exceeds(other.value, value);
        const float largest = exceeds(other.value, value) ? other.value : value;
        // A part that is empty, or only -inf, adds nothing; inf - inf must not make a NaN of it.
        sum = (sum == 0.0f ? 0.0f : sum * expf(value - largest)) +
              (other.sum == 0.0f ? 0.0f : other.sum * expf(other.value - largest));
        value = largest;
        group = replaced ? other.group : group;
    }

    // NaN where there is no softmax: a NaN or +inf logit, or only -inf.
    GVIT_HD float log_sum() const { return value == -HUGE_VALF ? NAN : value + logf(sum); }
};

// ---- what the kernels share -------------------------------------------------------------------------------------

template <class T>
struct AssignMatrices {
    Rows<const T> query, key, value, grad_output;

    GVIT_DEVICE AssignMatrices(const AssignParams& p, index_t sample)
        : query(rows_of<const T>(p.query, sample, 0, p.groups, p.channels)),
          key(rows_of<const T>(p.key, sample, 0, p.tokens, p.channels)),
          value(p.value.data == nullptr ? key : rows_of<const T>(p.value, sample, 0, p.tokens, p.channels)),
          grad_output(rows_of<const T>(p.grad_output, sample, 0, p.groups, p.channels)) {}
};

// Products to logits, in place. A thread's groups are eight consecutive ones: two calls of the noise a token.
template <class T>
GVIT_DEVICE void to_logits(PairValues& values, const AssignParams& p, index_t sample, int token, int group) {
    const float scale = static_cast<float>(p.scale), inverse_tau = 1.0f / static_cast<float>(p.tau);
    const T* const biases = static_cast<const T*>(p.bias) + sample * p.groups;
    const index_t quads = ceil_div<index_t>(p.groups, 4);
    const int first = group + pair_group(0, 0);
    GVIT_UNROLL
    for (int k = 0; k < 8; k += 4) {
        float bias[4];
        GVIT_UNROLL
        for (int w = 0; w < 4; ++w) {
            bias[w] = p.bias != nullptr && first + k + w < p.groups ? to_float(biases[first + k + w]) : 0.0f;
        }
        GVIT_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int mine = token + pair_token(2 * h);
            const bool noisy = p.noise_key != nullptr && mine < p.tokens && first + k < p.groups;
            const uint64_t call = noise_call(sample, quads, (first + k) / 4, p.tokens, mine);
            const Philox4 noise = noisy ? philox4x32(p.noise_key[0], call, p.noise_key[1]) : Philox4{};
            GVIT_UNROLL
            for (int w = 0; w < 4; ++w) {
                float& value = values.value[(k + w) / 2][2 * h + w % 2];
                value = assign_logit(value, bias[w], noisy ? gumbel(noise.word[w]) : 0.0f, scale, inverse_tau);
            }
        }
    }
}

// Products to the softmax, in place; 0 outside the tensors.
template <class T>
GVIT_DEVICE void to_assignment(PairValues& values, const AssignParams& p, index_t sample, int token, int group) {
    to_logits<T>(values, p, sample, token, group);
    float lse[2];
    load_pair_rows(lse, static_cast<const float*>(p.lse) + sample * p.tokens, token, static_cast<int>(p.tokens));
    GVIT_UNROLL
    for (int n = 0; n < 4; ++n) {
        GVIT_UNROLL
        for (int i = 0; i < 4; ++i) {
            const bool inside = token + pair_token(i) < p.tokens && group + pair_group(n, i) < p.groups;
            values.value[n][i] = inside ? expf(values.value[n][i] - lse[i / 2]) : 0.0f;
        }
    }
}

// ---- forward: winner and softmax sum of each token --------------------------------------------------------------

constexpr int kAssignSlots = 3;

GVIT_DEVICE Winner shuffle_winner(const Winner& mine, int mask GVIT_WHERE) {
    return {shuffle_xor(mine.value, mask GVIT_PASS_WHERE), shuffle_xor(mine.group, mask GVIT_PASS_WHERE),
            shuffle_xor(mine.sum, mask GVIT_PASS_WHERE)};
}

template <class T>
GVIT_GLOBAL(kPairThreads, sizeof(T) == 2 ? 3 : 2) assign_kernel(AssignParams p) {
    GVIT_DYNAMIC_SHARED(shared);
    GVIT_SHARED(Winner, others, kPairTile);
    const int tokens = static_cast<int>(p.tokens), groups = static_cast<int>(p.groups);
    const int tiles = ceil_div(tokens, kPairTile);
    for (index_t item = blockIdx.x; item < p.samples * tiles; item += gridDim.x) {
        const index_t sample = item / tiles;
        const int token = static_cast<int>(item % tiles) * kPairTile;
        const AssignMatrices<T> from(p, sample);
        const PairSources<T, 1> sources{{from.key}, {from.query}, false};
        Winner winner[2] = {Winner::none(), Winner::none()};
        for (int group = 0; group < groups; group += kPairTile) {
            GVIT_SYNC();
            PairValues values[1];
            multiply_pairs<kAssignSlots>(values, sources, token, group, reinterpret_cast<T*>(shared));
            to_logits<T>(values[0], p, sample, token, group);
            const int first = group + pair_group(0, 0);
            GVIT_UNROLL
            for (int h = 0; h < 2; ++h) {
                float logits[8];
                GVIT_UNROLL
                for (int k = 0; k < 8; ++k) {
                    logits[k] = first + k < groups ? values[0].value[k / 2][2 * h + k % 2] : -HUGE_VALF;
                }
                winner[h].add(logits, first);
            }
        }
        GVIT_UNROLL
        for (int h = 0; h < 2; ++h) {
            winner[h].merge(shuffle_winner(winner[h], 1));
            winner[h].merge(shuffle_winner(winner[h], 2));
            if (pair_half() == 1 && lane_index() % 4 == 0) others[pair_token(2 * h)] = winner[h];
        }
        GVIT_SYNC();
        GVIT_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int mine = token + pair_token(2 * h);
            if (pair_half() == 1 || lane_index() % 4 != 0 || mine >= tokens) continue;
            winner[h].merge(others[pair_token(2 * h)]);
            p.index[sample * tokens + mine] = winner[h].group;
            static_cast<float*>(p.lse)[sample * tokens + mine] = winner[h].log_sum();
        }
    }
}

// ---- forward, hard: mean of the values that each group won ------------------------------------------------------

constexpr int kAverageChunks = 2;
constexpr int kAverageSlots = 4;
template <class T>
constexpr int kAverageMemory = kAverageSlots * kTileSize<T> + 2 * kPairTile * kWeightStride<T>;

// Fills a tile of weights [64 tokens, 64 groups] with each token's 1 and 0s, and counts. A token without a softmax
// makes everything NaN, as the straight-through value does.
template <class T>
GVIT_DEVICE void put_winners(const AssignParams& p, index_t sample, int token, int group, T* weights, int* counts,
                             int* bad) {
    constexpr int columns = kPairTile / (kPairThreads / kPairTile), pack = kPackSize<T>;
    const int row = thread_index() / 4, first = thread_index() % 4 * columns;
    const bool inside = token + row < p.tokens;
    const index_t place = sample * p.tokens + token + row;
    const int winner = inside ? static_cast<int>(p.index[place]) - group : -1;
    const float lse = inside ? static_cast<const float*>(p.lse)[place] : 0.0f;
    const float one = lse == lse ? 1.0f : NAN, zero = lse == lse ? 0.0f : NAN;
    GVIT_UNROLL
    for (int column = first; column < first + columns; column += pack) {
        Pack<T, pack> values;
        GVIT_UNROLL
        for (int k = 0; k < pack; ++k) values.element[k] = from_float<T>(column + k == winner ? one : zero);
        *reinterpret_cast<Pack<T, pack>*>(weights + row * kWeightStride<T> + column) = values;
    }
    if (first != 0) return;
    if (winner >= 0 && winner < kPairTile) atomic_add(counts + winner, 1);
    if (lse != lse) atomic_add(bad, 1);
}

template <class T>
GVIT_GLOBAL(kPairThreads, sizeof(T) == 2 ? 3 : 2) average_kernel(AssignParams p) {
    GVIT_DYNAMIC_SHARED(shared);
    GVIT_SHARED(int, counts, kPairTile + 1);
    constexpr int slice_columns = kAverageChunks * kTileColumns<T>;
    T* const memory = reinterpret_cast<T*>(shared);
    T* const weights = memory + kAverageSlots * kTileSize<T>;
    const int tokens = static_cast<int>(p.tokens), groups = static_cast<int>(p.groups);
    const int slices = ceil_div(static_cast<int>(p.channels), slice_columns), tiles = ceil_div(groups, kPairTile);
    for (index_t item = blockIdx.x; item < p.samples * tiles * slices; item += gridDim.x) {
        const index_t sample = item / (tiles * slices);
        const int group = static_cast<int>(item / slices % tiles) * kPairTile;
        const int column = static_cast<int>(item % slices) * slice_columns;
        const int chunks = smaller(kAverageChunks, ceil_div(static_cast<int>(p.channels) - column, kTileColumns<T>));
        const Rows<const T> values = AssignMatrices<T>(p, sample).value;
        GVIT_SYNC();
        if (thread_index() <= kPairTile) counts[thread_index()] = 0;
        auto slots = make_pipeline<kAverageSlots>(
            ceil_div(tokens, kPairTile) * chunks, [&, token = 0, chunk = 0](int slot) mutable {
                load_tile<kPairThreads>(memory + slot * kTileSize<T>, values, token, column + chunk * kTileColumns<T>);
                if (++chunk < chunks) return;
                chunk = 0;
                token += kPairTile;
            });
        GVIT_SYNC();
        PairSum<T> sum[kAverageChunks];
        GVIT_UNROLL
        for (int c = 0; c < kAverageChunks; ++c) sum[c].clear();
        for (int token = 0; token < tokens; token += kPairTile) {
            // Two tiles of weights in turn: the barrier of next() then frees the one before.
            T* const winners = weights + token / kPairTile % 2 * kPairTile * kWeightStride<T>;
            put_winners(p, sample, token, group, winners, counts, counts + kPairTile);
            GVIT_UNROLL
            for (int c = 0; c < kAverageChunks; ++c) {
                if (c < chunks) add_weighted<false>(sum[c], winners, memory + slots.next() * kTileSize<T>);
            }
        }
        GVIT_SYNC();
        const bool bad = counts[kPairTile] > 0;
        if (thread_index() < kPairTile && group + thread_index() < groups && column == 0) {
            const float count = static_cast<float>(counts[thread_index()]);
            static_cast<float*>(p.count)[sample * groups + group + thread_index()] = bad ? NAN : count;
        }
        float factor[2];
        GVIT_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int count = counts[16 * pair_stripe() + fragment_row(2 * h)];
            factor[h] = 1.0f / (static_cast<float>(count) + static_cast<float>(p.eps));
        }
        const Rows<T> to = rows_of<T>(p.output, sample, 0, groups, p.channels);
        GVIT_UNROLL
        for (int c = 0; c < kAverageChunks; ++c) {
            sum[c].scale_rows(factor);
            const int first = column + c * kTileColumns<T> + kTileColumns<T> / 2 * pair_half();
            store_rows(sum[c], to, group + 16 * pair_stripe(), first);
        }
    }
}

// ---- forward, soft ----------------------------------------------------------------------------------------------

// For sum_over_tokens_kernel: weights are the softmax, rows the values.
template <class T>
struct AssignSoft {
    static constexpr int kProducts = 1;
    static constexpr bool kTokenTerm = false;

    const AssignParams& p;
    index_t problems;
    int tokens, groups, channels;

    GVIT_DEVICE explicit AssignSoft(const AssignParams& params)
        : p(params),
          problems(params.samples),
          tokens(static_cast<int>(params.tokens)),
          groups(static_cast<int>(params.groups)),
          channels(static_cast<int>(params.channels)) {}

    GVIT_DEVICE PairSources<T, 1> sources(index_t sample) const {
        const AssignMatrices<T> from(p, sample);
        return {{from.key}, {from.query}, false};
    }

    GVIT_DEVICE void to_softmax(PairValues (&values)[1], index_t sample, int token, int group) const {
        to_assignment<T>(values[0], p, sample, token, group);
    }
    GVIT_DEVICE void to_weights(PairValues (&)[1], const float (&)[2], index_t, int) const {}

    GVIT_DEVICE Rows<const T> token_rows(index_t sample) const { return AssignMatrices<T>(p, sample).value; }
    GVIT_DEVICE Rows<T> group_result(index_t sample) const {
        return rows_of<T>(p.output, sample, 0, p.groups, p.channels);
    }
    GVIT_DEVICE float finish_group(index_t sample, int group, float count, bool writes) const {
        if (writes) static_cast<float*>(p.count)[sample * p.groups + group] = count;
        return 1.0f / (count + static_cast<float>(p.eps));
    }
};

}  // namespace gvit
