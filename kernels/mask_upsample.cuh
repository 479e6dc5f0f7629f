// Bilinear resampling (align_corners=False) of group maps, and their decoding to labels.
//
// The formula is torch's, operation by operation, so that labels agree:
// source = max(ratio * (p + 0.5) - 0.5, 0), weights in float32, first along the row, then down the column.
#pragma once

#include "numeric.cuh"
#include "parameters.cuh"

namespace gvit {

// ---- the formula -----------------------------------------------------------------------------------------------

// One axis of the resampling; A is the type of the arithmetic.
template <class A>
struct Axis {
    index_t in, out;
    A ratio;
};

template <class A>
GVIT_HD Axis<A> make_axis(index_t in, index_t out) {
    return {in, out, static_cast<A>(in) / static_cast<A>(out)};
}

// The two inputs that make up one output, and their weights.
template <class A>
struct Tap {
    index_t low, high;
    A low_weight, high_weight;
};

template <class A>
GVIT_HD Tap<A> tap_of(const Axis<A>& axis, index_t position) {
    if (axis.in == axis.out) return {position, position, A(1), A(0)};
    const A source = larger(axis.ratio * (static_cast<A>(position) + A(0.5)) - A(0.5), A(0));
    const index_t low = smaller(static_cast<index_t>(source), axis.in - 1);
    const A high_weight = smaller(larger(source - static_cast<A>(low), A(0)), A(1));
    return {low, low + (low < axis.in - 1 ? 1 : 0), A(1) - high_weight, high_weight};
}

template <class A>
GVIT_HD A blend(A low, A high, A low_weight, A high_weight) {
    return low_weight * low + high_weight * high;
}

// The gradient runs the same taps backwards. An input is touched by the outputs of one short range: a bound,
// one position generous on both sides; weight_in() is zero where it is too wide.
struct Span {
    index_t first, last;  // last is excluded
};

template <class A>
GVIT_HD Span outputs_of(const Axis<A>& axis, index_t input) {
    if (axis.in == axis.out) return {input, input + 1};
    const A from = (static_cast<A>(input) - A(0.5)) / axis.ratio - A(0.5);
    const A to = (static_cast<A>(input) + A(1.5)) / axis.ratio - A(0.5);
    const index_t first = input == 0 ? 0 : larger(static_cast<index_t>(from) - 1, index_t(0));
    const index_t last = input == axis.in - 1 ? axis.out : smaller(static_cast<index_t>(to) + 2, axis.out);
    return {first, last};
}

template <class A>
GVIT_HD A weight_in(const Tap<A>& tap, index_t input) {
    return (tap.low == input ? tap.low_weight : A(0)) + (tap.high == input ? tap.high_weight : A(0));
}

// A NaN counts as the largest value and the first of equals wins, as in torch.argmax. No branch, so that a
// loop over pixels vectorises.
template <class A>
GVIT_HD bool beats(A value, A best) {
    return (value > best) | ((value != value) & (best == best));
}

// A class and its score; of two, the one that torch.argmax would return.
struct Candidate {
    double score;
    int index;
};

GVIT_HD Candidate better(Candidate a, Candidate b) {
    const bool equal = !beats(a.score, b.score) && !beats(b.score, a.score);
    return beats(b.score, a.score) || (equal && b.index < a.index) ? b : a;
}

// The best of classes first, first + step, ... of group number `group`, counted through the batch. Without
// any: a candidate that loses against all.
GVIT_HD Candidate best_class(const DecodeParams& p, index_t group, int first, int step) {
    const int classes = static_cast<int>(p.classes);
    Candidate best{-HUGE_VAL, classes};
    for (int k = first; k < classes; k += step) {
        best = better(best, {element_of(p.scores, p.score_storage, group * classes + k), k});
    }
    return best;
}

// With a threshold label 0 is background and class k has label k + 1.
GVIT_HD index_t label_of(const DecodeParams& p, index_t group, Candidate best) {
    if (p.background_threshold == nullptr) return best.index;
    const double threshold = element_of(p.background_threshold, p.score_storage, group / p.groups);
    return best.score >= threshold ? best.index + 1 : 0;
}

// The cell of the confusion matrix that a pixel counts in, or -1.
GVIT_HD index_t confusion_cell(index_t target, index_t label, index_t num_classes) {
    const bool counted = (target >= 0) & (target < num_classes) & (label >= 0) & (label < num_classes);
    return counted ? target * num_classes + label : -1;
}

}  // namespace gvit

