// Bilinear resampling (align_corners=False) of group maps, and their decoding to labels.
//
// The formula is torch's, operation by operation, so that labels agree: source = max(ratio * (p + 0.5) - 0.5, 0),
// weights in float32, first along the row and then down the column.
#pragma once

#include "numeric.cuh"

namespace gvit {

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

// The gradient runs the same taps backwards. An input is touched by the outputs of one short range; the
// range is a bound, one position generous on both sides, and weight_in() is zero where it is too wide.
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

// A NaN counts as the largest value and the first of equals wins, as in torch.argmax.
template <class A>
GVIT_HD bool beats(A value, A best) {
    return (value > best) | ((value != value) & (best == best));  // no branch, so that a loop vectorises
}

// The label of one group: the class of its best score, shifted by one and replaced by 0 (background) where
// that score does not reach the threshold, if there is one.
template <class T>
GVIT_HD index_t class_of_group(const T* scores, index_t classes, const T* threshold) {
    using A = accumulate_t<T>;
    index_t best_class = 0;
    A best = widen(scores[0]);
    for (index_t k = 1; k < classes; ++k) {
        const A score = widen(scores[k]);
        if (!beats(score, best)) continue;
        best = score;
        best_class = k;
    }
    if (threshold == nullptr) return best_class;
    return best >= widen(*threshold) ? best_class + 1 : 0;
}

}  // namespace gvit
