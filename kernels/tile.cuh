// Tiles of a matrix in shared memory, the pipeline that streams them there, and the way back.
//
// A tile row is 128 bytes, whatever the element, plus 16 so that the eight rows which one matrix load reads
// fall into different banks.
#pragma once

#include "mma.cuh"
#include "parameters.cuh"

namespace gvit {

constexpr int kTileRows = 64;
template <class T>
constexpr int kTileColumns = 128 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kTileStride = kTileColumns<T> + kPackSize<T>;
template <class T>
constexpr int kTileSize = kTileRows * kTileStride<T>;

// The stride of a shared tile of weights, 64 a row.
template <class T>
constexpr int kWeightStride = 64 + kPackSize<T>;

// A matrix in global memory with contiguous rows. Only where it lies needs 64 bits: csrc/library_cuda.cpp has seen
// to it that rows, columns and the stride fit 31.
template <class T>
struct Rows {
    T* start;
    int stride;
    int rows, columns;

    GVIT_DEVICE T* row(int i) const { return start + static_cast<index_t>(i) * stride; }
    // Whether every row can be moved 16 bytes at a time.
    GVIT_DEVICE bool packed() const { return can_pack(start, columns) && stride % kPackSize<T> == 0; }
};

template <class T>
GVIT_DEVICE Rows<T> rows_of(const Matrices& from, index_t sample, index_t head, index_t rows, index_t columns) {
    return {static_cast<T*>(from.data) + sample * from.batch + head * from.head, static_cast<int>(from.row),
            static_cast<int>(rows), static_cast<int>(columns)};
}

struct InOrder {
    GVIT_DEVICE int operator()(int row) const { return row; }
};

// Starts to fill a tile with rows first_row.. and columns first_column..; what lies outside becomes zero. It is
// complete for all threads after async_wait and a barrier. Row r of the tile is row first_row + order(r).
template <int kThreads, int kRows = kTileRows, class T, class Order = InOrder>
GVIT_DEVICE void load_tile(T* tile, const Rows<const T>& from, int first_row, int first_column,
                           const Order& order = {}) {
    constexpr int pack = kPackSize<T>, packs = kTileColumns<T> / pack;
    if (from.packed()) {
        GVIT_UNROLL_BY(1)  // the copies do not wait for each other; registers are what is scarce
        for (int i = thread_index(); i < kRows * packs; i += kThreads) {
            const int row = first_row + order(i / packs), column = first_column + i % packs * pack;
            const bool inside = row < from.rows && column < from.columns;
            async_copy(tile + i / packs * kTileStride<T> + i % packs * pack,
                       inside ? from.row(row) + column : from.start, inside);
        }
        return;
    }
    GVIT_UNROLL_BY(1)
    for (int i = thread_index(); i < kRows * kTileColumns<T>; i += kThreads) {
        const int row = first_row + order(i / kTileColumns<T>), column = first_column + i % kTileColumns<T>;
        const bool inside = row < from.rows && column < from.columns;
        tile[i / kTileColumns<T> * kTileStride<T> + i % kTileColumns<T>] =
            inside ? from.row(row)[column] : from_float<T>(0.0f);
    }
}

// Streams the steps of a loop through kSlots slots of shared memory: load(slot), called once a step and in order,
// starts to fill a slot; next() waits for the coming step and gives its slot, which is the reader's until the next
// call. The slots must be free when the pipeline is made (a barrier after their last use).
template <int kSlots, class Load>
class Pipeline {
  public:
    GVIT_DEVICE Pipeline(int steps, const Load& load) : to_start_(steps), load_(load) {
        for (int slot = 0; slot < kSlots - 1; ++slot) start(slot);
    }

    GVIT_DEVICE int next() {
        async_wait<kSlots - 2>();
        GVIT_SYNC();
        const int slot = slot_;
        start((slot + kSlots - 1) % kSlots);
        slot_ = (slot + 1) % kSlots;
        return slot;
    }

  private:
    GVIT_DEVICE void start(int slot) {
        if (to_start_-- > 0) load_(slot);
        async_commit();  // an empty group too, so that the count of the wait stays right
    }

    int to_start_, slot_ = 0;
    Load load_;
};

template <int kSlots, class Load>
GVIT_DEVICE Pipeline<kSlots, Load> make_pipeline(int steps, const Load& load) {
    return {steps, load};
}

// Among four neighbouring lanes: lane t's word j becomes lane j's word t.
GVIT_DEVICE void transpose_quad(uint32_t (&word)[4] GVIT_WHERE) {
    const bool odd = lane_index() % 2 == 1, upper = lane_index() % 4 >= 2;
    GVIT_UNROLL
    for (int i = 0; i < 4; i += 2) {
        const uint32_t other = shuffle_xor(odd ? word[i] : word[i + 1], 1 GVIT_PASS_WHERE);
        (odd ? word[i] : word[i + 1]) = other;
    }
    GVIT_UNROLL
    for (int i = 0; i < 2; ++i) {
        const uint32_t other = shuffle_xor(upper ? word[i] : word[i + 2], 2 GVIT_PASS_WHERE);
        (upper ? word[i] : word[i + 2]) = other;
    }
}

template <class T, int count>
GVIT_DEVICE void store_pack(const Pack<T, count>& pack, const Rows<T>& to, int row, int column, bool packed) {
    if (row >= to.rows) return;
    T* const target = to.row(row) + column;
    if (packed) {
        if (column < to.columns) *reinterpret_cast<Pack<T, count>*>(target) = pack;
        return;
    }
    GVIT_UNROLL
    for (int k = 0; k < count; ++k) {
        if (column + k < to.columns) target[k] = pack.element[k];
    }
}

// Writes a warp's result, rounded to T, to rows first_row + order(0..15) and columns first_column.. of `to`.
template <int kBlocks, class T, class Order = InOrder>
GVIT_DEVICE void store_rows(const Accumulator<kBlocks>& sum, const Rows<T>& to, int first_row, int first_column,
                            const Order& order = {}) {
    const bool packed = to.packed();
    GVIT_UNROLL
    for (int i = 0; i < 4; i += 2) {
        const int row = first_row + order(fragment_row(i));
        if constexpr (sizeof(T) == 4) {
            // The pairs of four lanes are a sector of 32 bytes.
            GVIT_UNROLL
            for (int n = 0; n < kBlocks; ++n) {
                const Pack<T, 2> pair{{sum.value[n][i], sum.value[n][i + 1]}};
                store_pack(pair, to, row, first_column + fragment_column(n, 0), packed);
            }
        } else {
            // Four lanes hold four blocks of 8 columns in pairs; after the exchange each holds one block.
            static_assert(kBlocks % 4 == 0, "blocks are exchanged in fours");
            GVIT_UNROLL
            for (int n = 0; n < kBlocks; n += 4) {
                uint32_t word[4];
                GVIT_UNROLL
                for (int j = 0; j < 4; ++j) {
                    const auto& value = sum.value[n + j];
                    word[j] = from_float<T>(value[i]).bits | from_float<T>(value[i + 1]).bits << 16;
                }
                transpose_quad(word);
                Pack<T, 8> block;
                memcpy(&block, word, sizeof block);
                store_pack(block, to, row, first_column + 8 * (n + lane_index() % 4), packed);
            }
        }
    }
}

}  // namespace gvit
