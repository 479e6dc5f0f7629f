// CPU kernel of gumbel_assign. Included once per level, after the tile.

namespace gvit::GVIT_LEVEL {

template <class S>
class AssignForward : AssignTile<S> {
    using Base = AssignTile<S>;
    using T = typename Base::T;
    using Base::p, Base::groups_row, Base::channels_row, Base::logits, Base::memory, Base::tile;

    T* const query_scratch = memory.template take<T>(p.groups * channels_row);
    T* const value_scratch = memory.template take<T>(p.value.data != nullptr ? tile * channels_row : 0);
    T* const sums = memory.template take<T>(p.groups * channels_row);
    T* const counts = memory.template take<T>(groups_row);
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
                const auto choice = this->choose(token);
                p.index[flat_token + token] = choice.group;
                improper |= !choice.proper;
                p.hard ? add_to_group(choice.group, values[token]) : soften(token, choice.maximum);
            }
            if (p.hard) continue;
            add_column_sums<T>({soft, groups_row}, count, groups_row, counts);
            product<T>({soft, 1, groups_row}, values.data, values.row, sums, channels_row, p.groups, channels_row,
                       count, first > 0);
        }
        finish(sample);
    }

  private:
    // Turns the row of logits of a token that chose into its row of `soft`: the softmax over groups.
    GVIT_INLINE void soften(index_t token, T maximum) {
        constexpr int lanes = kLanes<T>;
        const T* row = logits + token * groups_row;
        T* soft_row = soft + token * groups_row;
        Vector<T> sum{};
        for (index_t s = 0; s < groups_row; s += lanes) {
            const Vector<T> e = exponential(load(row + s) - maximum);
            sum += e;
            store(soft_row + s, e);
        }
        const T inverse = 1 / sum_lanes<T>(sum);
        for (index_t s = 0; s < groups_row; s += lanes) store(soft_row + s, load(soft_row + s) * inverse);
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