#if defined(GVIT_GLOBAL)

#include "warp.cuh"

namespace gvit {

// ---- kernels ---------------------------------------------------------------------------------------------------

// The four inputs of one output pixel, as offsets into a plane. Found once, they serve every plane that a
// thread visits; 32 bits are enough inside one plane, and half the registers.
template <class A>
struct PixelTaps {
    int low_low, low_high, high_low, high_high;
    A row_high, column_high;  // the weights; those of the low sides are 1 minus these

    GVIT_DEVICE PixelTaps(const Axis<A>& vertical, const Axis<A>& horizontal, unsigned pixel) {
        const unsigned width = static_cast<unsigned>(horizontal.out);
        const Tap<A> row = tap_of(vertical, pixel / width), column = tap_of(horizontal, pixel % width);
        low_low = static_cast<int>(row.low * horizontal.in + column.low);
        low_high = static_cast<int>(row.low * horizontal.in + column.high);
        high_low = static_cast<int>(row.high * horizontal.in + column.low);
        high_high = static_cast<int>(row.high * horizontal.in + column.high);
        row_high = row.high_weight;
        column_high = column.high_weight;
    }

    template <class T>
    GVIT_DEVICE A value(const T* plane) const {
        const A row_low = A(1) - row_high, column_low = A(1) - column_high;
        const A low = blend(widen(plane[low_low]), widen(plane[low_high]), column_low, column_high);
        const A high = blend(widen(plane[high_low]), widen(plane[high_high]), column_low, column_high);
        return blend(low, high, row_low, row_high);
    }
};

constexpr int kUpsampleThreads = 256;

// Grid (pixels, slices of the planes): neighbouring threads write neighbouring pixels of one plane.
template <class T>
GVIT_GLOBAL(kUpsampleThreads) upsample_kernel(UpsampleParams p) {
    using A = accumulate_t<T>;
    const Axis<A> vertical = make_axis<A>(p.in_height, p.out_height);
    const Axis<A> horizontal = make_axis<A>(p.in_width, p.out_width);
    const bool copied = p.in_height == p.out_height && p.in_width == p.out_width;
    const index_t in_size = p.in_height * p.in_width, out_size = p.out_height * p.out_width;
    const T* input = static_cast<const T*>(p.input);
    T* output = static_cast<T*>(p.output);
    const unsigned step = gridDim.x * kUpsampleThreads;
    for (unsigned pixel = blockIdx.x * kUpsampleThreads + threadIdx.x; pixel < out_size; pixel += step) {
        const PixelTaps<A> taps(vertical, horizontal, pixel);
        for (index_t plane = blockIdx.y; plane < p.planes; plane += gridDim.y) {
            // A copy also of infinities, which weights of zero would turn into NaN.
            const T* source = input + plane * in_size;
            output[plane * out_size + pixel] = copied ? source[pixel] : narrow<T>(taps.value(source));
        }
    }
}

constexpr int kBackwardThreads = 128;
constexpr int kColumnChunk = 512;

// One block sums the gradient of up to kBackwardThreads neighbours in one input row: down the columns into
// shared memory (coalesced), then along the row. A gather, so the order of additions is fixed.
template <class T>
GVIT_GLOBAL(kBackwardThreads) upsample_backward_kernel(UpsampleParams p) {
    using A = accumulate_t<T>;
    GVIT_SHARED(A, column_sums, kColumnChunk);
    const Axis<A> vertical = make_axis<A>(p.in_height, p.out_height);
    const Axis<A> horizontal = make_axis<A>(p.in_width, p.out_width);
    const index_t tiles = ceil_div<index_t>(p.in_width, kBackwardThreads);
    const index_t units = p.planes * p.in_height * tiles;
    for (index_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const index_t row = unit / tiles, input_row = row % p.in_height;
        const index_t first = unit % tiles * kBackwardThreads;
        const index_t last = smaller(first + kBackwardThreads, p.in_width);
        const index_t mine = first + threadIdx.x;
        const T* gradient = static_cast<const T*>(p.input) + row / p.in_height * p.out_height * p.out_width;
        const Span rows = outputs_of(vertical, input_row);
        const Span columns{outputs_of(horizontal, first).first, outputs_of(horizontal, last - 1).last};
        const Span my_columns = mine < last ? outputs_of(horizontal, mine) : Span{0, 0};
        A total = 0;
        for (index_t start = columns.first; start < columns.last; start += kColumnChunk) {
            const index_t end = smaller(start + kColumnChunk, columns.last);
            for (index_t x = start + threadIdx.x; x < end; x += kBackwardThreads) {
                A sum = 0;
                for (index_t y = rows.first; y < rows.last; ++y) {
                    sum += weight_in(tap_of(vertical, y), input_row) * widen(gradient[y * p.out_width + x]);
                }
                column_sums[x - start] = sum;
            }
            GVIT_SYNC();
            for (index_t x = larger(my_columns.first, start); x < smaller(my_columns.last, end); ++x) {
                total += weight_in(tap_of(horizontal, x), mine) * column_sums[x - start];
            }
            GVIT_SYNC();
        }
        if (mine < last) static_cast<T*>(p.output)[row * p.in_width + mine] = narrow<T>(total);
    }
}

constexpr int kDecodeThreads = 128;

// Labels of all groups of an image, one warp a group.
GVIT_DEVICE void fill_group_labels(const DecodeParams& p, index_t image, index_t* group_labels) {
    for (index_t g = warp_index(); g < p.groups; g += kDecodeThreads / kWarpSize) {
        const index_t group = image * p.groups + g;
        index_t label;
        if (p.group_labels != nullptr) {
            label = p.group_labels[group];
        } else {
            Candidate best = best_class(p, group, lane_index(), kWarpSize);
            for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
                const Candidate other{shuffle_xor(best.score, mask), shuffle_xor(best.index, mask)};
                best = better(best, other);
            }
            label = label_of(p, group, best);
        }
        if (lane_index() == 0) group_labels[g] = label;
    }
}

