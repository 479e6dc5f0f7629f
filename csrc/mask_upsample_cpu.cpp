// CPU kernels of upsample_masks and decode_masks.
//
// A row of the input is stretched once along its length and then serves every output row between it and its
// neighbour, so the work per output element is one blend of two streams.
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <limits>
#include <mutex>
#include <type_traits>
#include <vector>

#include "csrc/cpu_dispatch.h"
#include "csrc/launchers.h"
#include "kernels/mask_upsample.cuh"

namespace gvit {
namespace {

// Taps of a whole row, as separate arrays so that the loops over them vectorise.
template <class A>
struct RowTaps {
    std::vector<int32_t> low, high;
    std::vector<A> low_weight, high_weight;

    explicit RowTaps(const Axis<A>& axis) : low(axis.out), high(axis.out), low_weight(axis.out), high_weight(axis.out) {
        for (index_t x = 0; x < axis.out; ++x) {
            const Tap<A> tap = tap_of(axis, x);
            low[x] = static_cast<int32_t>(tap.low);
            high[x] = static_cast<int32_t>(tap.high);
            low_weight[x] = tap.low_weight;
            high_weight[x] = tap.high_weight;
        }
    }
};

// `widened` has room for the row in the type of the arithmetic: a row of 16-bit numbers is converted first, so
// that both loops vectorise.
template <class T, class A = accumulate_t<T>>
GVIT_INLINE void stretch_row(const T* row, index_t in_width, const RowTaps<A>& taps, index_t width,
                             A* __restrict__ widened, A* __restrict__ out) {
    const int32_t* low = taps.low.data();
    const int32_t* high = taps.high.data();
    const A* low_weight = taps.low_weight.data();
    const A* high_weight = taps.high_weight.data();
    const A* source = widened;
    if constexpr (std::is_same_v<T, A>) {
        source = row;
    } else {
        for (index_t j = 0; j < in_width; ++j) widened[j] = widen(row[j]);
    }
    for (index_t x = 0; x < width; ++x) {
        out[x] = blend(source[low[x]], source[high[x]], low_weight[x], high_weight[x]);
    }
}

// Two stretched rows of `count` planes that lie `plane_stride` elements apart; consecutive output rows ask
// for the same pair or one further, so most requests are answered from here.
template <class T, class A = accumulate_t<T>>
class StretchedRows {
  public:
    StretchedRows(index_t count, index_t plane_stride, index_t in_width, index_t width, index_t padded_width)
        : count_(count),
          plane_stride_(plane_stride),
          in_width_(in_width),
          width_(width),
          padded_width_(padded_width),
          rows_(2 * count * padded_width),
          widened_(in_width) {}

    GVIT_INLINE const A* get(const T* first_plane, index_t row, const RowTaps<A>& taps) {
        const index_t slot = row & 1;  // the two rows of a tap are neighbours, so they never share a slot
        A* rows = rows_.data() + slot * count_ * padded_width_;
        if (plane_[slot] == first_plane && row_[slot] == row) return rows;
        for (index_t plane = 0; plane < count_; ++plane) {
            const T* source = first_plane + plane * plane_stride_ + row * in_width_;
            stretch_row<T>(source, in_width_, taps, width_, widened_.data(), rows + plane * padded_width_);
        }
        plane_[slot] = first_plane;
        row_[slot] = row;
        return rows;
    }

  private:
    index_t count_, plane_stride_, in_width_, width_, padded_width_;
    std::vector<A> rows_, widened_;
    const T* plane_[2] = {nullptr, nullptr};
    index_t row_[2] = {-1, -1};
};

// Output rows [first, last) of all planes, counted through.
template <class T>
struct UpsampleRows {
    using A = accumulate_t<T>;

