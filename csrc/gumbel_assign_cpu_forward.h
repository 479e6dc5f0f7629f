// CPU kernel of gumbel_assign. Included once per level, after the tile.

namespace gvit::GVIT_LEVEL {

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

template <class S>
class AssignForward : AssignTile<S> {
    using Base = AssignTile<S>;
    using T = typename Base::T;
    using Base::p, Base::groups_row, Base::channels_row, Base::logits, Base::memory, Base::tile;

    T* const query_scratch = memory.template take<T>(p.groups * channels_row);
    T* const value_scratch = memory.template take<T>(p.value.data != nullptr ? tile * channels_row : 0);
    T* const sums = memory.template take<T>(p.groups * channels_row);
    T* const counts = memory.template take<T>(groups_row);
    T* const maxima = memory.template take<T>(tile + kLanes<T>);
    T* const totals = memory.template take<T>(tile + kLanes<T>);  // sum of e^(z - maximum) over the groups
    T* const soft = memory.template take<T>(p.hard ? 0 : tile * groups_row);
    bool improper = false;  // some token of this sample has no proper softmax

  public:
    explicit AssignForward(const AssignParams& params) : Base(params) {}

    void run(index_t sample) {
        this->start_sample(
            sample, read_rows<S>(Base::at(p.query, sample, 0), p.query.row, p.groups, p.channels, query_scratch));
        std::memset(counts, 0, groups_row * sizeof(T));
        improper = false;
        for (index_t first = 0; first < p.tokens; first += tile) {
            const index_t count = smaller(tile, p.tokens - first);
            this->load_tile(sample, first, count);
            Rows<T> values = this->keys;
            if (p.value.data != nullptr)
                values = read_rows<S>(Base::at(p.value, sample, first), p.value.row, count, p.channels, value_scratch);
            const index_t flat_token = sample * p.tokens + first;
            for (index_t token = 0; token < count; ++token) {
                const index_t winner = assign(token);
                p.index[flat_token + token] = winner;
                if (p.hard) add_to_group(winner, values[token]);
            }
            write_lse(static_cast<T*>(p.lse) + flat_token, count);
            if (p.hard) continue;
            add_column_sums<T>({soft, groups_row}, count, groups_row, counts);
            product<T>({soft, 1, groups_row}, values.data, values.row, sums, channels_row, p.groups, channels_row,
                       count, first > 0);
        }
        finish(sample);
    }

  private:
    // The softmax of a single group is 1, or NaN where the logit is not finite.
    GVIT_INLINE index_t assign_to_only_group(index_t token) {
        const T z = this->tempered(token, 0)[0];
        maxima[token] = z;
        totals[token] = 1 + (z - z);
        if (!p.hard) soft[token * groups_row] = totals[token];
        improper |= z - z != 0;
        return 0;
    }

    // Softmax over groups of one token: returns its winner, fills its row of `soft`.
    GVIT_INLINE index_t assign(index_t token) {
        constexpr int lanes = kLanes<T>;
        if (p.groups == 1) return assign_to_only_group(token);
        T* row = logits + token * groups_row;
        T* soft_row = soft + token * groups_row;
        Vector<T> largest = fill(-std::numeric_limits<T>::infinity());
        for (index_t s = 0; s < groups_row; s += lanes) {
            const Vector<T> z = this->tempered(token, s);
            store(row + s, z);
            largest = larger_of(z, largest);  // never a NaN
        }
        const T maximum = largest_lane<T>(largest);
        using Number = Integer<T>;
        Vector<Number> winners = fill(std::numeric_limits<Number>::max());
        Vector<T> sum{};
        for (index_t s = 0; s < groups_row; s += lanes) {
            const Vector<T> z = load(row + s);
            const Vector<Number> number = lane_numbers<T>() + static_cast<Number>(s);
            winners = smaller_of(winners, z == maximum ? number : winners);
            const Vector<T> e = exponential(z - maximum);
            sum += e;
            if (!p.hard) store(soft_row + s, e);
        }
        const T total = sum_lanes<T>(sum);
        index_t winner = smallest_lane<Number>(winners);
        if (!(total == total)) {
            winner = first_largest(row, p.groups);
            improper = true;
        }
        maxima[token] = maximum;
        totals[token] = total;
        if (!p.hard) {
            const T inverse = 1 / total;
            for (index_t s = 0; s < groups_row; s += lanes) store(soft_row + s, load(soft_row + s) * inverse);
        }
        return winner;
    }

    void write_lse(T* lse, index_t count) {
        for (index_t i = 0; i < count; i += kLanes<T>) {
            const Vector<T> total = load(totals + i);
            store(totals + i, load(maxima + i) + (total == total ? logarithm(total) : total));
        }
        std::memcpy(lse, totals, count * sizeof(T));
    }

    // The first token of a group is copied, so that the sums need no zeros.
    GVIT_INLINE void add_to_group(index_t group, const T* value) {
        T* sum = sums + group * channels_row;
        if (counts[group] == 0)
            std::memcpy(sum, value, channels_row * sizeof(T));
        else
            for (index_t c = 0; c < channels_row; c += kLanes<T>) store(sum + c, load(sum + c) + load(value + c));
        counts[group] += 1;
    }

    void finish(index_t sample) {
        T* count = static_cast<T*>(p.count) + sample * p.groups;
        constexpr T nan = std::numeric_limits<T>::quiet_NaN();
        for (index_t s = 0; s < p.groups; ++s) {
            count[s] = improper ? nan : counts[s];
            const T inverse = 1 / (count[s] + static_cast<T>(p.eps));
            const bool empty = p.hard ? counts[s] == 0 : p.tokens == 0;
            S* to = Base::at_result(p.output, sample, s);
            const T* sum = sums + s * channels_row;
            if (empty)
                std::fill(to, to + p.channels, narrow<S>(T(0) * inverse));  // NaN without eps
            else
                for (index_t c = 0; c < p.channels; ++c) to[c] = narrow<S>(sum[c] * inverse);
        }
    }
};

}  // namespace gvit::GVIT_LEVEL
