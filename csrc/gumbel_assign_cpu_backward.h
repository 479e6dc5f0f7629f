// CPU kernel of the gradient of gumbel_assign. Included once per level, after the tile.

namespace gvit::GVIT_LEVEL {

template <class S>
class AssignBackward : AssignTile<S> {
    using Base = AssignTile<S>;
    using T = typename Base::T;
    using Base::p, Base::groups_row, Base::channels_row, Base::logits, Base::memory, Base::query, Base::tile;

    T* const query_scratch = memory.template take<T>(p.groups * channels_row);
    T* const gradient_scratch = memory.template take<T>(p.groups * channels_row);
    T* const gradient_t = memory.template take<T>(Base::rows_only ? 0 : p.channels * groups_row);
    T* const output_scratch = memory.template take<T>(p.groups * channels_row);
    T* const value_scratch = memory.template take<T>(tile * channels_row);
    T* const token_scratch = memory.template take<T>(tile * channels_row);
    T* const d_assign = memory.template take<T>(tile * groups_row);
    T* const grad_query_scratch = memory.template take<T>(p.groups * channels_row);
    T* const grad_bias = memory.template take<T>(groups_row);
    T* const output_dot = memory.template take<T>(groups_row);  // grad_output . output - grad_count * (count + eps)
    T* const inverse = memory.template take<T>(groups_row);     // 1 / (count + eps)
    std::vector<index_t> chosen = std::vector<index_t>(tile);
    Rows<T> gradient{}, grad_query{};

  public:
    explicit AssignBackward(const AssignParams& params) : Base(params) {}

    void run(index_t sample) {
        start(sample);
        for (index_t first = 0; first < p.tokens; first += tile) {
            const index_t count = smaller(tile, p.tokens - first);
            this->load_tile(sample, first, count);
            Rows<T> values = this->keys;
            if (p.value.data != nullptr)
                values = read_rows<S>(Base::at(p.value, sample, first), p.value.row, count, p.channels, value_scratch);
            this->multiply(values, gradient, gradient_t, count, d_assign);
            for (index_t token = 0; token < count; ++token) {
                const auto choice = this->choose(token);
                chosen[token] = choice.group;
                differentiate(token, choice.maximum);
            }
            if (p.grad_bias != nullptr) add_column_sums<T>({logits, groups_row}, count, groups_row, grad_bias);
            product<T>({logits, 1, groups_row}, this->keys.data, this->keys.row, grad_query.data, grad_query.row,
                       p.groups, channels_row, count, first > 0);
            write_token_gradients(sample, first, count);
        }
        write_rows<S>(grad_query, Base::at_result(p.grad_query, sample, 0), p.grad_query.row, p.groups, p.channels);
        for (index_t s = 0; p.grad_bias != nullptr && s < p.groups; ++s)
            static_cast<S*>(p.grad_bias)[sample * p.groups + s] = narrow<S>(grad_bias[s]);
    }

  private:
    void start(index_t sample) {
        gradient =
            read_rows<S>(Base::at(p.grad_output, sample, 0), p.grad_output.row, p.groups, p.channels, gradient_scratch);
        this->start_sample(
            sample, read_rows<S>(Base::at(p.query, sample, 0), p.query.row, p.groups, p.channels, query_scratch));
        this->transpose_query();
        if (!Base::rows_only) transpose_rows<T>(gradient, p.groups, p.channels, gradient_t, groups_row);
        grad_query =
            result_rows<S>(Base::at_result(p.grad_query, sample, 0), p.grad_query.row, p.channels, grad_query_scratch);
        if (p.tokens == 0)
            for (index_t s = 0; s < p.groups; ++s) std::memset(grad_query[s], 0, channels_row * sizeof(T));
        std::memset(grad_bias, 0, groups_row * sizeof(T));
        for (index_t s = 0; s < groups_row; ++s) output_dot[s] = inverse[s] = 0;
        const Rows<T> output =
            read_rows<S>(Base::at(p.output, sample, 0), p.output.row, p.groups, p.channels, output_scratch);
        for (index_t s = 0; s < p.groups; ++s) {
            const index_t place = sample * p.groups + s;
            const T mass = static_cast<const T*>(p.count)[place] + static_cast<T>(p.eps);
            output_dot[s] = dot(gradient[s], output[s], channels_row);
            if (p.grad_count != nullptr) output_dot[s] -= static_cast<const T*>(p.grad_count)[place] * mass;
            inverse[s] = 1 / mass;
        }
    }

    // Turns a row of logits into scale * d_logits and, for the soft assignment, the row of d_assign into
    // assign / (count + eps).
    GVIT_INLINE void differentiate(index_t token, T maximum) {
        constexpr int lanes = kLanes<T>;
        T* row = logits + token * groups_row;
        T* d_row = d_assign + token * groups_row;
        Vector<T> sum{}, weighted{};
        for (index_t s = 0; s < groups_row; s += lanes) {
            const Vector<T> e = exponential(load(row + s) - maximum);
            const Vector<T> d = (load(d_row + s) - load(output_dot + s)) * load(inverse + s);
            const Vector<T> clean = this->inside(s) ? d : Vector<T>{};
            sum += e;
            weighted += e * clean;
            store(row + s, e);
            store(d_row + s, clean);
        }
        const T normal = 1 / sum_lanes<T>(sum);
        const T mean = sum_lanes<T>(weighted) * normal;
        const T factor = static_cast<T>(p.scale / p.tau) * normal;
        for (index_t s = 0; s < groups_row; s += lanes) {
            const Vector<T> e = load(row + s);
            const Vector<T> d_logit = e * (load(d_row + s) - mean) * factor;
            store(row + s, d_logit);
            if (!p.hard) store(d_row + s, e * normal * load(inverse + s));
        }
    }

    void write_token_gradients(index_t sample, index_t first, index_t count) {
        const bool shared = p.value.data == nullptr;
        S* key_to = Base::at_result(p.grad_key, sample, first);
        Rows<T> rows = result_rows<S>(key_to, p.grad_key.row, p.channels, token_scratch);
        // The gradient of a value in a hard assignment is a row of grad_output / (count + eps).
        const Begin<T> hard_values{gradient.data, gradient.row, chosen.data(), inverse};
        product<T>({logits, groups_row, 1}, query.data, query.row, rows.data, rows.row, count, channels_row, p.groups,
                   false, shared && p.hard ? hard_values : Begin<T>{});
        if (shared && !p.hard) multiply_assignment(count, rows, true);
        write_rows<S>(rows, key_to, p.grad_key.row, count, p.channels);
        if (shared) return;
        S* value_to = Base::at_result(p.grad_value, sample, first);
        rows = result_rows<S>(value_to, p.grad_value.row, p.channels, token_scratch);
        p.hard ? gather(count, rows) : multiply_assignment(count, rows, false);
        write_rows<S>(rows, value_to, p.grad_value.row, count, p.channels);
    }

    void multiply_assignment(index_t count, Rows<T> rows, bool add) {
        product<T>({d_assign, groups_row, 1}, gradient.data, gradient.row, rows.data, rows.row, count, channels_row,
                   p.groups, add);
    }

    void gather(index_t count, Rows<T> rows) {
        for (index_t token = 0; token < count; ++token) {
            const T* from = gradient[chosen[token]];
            for (index_t c = 0; c < channels_row; c += kLanes<T>)
                store(rows[token] + c, load(from + c) * inverse[chosen[token]]);
        }
    }
};

}  // namespace gvit::GVIT_LEVEL