    static GVIT_INLINE void run(const UpsampleParams& p, const RowTaps<A>& taps, index_t first, index_t last) {
        const Axis<A> vertical = make_axis<A>(p.in_height, p.out_height);
        const index_t plane_size = p.in_height * p.in_width;
        StretchedRows<T> rows(1, plane_size, p.in_width, p.out_width, p.out_width);
        for (index_t row = first; row < last; ++row) {
            const T* plane = static_cast<const T*>(p.input) + row / p.out_height * plane_size;
            const Tap<A> tap = tap_of(vertical, row % p.out_height);
            const A* low = rows.get(plane, tap.low, taps);
            const A* high = rows.get(plane, tap.high, taps);
            T* __restrict__ out = static_cast<T*>(p.output) + row * p.out_width;
            for (index_t x = 0; x < p.out_width; ++x) {
                out[x] = narrow<T>(blend(low[x], high[x], tap.low_weight, tap.high_weight));
            }
        }
    }
};

// Gradient of input rows [first, last), counted through all planes: down the columns first, where the work
// is, then along the row. Each row is summed by one thread in one order.
template <class T>
struct UpsampleBackwardRows {
    using A = accumulate_t<T>;

    static GVIT_INLINE void run(const UpsampleParams& p, const RowTaps<A>& taps, index_t first, index_t last) {
        const Axis<A> vertical = make_axis<A>(p.in_height, p.out_height);
        std::vector<A> column_sums(p.out_width), row_sums(p.in_width);
        for (index_t row = first; row < last; ++row) {
            const index_t input_row = row % p.in_height;
            const T* gradient = static_cast<const T*>(p.input) + row / p.in_height * p.out_height * p.out_width;
            std::memset(column_sums.data(), 0, sizeof(A) * p.out_width);
            std::memset(row_sums.data(), 0, sizeof(A) * p.in_width);
            const Span span = outputs_of(vertical, input_row);
            for (index_t y = span.first; y < span.last; ++y) {
                const A weight = weight_in(tap_of(vertical, y), input_row);
                add_scaled(gradient + y * p.out_width, weight, p.out_width, column_sums.data());
            }
            for (index_t x = 0; x < p.out_width; ++x) {
                row_sums[taps.low[x]] += taps.low_weight[x] * column_sums[x];
                row_sums[taps.high[x]] += taps.high_weight[x] * column_sums[x];
            }
            T* out = static_cast<T*>(p.output) + row * p.in_width;
            for (index_t j = 0; j < p.in_width; ++j) out[j] = narrow<T>(row_sums[j]);
        }
    }

    static GVIT_INLINE void add_scaled(const T* row, A weight, index_t width, A* __restrict__ sums) {
        for (index_t x = 0; x < width; ++x) sums[x] += weight * widen(row[x]);
    }
};

constexpr index_t kStrip = 64;  // pixels decided together: their best values stay in the first-level cache

// Labels of output rows [first, last), counted through the batch.
template <class T>
struct DecodeRows {
    using A = accumulate_t<T>;
    using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;  // as wide as A, to share a mask

    static GVIT_INLINE void run(const DecodeParams& p, const RowTaps<A>& taps, const index_t* group_labels,
                                index_t* counts, index_t first, index_t last) {
        const Axis<A> vertical = make_axis<A>(p.in_height, p.out_height);
        const index_t padded = round_up(p.out_width, kStrip);
        const index_t plane_size = p.in_height * p.in_width;
        StretchedRows<T> rows(p.groups, plane_size, p.in_width, p.out_width, padded);
        for (index_t row = first; row < last; ++row) {
            const index_t image = row / p.out_height;
            const T* maps = static_cast<const T*>(p.maps) + image * p.groups * plane_size;
            const Tap<A> tap = tap_of(vertical, row % p.out_height);
            const A* low = rows.get(maps, tap.low, taps);
            const A* high = rows.get(maps, tap.high, taps);
            const index_t* names = group_labels + image * p.groups;
            index_t* labels = p.labels + row * p.out_width;
            for (index_t x = 0; x < p.out_width; x += kStrip) {
                Index winner[kStrip];
                find_winners(low + x, high + x, tap, p.groups, padded, winner);
                const index_t pixels = smaller(kStrip, p.out_width - x);
                for (index_t i = 0; i < pixels; ++i) labels[x + i] = names[winner[i]];
            }
            if (counts != nullptr) count(p, row, labels, counts);
        }
    }

