// Attention of group tokens (queries) over image tokens (keys, values).
//
// Forward. One block owns up to 64 groups of one head and streams the tokens past them in tiles of 64, keeping for each
// group the running maximum and sum of its softmax (online softmax: Milakov and Gimelshein, 2018; as in
// FlashAttention). Nothing of size groups x tokens leaves the multiprocessor.
//
//   scores  = query . key^T           16 groups x 64 tokens a warp, summed over the head dim in chunks
//   weights = exp(scale * scores - maximum), rounded to the storage type, in the warp's own shared memory
//   output += weights . value         64 columns of the head dim; a wider head is several work items
//
// Backward. With p the softmax and D[s] = grad_output[s] . output[s],
//     dz[l, s] = p (grad_output[s] . value[l] - D[s])
// and the gradients are sums of rows weighted by p (value) and scale dz (query, key): token_group.cuh.
#pragma once

#include "token_group.cuh"

namespace gvit {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Output columns of one work item, and the tiles that hold them.
constexpr int kAttendColumns = 64;
template <int kWarps>
constexpr int kAttendThreads = kWarps * kWarpSize;
template <class T>
constexpr int kAttendTiles = kAttendColumns / kTileColumns<T>;
// Slots of the token pipeline. A head dim of up to kAttendResident tiles keeps its queries in shared memory;
// a larger one streams them with the keys, through fewer and larger slots.
constexpr int kAttendResident = 4;
template <bool kResident>
constexpr int kAttendSlots = kResident ? 4 : 2;

template <class T, int kWarps, bool kResident>
size_t attend_shared_bytes(index_t depth) {
    constexpr index_t rows = 16 * kWarps, row = kTileStride<T>, weight_row = kWeightStride<T>;
    const index_t queries = kResident ? ceil_div<index_t>(depth, kTileColumns<T>) * rows * row : 0;
    const index_t slots = kAttendSlots<kResident> * (kResident ? 1 : 2) * kTileRows * row;
    return sizeof(T) * (queries + slots + rows * weight_row);
}

// The softmax so far of the two groups (rows lane/4 and lane/4 + 8) that a thread shares with three others.
// In units of log 2, because exp2 is what the hardware has.
struct RunningSoftmax {
    float maximum[2] = {-HUGE_VALF, -HUGE_VALF};
    float sum[2] = {0.0f, 0.0f};  // of this thread's columns only

    // Turns scores into weights; returns by how much what was summed before has to shrink.
    template <int kBlocks>
    GVIT_DEVICE void update(Accumulator<kBlocks>& scores, float scale, int columns, float (&shrink)[2]) {
        GVIT_UNROLL
        for (int half = 0; half < 2; ++half) {
            float largest = maximum[half];
            GVIT_UNROLL
            for (int n = 0; n < kBlocks; ++n) {
                GVIT_UNROLL
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    float& score = scores.value[n][i];
                    score = fragment_column(n, i) < columns ? score * scale : -HUGE_VALF;
                    largest = fmaxf(largest, score);
                }
            }
            largest = fmaxf(largest, shuffle_xor(largest, 1));
            largest = fmaxf(largest, shuffle_xor(largest, 2));
            // As long as only -inf was seen there is nothing to shrink, and inf - inf must not make a NaN of it.
            shrink[half] = maximum[half] == -HUGE_VALF ? 1.0f : exp2f(maximum[half] - largest);
            maximum[half] = largest;
            sum[half] *= shrink[half];
            GVIT_UNROLL
            for (int n = 0; n < kBlocks; ++n) {
                GVIT_UNROLL
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    float& score = scores.value[n][i];
                    score = score == -HUGE_VALF ? 0.0f : exp2f(score - largest);
                    sum[half] += score;
                }
            }
        }
    }

    GVIT_DEVICE float total(int half) const {
        const float pair = sum[half] + shuffle_xor(sum[half], 1);
        return pair + shuffle_xor(pair, 2);
    }
};

// One work item of `attend`: these groups of this head, these columns of the output.
struct AttendItem {
    index_t head;  // counted through the batch
    int first_group, first_column;

    GVIT_DEVICE AttendItem(const AttentionParams& p, index_t item, int rows) {
        const index_t slices = ceil_div<index_t>(p.depth, kAttendColumns), tiles = ceil_div<index_t>(p.groups, rows);
        first_column = static_cast<int>(item % slices) * kAttendColumns;
        first_group = static_cast<int>(item / slices % tiles) * rows;
        head = item / (slices * tiles);
    }

