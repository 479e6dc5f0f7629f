// What the CPU kernels of gumbel_assign and of its gradient share. Included once per level.
//
// Tokens are taken in tiles that stay in the second-level cache. A tile of logits is stored [token][group], so
// that the softmax over groups runs along vectors and every product reads its operands where they lie:
//   logits  = keys * query^T          (query transposed once per sample)
//   forward   hard: each token is added to its group; soft: output += assign^T * values
//   backward  d_assign = values * grad_output^T, then three products with d_logits
// Nothing larger than a tile is ever stored, and each sum is made by one thread in one order.
#include "csrc/cpu_noise.h"

namespace gvit::GVIT_LEVEL {

// Tokens per tile: keys of about 384 KiB, a logits tile of at most 64 KiB of elements, evenly divided.
inline index_t tile_of_tokens(index_t tokens, index_t channels, index_t groups) {
    const index_t fitting = smaller<index_t>(98304 / channels, 65536 / groups);
    const index_t limit = larger<index_t>(16, smaller<index_t>(256, fitting));
    if (tokens <= limit) return larger<index_t>(tokens, 1);
    return round_up<index_t>(ceil_div(tokens, ceil_div(tokens, limit)), 4);
}

// torch.argmax: the first of the largest, where NaN is larger than any number.
template <class T>
index_t first_largest(const T* value, index_t count) {
    index_t best = 0;
    for (index_t i = 0; i < count; ++i) {
        if (value[i] != value[i]) return i;
        if (value[i] > value[best]) best = i;
    }
    return best;
}

// The group of a token, the logit that it has there (but for NaNs), and whether the logits have a softmax.
template <class T>
struct Choice {
    T maximum;
    index_t group;
    bool proper;
};

// What forward and backward share for one thread: sizes, the transposed query and the logits of a tile.
template <class S>
struct AssignTile {
    using T = accumulate_t<S>;

    const AssignParams& p;
    const index_t groups_row, channels_row, tile;
    const index_t noise_row;
    const bool rows_only;  // products of rows with rows, nothing transposed
    Workspace memory;
    T *query_t, *bias, *logits, *key_scratch;
    float* noise;
    Rows<T> query{}, keys{};

    explicit AssignTile(const AssignParams& params)
        : p(params),
          groups_row(padded<T>(params.groups)),
          channels_row(padded<T>(params.channels)),
          tile(tile_of_tokens(params.tokens, params.channels, params.groups)),
          noise_row(round_up<index_t>(groups_row, 16)),
          rows_only(by_rows<T>(params.tokens, params.groups, params.channels)) {
        query_t = memory.take<T>(rows_only ? 0 : p.channels * groups_row);
        bias = memory.take<T>(groups_row);
        logits = memory.take<T>(tile * groups_row);
        std::memset(logits, 0, tile * groups_row * sizeof(T));
        key_scratch = memory.take<T>(in_place<S>(p.channels) ? 0 : tile * channels_row);
        noise = memory.take<float>(tile * noise_row);
        std::memset(noise, 0, tile * noise_row * sizeof(float));
    }

    static const S* at(const Matrices& m, index_t sample, index_t row) {
        return static_cast<const S*>(m.data) + sample * m.batch + row * m.row;
    }
    static S* at_result(const Matrices& m, index_t sample, index_t row) {
        return static_cast<S*>(m.data) + sample * m.batch + row * m.row;
    }

    void start_sample(index_t sample, Rows<T> query_rows) {
        query = query_rows;
        for (index_t s = 0; s < groups_row; ++s) {
            const bool given = p.bias != nullptr && s < p.groups;
            bias[s] = given ? widen(static_cast<const S*>(p.bias)[sample * p.groups + s]) : T(0);
        }
    }

    // What `multiply` wants of the queries.
    void transpose_query() const {
        if (!rows_only) transpose_rows<T>(query, p.groups, p.channels, query_t, groups_row);
    }

    // to[token][group] = rows . others, of which `transposed` is the transpose.
    void multiply(Rows<T> rows, Rows<T> others, const T* transposed, index_t count, T* to) const {
        if (rows_only) return product_of_rows<T>(rows, others, to, groups_row, 1, count, p.groups, channels_row);
        product<T>({rows.data, rows.row, 1}, transposed, groups_row, to, groups_row, count, groups_row, p.channels,
                   false);
    }

    // keys and logits (dot products only) of tokens first .. + count, and their noise.
    void load_tile(index_t sample, index_t first, index_t count) {
        load_keys(sample, first, count);
        multiply(keys, query, query_t, count, logits);
    }

    void load_keys(index_t sample, index_t first, index_t count) {
        keys = read_rows<S>(at(p.key, sample, first), p.key.row, count, p.channels, key_scratch);
        if (p.noise_key == nullptr) return;
        draw_noise(p.noise_key[0], p.noise_key[1], sample, p.groups, p.tokens, first, count, noise, noise_row);
    }

    // The choice of a token, whose dot products become tempered logits in place. Not inlined: forward and backward
    // must round alike, to choose alike.
    __attribute__((noinline)) Choice<T> choose(index_t token) {
        T* row = logits + token * groups_row;
        using Number = Integer<T>;
        Vector<T> largest = fill(-std::numeric_limits<T>::infinity());
        Vector<Number> numbers = fill<Number>(-1);  // 0 in lanes that had a NaN
        for (index_t s = 0; s < groups_row; s += kLanes<T>) {
            const Vector<T> z = tempered(token, s);
            store(row + s, z);
            largest = larger_of(z, largest);  // never a NaN
            numbers &= z == z;
        }
        if (p.groups == 1) return {row[0], 0, row[0] - row[0] == 0};
        const T maximum = largest_lane<T>(largest);
        if (maximum - maximum != 0 || largest_lane<Number>(numbers) == 0)
            return {maximum, first_largest(row, p.groups), false};
        Vector<Number> winners = fill(std::numeric_limits<Number>::max());
        for (index_t s = 0; s < groups_row; s += kLanes<T>) {
            const Vector<Number> number = lane_numbers<T>() + static_cast<Number>(s);
            winners = smaller_of(winners, load(row + s) == maximum ? number : winners);
        }
        return {maximum, static_cast<index_t>(smallest_lane<Number>(winners)), true};
    }

  protected:
    // (logit + noise) / tau of lanes s.. of a token; -inf beyond the last group.
    GVIT_INLINE Vector<T> tempered(index_t token, index_t s) const {
        Vector<T> z = (load(logits + token * groups_row + s) + load(bias + s)) * static_cast<T>(p.scale);
        if (p.noise_key != nullptr) z += load_converted<T>(noise + token * noise_row + s);
        if (p.tau != 1.0) z /= static_cast<T>(p.tau);
        return inside(s) ? z : fill(-std::numeric_limits<T>::infinity());
    }

    GVIT_INLINE auto inside(index_t s) const { return lane_numbers<T>() < static_cast<Integer<T>>(p.groups - s); }
};

}  // namespace gvit::GVIT_LEVEL