    static GVIT_INLINE void find_winners(const A* low, const A* high, const Tap<A>& tap, index_t groups, index_t stride,
                                         Index* __restrict__ winner) {
        A best[kStrip];
        for (index_t i = 0; i < kStrip; ++i) best[i] = -std::numeric_limits<A>::infinity();
        for (index_t i = 0; i < kStrip; ++i) winner[i] = 0;
        for (index_t g = 0; g < groups; ++g, low += stride, high += stride) {
            for (index_t i = 0; i < kStrip; ++i) {
                const A value = blend(low[i], high[i], tap.low_weight, tap.high_weight);
                const bool wins = beats(value, best[i]);
                best[i] = wins ? value : best[i];
                winner[i] = wins ? static_cast<Index>(g) : winner[i];
            }
        }
    }

    static GVIT_INLINE void count(const DecodeParams& p, index_t row, const index_t* labels, index_t* counts) {
        const index_t* target = p.target + row * p.out_width;
        for (index_t x = 0; x < p.out_width; ++x) {
            const index_t cell = confusion_cell(target[x], labels[x], p.num_classes);
            if (cell >= 0) ++counts[cell];
        }
    }
};

// The label of every group of the batch, [batch, groups].
std::vector<index_t> labels_of_groups(const DecodeParams& p) {
    if (p.group_labels != nullptr) return {p.group_labels, p.group_labels + p.batch * p.groups};
    std::vector<index_t> labels(p.batch * p.groups);
    for (index_t group = 0; group < p.batch * p.groups; ++group) {
        labels[group] = label_of(p, group, best_class(p, group, 0, 1));
    }
    return labels;
}

// A thread is worth waking for about this many blends.
index_t rows_per_thread(index_t blends_per_row) { return larger<index_t>(1, 16384 / blends_per_row); }

template <template <class> class Kernel>
void run_rows(const UpsampleParams& p, index_t rows, index_t blends_per_row) {
    with_storage_type(p.storage, [&](auto type) {
        using T = decltype(type);
        using A = accumulate_t<T>;
        const RowTaps<A> taps(make_axis<A>(p.in_width, p.out_width));
        torch::stable::parallel_for(0, rows, rows_per_thread(blends_per_row),
                                    [&](index_t first, index_t last) { dispatch<Kernel<T>>(p, taps, first, last); });
    });
}

size_t element_size(Storage storage) { return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2; }

// Equal sizes: a copy, also of infinities, which weights of zero would turn into NaN.
bool copied(const UpsampleParams& p) {
    if (p.in_height != p.out_height || p.in_width != p.out_width) return false;
    std::memcpy(p.output, p.input, p.planes * p.in_height * p.in_width * element_size(p.storage));
    return true;
}

}  // namespace

void upsample_cpu(const UpsampleParams& p) {
    if (!copied(p)) run_rows<UpsampleRows>(p, p.planes * p.out_height, p.out_width);
}

void upsample_backward_cpu(const UpsampleParams& p) {
    const index_t span = 2 * ceil_div(p.out_height, p.in_height);
    if (!copied(p)) run_rows<UpsampleBackwardRows>(p, p.planes * p.in_height, p.out_width * span);
}

void decode_cpu(const DecodeParams& p) {
    const std::vector<index_t> group_labels = labels_of_groups(p);
    std::mutex confusion_mutex;
    with_storage_type(p.storage, [&](auto type) {
        using T = decltype(type);
        using A = accumulate_t<T>;
        const RowTaps<A> taps(make_axis<A>(p.in_width, p.out_width));
        const index_t grain = rows_per_thread(p.out_width * p.groups);
        torch::stable::parallel_for(0, p.batch * p.out_height, grain, [&](index_t first, index_t last) {
            std::vector<index_t> counts(p.num_classes * p.num_classes);
            index_t* own_counts = p.target == nullptr ? nullptr : counts.data();
            dispatch<DecodeRows<T>>(p, taps, group_labels.data(), own_counts, first, last);
            const std::lock_guard<std::mutex> lock(confusion_mutex);
            for (size_t i = 0; i < counts.size(); ++i) p.confusion[i] += counts[i];
        });
    });
}

}  // namespace gvit