    template <class T>
    GVIT_DEVICE Rows<T> rows(const AttentionParams& p, const Matrices& from, index_t count) const {
        return rows_of<T>(from, head / p.heads, head % p.heads, count, p.depth);
    }
};

GVIT_HD index_t attend_items(const AttentionParams& p, int rows) {
    return p.samples * p.heads * ceil_div<index_t>(p.groups, rows) * ceil_div<index_t>(p.depth, kAttendColumns);
}

template <class T, int kTiles, int kBlocks>
GVIT_DEVICE void finish_attention(const AttentionParams& p, const AttendItem& item, const RunningSoftmax& softmax,
                                  Accumulator<kBlocks> (&output)[kTiles]) {
    const int first_row = item.first_group + warp_index() * 16;
    float* const lse = static_cast<float*>(p.lse) + item.head * p.groups;
    float inverse[2];
    GVIT_UNROLL
    for (int half = 0; half < 2; ++half) {
        const float total = softmax.total(half);
        inverse[half] = p.tokens == 0 ? 0.0f : 1.0f / total;
        const int group = first_row + fragment_row(2 * half);
        const bool writes = lane_index() % 4 == 0 && item.first_column == 0 && group < p.groups;
        if (writes) lse[group] = (softmax.maximum[half] + log2f(total)) * kLn2;
    }
    const Rows<T> to = item.rows<T>(p, p.output, p.groups);
    GVIT_UNROLL
    for (int t = 0; t < kTiles; ++t) {
        output[t].scale_rows(inverse);
        store_rows(output[t], to, first_row, item.first_column + t * kTileColumns<T>);
    }
}

template <class T, int kWarps, bool kResident>
GVIT_GLOBAL(kAttendThreads<kWarps>, kWarps == 1 ? 8 : 3) attend_kernel(AttentionParams p) {
    constexpr int kRows = 16 * kWarps, kThreads = kAttendThreads<kWarps>, kSlots = kAttendSlots<kResident>;
    constexpr int kSlotSize = (kResident ? 1 : 2) * kTileSize<T>, kQuerySize = kRows * kTileStride<T>;
    GVIT_DYNAMIC_SHARED(shared);
    T* const slots = reinterpret_cast<T*>(shared);
    T* const weights = slots + kSlots * kSlotSize + warp_index() * 16 * kWeightStride<T>;
    T* const queries = slots + kSlots * kSlotSize + kRows * kWeightStride<T>;
    const int tokens = static_cast<int>(p.tokens);
    const int chunks = ceil_div(static_cast<int>(p.depth), kTileColumns<T>);
    const float scale = static_cast<float>(p.scale) * kLog2E;

    for (index_t i = blockIdx.x; i < attend_items(p, kRows); i += gridDim.x) {
        const AttendItem item(p, i, kRows);
        const auto query = item.rows<const T>(p, p.query, p.groups);
        const auto key = item.rows<const T>(p, p.key, p.tokens);
        const auto value = item.rows<const T>(p, p.value, p.tokens);
        GVIT_SYNC();
        for (int c = 0; kResident && tokens > 0 && c < chunks; ++c) {
            load_tile<kThreads, kRows>(queries + c * kQuerySize, query, item.first_group, c * kTileColumns<T>);
        }
        // Each tile of tokens is the chunks of its keys, then its values.
        const auto load = [&, token = 0, c = 0](int slot) mutable {
            T* const tile = slots + slot * kSlotSize;
            if (c < chunks) {
                load_tile<kThreads>(tile, key, token, c * kTileColumns<T>);
                if (!kResident) {
                    load_tile<kThreads, kRows>(tile + kTileSize<T>, query, item.first_group, c * kTileColumns<T>);
                }
            } else {
                load_tile<kThreads>(tile, value, token, item.first_column + (c - chunks) * kTileColumns<T>);
            }
            if (++c < chunks + kAttendTiles<T>) return;
            c = 0;
            token += kTileRows;
        };
        auto tiles = make_pipeline<kSlots>(ceil_div(tokens, kTileRows) * (chunks + kAttendTiles<T>), load);

        RunningSoftmax softmax;
        Accumulator<kTileColumns<T> / 8> output[kAttendTiles<T>];
        GVIT_UNROLL
        for (int t = 0; t < kAttendTiles<T>; ++t) output[t].clear();
        for (int token = 0; token < tokens; token += kTileRows) {
            Accumulator<kTileRows / 8> scores;
            scores.clear();
            for (int c = 0; c < chunks; ++c) {
                const T* const keys = slots + tiles.next() * kSlotSize;
                const T* const rows = kResident ? queries + c * kQuerySize : keys + kTileSize<T>;
                multiply<Sum::along_rows, Sum::along_rows>(scores, rows + warp_index() * 16 * kTileStride<T>,
                                                           kTileStride<T>, keys, kTileStride<T>, kTileColumns<T>);
            }
            float shrink[2];
            softmax.update(scores, scale, smaller(tokens - token, kTileRows), shrink);
            put_fragment(scores, weights, kWeightStride<T>);  // seen by the others after the barrier of next()
            GVIT_UNROLL
            for (int t = 0; t < kAttendTiles<T>; ++t) {
                output[t].scale_rows(shrink);
                const T* const values = slots + tiles.next() * kSlotSize;
                multiply<Sum::along_rows, Sum::down_rows>(output[t], weights, kWeightStride<T>, values, kTileStride<T>,
                                                          kTileRows);
            }
        }
        finish_attention<T>(p, item, softmax, output);
    }
}