template <class T, class A>
GVIT_DEVICE int winning_group(const PixelTaps<A>& taps, const T* maps, int groups, index_t plane_size) {
    A best = taps.value(maps);
    int winner = 0;
    for (int g = 1; g < groups; ++g) {
        maps += plane_size;
        const A value = taps.value(maps);
        const bool wins = beats(value, best);
        best = wins ? value : best;
        winner = wins ? g : winner;
    }
    return winner;
}

// Grid (pixels, images). Shared memory: the group labels, then, if they fit, the block's own counts; each
// count is an integer, so the order of the atomic additions does not matter.
template <class T>
GVIT_GLOBAL(kDecodeThreads) decode_kernel(DecodeParams p, bool counts_in_shared) {
    using A = accumulate_t<T>;
    GVIT_DYNAMIC_SHARED(shared);
    index_t* group_labels = reinterpret_cast<index_t*>(shared);
    unsigned* counts = reinterpret_cast<unsigned*>(group_labels + p.groups);
    const index_t cells = counts_in_shared ? p.num_classes * p.num_classes : 0;
    const index_t in_size = p.in_height * p.in_width, out_size = p.out_height * p.out_width;
    const Axis<A> vertical = make_axis<A>(p.in_height, p.out_height);
    const Axis<A> horizontal = make_axis<A>(p.in_width, p.out_width);
    for (index_t cell = threadIdx.x; cell < cells; cell += kDecodeThreads) counts[cell] = 0;
    for (index_t image = blockIdx.y; image < p.batch; image += gridDim.y) {
        fill_group_labels(p, image, group_labels);
        GVIT_SYNC();
        const T* maps = static_cast<const T*>(p.maps) + image * p.groups * in_size;
        const unsigned step = gridDim.x * kDecodeThreads;
        for (unsigned pixel = blockIdx.x * kDecodeThreads + threadIdx.x; pixel < out_size; pixel += step) {
            const PixelTaps<A> taps(vertical, horizontal, pixel);
            const index_t label = group_labels[winning_group(taps, maps, static_cast<int>(p.groups), in_size)];
            p.labels[image * out_size + pixel] = label;
            if (p.target == nullptr) continue;
            const index_t cell = confusion_cell(p.target[image * out_size + pixel], label, p.num_classes);
            if (cell < 0) continue;
            if (counts_in_shared) {
                atomic_add(counts + cell, 1u);
            } else {
                atomic_add(p.confusion + cell, index_t(1));
            }
        }
        GVIT_SYNC();
    }
    for (index_t cell = threadIdx.x; cell < cells; cell += kDecodeThreads) {
        if (counts[cell] != 0) atomic_add(p.confusion + cell, static_cast<index_t>(counts[cell]));
    }
}

}  // namespace gvit

#endif  // GVIT_GLOBAL
