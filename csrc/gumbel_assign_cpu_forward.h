// CPU kernel of gumbel_assign. Included once per level, after the tile.

namespace gvit::GVIT_LEVEL {

template <class S>
class AssignForward : protected AssignTile<S> {
  protected:
    using Base = AssignTile<S>;
    using T = typename Base::T;
    using Base::p, Base::groups_row, Base::channels_row, Base::logits, Base::memory, Base::tile;

    std::vector<index_t> chosen = std::vector<index_t>(tile);  // the groups of the tile's tokens
    bool improper = false;                                     // some token of this sample has no proper softmax

  private:
    T* const query_scratch = memory.template take<T>(p.groups * channels_row);
    T* const value_scratch = memory.template take<T>(p.value.data != nullptr ? tile * channels_row : 0);
    T* const sum_scratch = memory.template take<T>(in_place<S>(p.channels) ? 0 : p.groups * channels_row);
    T* const counts = memory.template take<T>(groups_row);
    T* const soft = memory.template take<T>(p.hard ? 0 : tile * groups_row);
    const bool at_once = p.hard && p.tokens <= tile;  // sums are divided where they are made
    Rows<T> sums{};                                   // the output itself, where it can be
    std::vector<index_t> members = std::vector<index_t>(tile), next = std::vector<index_t>(p.groups);

  public:
    explicit AssignForward(const AssignParams& params) : Base(params) {}

    virtual ~AssignForward() = default;

    void run(index_t sample) {
        start(sample, read_rows<S>(Base::at(p.query, sample, 0), p.query.row, p.groups, p.channels, query_scratch));
        std::memset(counts, 0, groups_row * sizeof(T));
        improper = false;
        sums = result_rows<S>(Base::at_result(p.output, sample, 0), p.output.row, p.channels, sum_scratch);
        for (index_t first = 0; first < p.tokens; first += tile) {
            const index_t count = smaller(tile, p.tokens - first);
            choose_tokens(sample, first, count);
            std::copy_n(chosen.begin(), count, p.index + sample * p.tokens + first);
            Rows<T> values = this->keys;
            if (p.value.data != nullptr)
                values = read_rows<S>(Base::at(p.value, sample, first), p.value.row, count, p.channels, value_scratch);
            if (p.hard) {
                add_members(values, count);
                continue;
            }
            add_column_sums<T>({soft, groups_row}, count, groups_row, counts);
            product<T>({soft, 1, groups_row}, values.data, values.row, sums.data, sums.row, p.groups, channels_row,
                       count, first > 0);
        }
        finish(sample);
    }

  protected:
    virtual void start(index_t sample, Rows<T> query) {
        this->start_sample(sample, query);
        this->transpose_query();
    }

    // Loads the keys of a tile and fills `chosen`, and `soft` where it is wanted.
    virtual void choose_tokens(index_t sample, index_t first, index_t count) {
        this->load_tile(sample, first, count);
        choose_all_exactly(count);
    }

    void choose_all_exactly(index_t count) {
        for (index_t token = 0; token < count; ++token) {
            const T maximum = choose_exactly(token);
            if (!p.hard) soften(token, maximum);
        }
    }

    T choose_exactly(index_t token) {
        const auto choice = this->choose(token);
        chosen[token] = choice.group;
        improper |= !choice.proper;
        return choice.maximum;
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

    // Adds the tile's tokens to their groups, a group at a time: its sum stays in registers meanwhile.
    void add_members(Rows<T> values, index_t count) {
        std::fill(next.begin(), next.end(), 0);
        for (index_t token = 0; token < count; ++token) ++next[chosen[token]];
        for (index_t s = 0, place = 0; s < p.groups; ++s) place += std::exchange(next[s], place);
        for (index_t token = 0; token < count; ++token) members[next[chosen[token]]++] = token;
        for (index_t s = 0, place = 0; s < p.groups; place = next[s++]) {
            const index_t size = next[s] - place;
            if (size == 0) continue;
            constexpr int lanes = kLanes<T>;
            const T factor = at_once ? inverse_mass(static_cast<T>(size)) : 1;
            index_t c = 0;
            for (; c + 8 * lanes <= channels_row; c += 8 * lanes) add_columns<8>(values, s, c, place, size, factor);
            for (; c < channels_row; c += lanes) add_columns<1>(values, s, c, place, size, factor);
            counts[s] += static_cast<T>(size);
        }
    }

    template <int vectors>
    GVIT_INLINE void add_columns(Rows<T> values, index_t group, index_t column, index_t place, index_t size, T factor) {
        constexpr int lanes = kLanes<T>;
        T* to = sums[group] + column;
        Vector<T> sum[vectors];
        const T* first = counts[group] == 0 ? values[members[place]] + column : to;
        for (int v = 0; v < vectors; ++v) sum[v] = load(first + v * lanes);
        for (index_t i = counts[group] == 0 ? 1 : 0; i < size; ++i) {
            const T* from = values[members[place + i]] + column;
            for (int v = 0; v < vectors; ++v) sum[v] += load(from + v * lanes);
        }
        for (int v = 0; v < vectors; ++v) store(to + v * lanes, sum[v] * factor);
    }

    // A sample with an improper token is NaN.
    T inverse_mass(T count) const {
        return 1 / ((improper ? std::numeric_limits<T>::quiet_NaN() : count) + static_cast<T>(p.eps));
    }

    void finish(index_t sample) {
        T* count = static_cast<T*>(p.count) + sample * p.groups;
        for (index_t s = 0; s < p.groups; ++s) {
            count[s] = improper ? std::numeric_limits<T>::quiet_NaN() : counts[s];
            const T inverse = inverse_mass(counts[s]);
            const bool empty = p.hard ? counts[s] == 0 : p.tokens == 0;
            if (empty)
                std::fill_n(sums[s], channels_row, T(0) * inverse);  // NaN without eps
            else if (!at_once)
                for (index_t c = 0; c < channels_row; ++c) sums[s][c] *= inverse;
        }
        write_rows<S>(sums, Base::at_result(p.output, sample, 0), p.output.row, p.groups, p.channels);
    }
};

}  // namespace gvit::GVIT_LEVEL