// ---- backward ---------------------------------------------------------------------------------------------------

// The workspace holds D [samples, heads, groups].
template <class T>
struct AttentionGradient {
    static constexpr int kProducts = 2;
    static constexpr bool kTokenTerm = false;
    static constexpr int passes = 2;

    const AttentionParams& p;
    index_t problems;
    int tokens, groups, channels;

    GVIT_DEVICE explicit AttentionGradient(const AttentionParams& params)
        : p(params),
          problems(params.samples * params.heads),
          tokens(static_cast<int>(params.tokens)),
          groups(static_cast<int>(params.groups)),
          channels(static_cast<int>(params.depth)) {}

    template <class U>
    GVIT_DEVICE Rows<U> rows(const Matrices& from, index_t head, int count) const {
        return rows_of<U>(from, head / p.heads, head % p.heads, count, channels);
    }
    GVIT_DEVICE PairSources<T, 2> sources(index_t head) const {
        return {{token_rows(head), rows<const T>(p.value, head, tokens)},
                {rows<const T>(p.query, head, groups), rows<const T>(p.grad_output, head, groups)},
                false};
    }

    // values[0] becomes p, values[1] dz of the formulas at the top.
    GVIT_DEVICE void to_softmax(PairValues (&values)[2], index_t head, int token, int group) const {
        const float scale = static_cast<float>(p.scale) * kLog2E;
        GVIT_UNROLL
        for (int n = 0; n < 4; ++n) {
            GVIT_UNROLL
            for (int j = 0; j < 2; ++j) {
                const int mine = group + pair_group(n, j);
                const index_t place = head * groups + mine;
                const float lse = mine < groups ? static_cast<const float*>(p.lse)[place] * kLog2E : 0.0f;
                const float mean = mine < groups ? p.workspace[place] : 0.0f;
                GVIT_UNROLL
                for (int i = j; i < 4; i += 2) {
                    const bool inside = mine < groups && token + pair_token(i) < tokens;
                    const float soft = inside ? exp2f(values[0].value[n][i] * scale - lse) : 0.0f;
                    values[0].value[n][i] = soft;
                    values[1].value[n][i] = soft * (values[1].value[n][i] - mean);
                }
            }
        }
    }
    // values[0] becomes the weight of query and key, values[1] that of grad_output.
    GVIT_DEVICE void to_weights(PairValues (&values)[2], const float (&)[2], index_t, int) const {
        GVIT_UNROLL
        for (int n = 0; n < 4; ++n) {
            GVIT_UNROLL
            for (int i = 0; i < 4; ++i) {
                const float soft = values[0].value[n][i];
                values[0].value[n][i] = static_cast<float>(p.scale) * values[1].value[n][i];
                values[1].value[n][i] = soft;
            }
        }
    }

    GVIT_DEVICE TokenPass pass(int number) const { return {{number == 0, number == 1}, false}; }
    GVIT_DEVICE Rows<T> result(int number, index_t head) const {
        return rows<T>(number == 0 ? p.grad_key : p.grad_value, head, tokens);
    }
    template <int kBlocks>
    GVIT_DEVICE void gather(Accumulator<kBlocks>&, index_t, int, int) const {}

    GVIT_DEVICE Rows<const T> token_rows(index_t head) const { return rows<const T>(p.key, head, tokens); }
    GVIT_DEVICE Rows<T> group_result(index_t head) const { return rows<T>(p.grad_query, head, groups); }
    GVIT_DEVICE float finish_group(index_t, int, float, bool) const { return 1.0f; }
};

}  // namespace gvit
