// The hard choice of gumbel_assign for processors that multiply pairs of bfloat16 twice as fast as float32. Included
// once, at level avx512_bfloat.
//
// A hard assignment wants the largest logit of a token, not the logits. Queries q and keys k are rounded to bfloat16,
// q' and k', and multiplied; by the inequality of Cauchy and Schwarz
//   |q.k - q'.k'| <= |q - q'| |k| + |q'| |k - k'|
// whose norms take one pass over the rows. Where that leaves one group of a token in question, it is the one that
// the float32 logits choose. Where it leaves several, their float32 logits are made, each summed as `multiply` sums
// it; the other groups cannot win, with whatever logits in their bounds. So index and output are those of the plain
// kernel to the bit. Tokens with anything not finite have all groups in question.

namespace gvit::GVIT_LEVEL {

struct Pair {
    index_t token, group;
};

// Upper bounds of the norm of a row and of the norm of what rounding to bfloat16 takes from it.
struct RowNorms {
    float whole, rest;
};

template <class S>
class AssignFilter : public AssignForward<S> {
    using Base = AssignForward<S>;
    using Base::p, Base::groups_row, Base::channels_row, Base::logits, Base::memory, Base::tile, Base::chosen;
    static constexpr int lanes = kLanes<float>;

    const index_t pairs = channels_row / 2, pairs_row = padded<BfloatPair>(pairs);
    BfloatPair* const query_pairs = memory.template take<BfloatPair>(p.groups * pairs_row);
    BfloatPair* const query_pairs_t = memory.template take<BfloatPair>(pairs_row * groups_row);
    BfloatPair* const key_pairs = memory.template take<BfloatPair>(tile * pairs_row);
    float* const query_whole = memory.template take<float>(groups_row);
    float* const query_rest = memory.template take<float>(groups_row);
    float* const upper = memory.template take<float>(groups_row);
    std::vector<RowNorms> key_norms = std::vector<RowNorms>(tile);
    std::vector<index_t> open;    // tokens with several groups in question
    std::vector<Pair> questions;  // each of them with each of these groups
    const float factor = static_cast<float>(std::abs(p.scale) / p.tau);
    const float largest_noise = static_cast<float>(17 / p.tau);
    float largest_query = 0, bias_sum = 0;
    bool worthwhile = true, transposed = false;

  public:
    explicit AssignFilter(const AssignParams& params) : Base(params) {
        std::memset(query_pairs, 0, p.groups * pairs_row * sizeof(BfloatPair));
        std::memset(query_whole, 0, groups_row * sizeof(float));
        std::memset(query_rest, 0, groups_row * sizeof(float));
    }

    // Whether the product saves more than rounding costs.
    static bool serves(const AssignParams& p) {
        const bool stored = p.storage == Storage::float32 || p.storage == Storage::bfloat16;
        return stored && p.hard && p.groups >= 32 && p.tokens >= 32 && !by_rows<float>(p.tokens, p.groups, p.channels);
    }

  protected:
    void start(index_t sample, Rows<float> query) override {
        this->start_sample(sample, query);
        transposed = false;
        largest_query = bias_sum = 0;
        for (index_t s = 0; s < p.groups; ++s) {
            const RowNorms norms = round_row(query[s], query_pairs + s * pairs_row);
            query_whole[s] = norms.whole + norms.rest;
            query_rest[s] = norms.rest;
            // Never back from infinity, which a NaN counts as.
            const bool bounded = query_whole[s] < std::numeric_limits<float>::infinity();
            largest_query = larger(largest_query, bounded ? query_whole[s] : std::numeric_limits<float>::infinity());
            bias_sum += std::abs(this->bias[s]);
        }
        transpose_rows<BfloatPair>({query_pairs, pairs_row}, p.groups, pairs, query_pairs_t, groups_row);
    }

    void choose_tokens(index_t sample, index_t first, index_t count) override {
        this->load_keys(sample, first, count);
        questions.clear();
        open.clear();
        if (worthwhile) settle_tokens(count);
        worthwhile &= static_cast<index_t>(questions.size()) <= 4 * count;
        if (worthwhile) return answer();
        if (!transposed) this->transpose_query();
        transposed = true;
        this->multiply(this->keys, this->query, this->query_t, count, logits);
        this->choose_all_exactly(count);
    }

  private:
    RowNorms round_row(const float* from, BfloatPair* to) const {
        Vector<float> whole{}, rest{};
        for (index_t c = 0; c < channels_row; c += lanes) {
            const Vector<float> value = load(from + c);
            const auto rounded = reinterpret<__m256i>(_mm512_cvtneps_pbh(reinterpret<__m512>(value)));
            __builtin_memcpy(to + c / 2, &rounded, sizeof rounded);
            const auto halves = reinterpret<Vector<uint32_t>>(_mm512_maskz_cvtepu16_epi32(0xFFFF, rounded));
            const auto back = reinterpret<Vector<float>>(halves << 16);
            const Vector<float> lost = value - back;
            whole += value * value;
            rest += lost * lost;
        }
        return {norm_bound(whole), norm_bound(rest)};
    }

    // With room for the rounding of the sum, and for squares too small for a float.
    float norm_bound(Vector<float> squares) const {
        return std::sqrt(sum_lanes<float>(squares)) * (1 + channels_row * 0x1p-23f) + 0x1p-40f;
    }

    void settle_tokens(index_t count) {
        for (index_t token = 0; token < count; ++token)
            key_norms[token] = round_row(this->keys[token], key_pairs + token * pairs_row);
        product<BfloatPair>({key_pairs, pairs_row, 1}, query_pairs_t, groups_row, logits, groups_row, count, groups_row,
                            pairs, false);
        for (index_t token = 0; token < count; ++token)
            if (!settle(token)) open.push_back(token);
    }

    // Chooses the group of a token if a single one is in question, else adds to the questions.
    bool settle(index_t token) {
        const RowNorms key = key_norms[token];
        // 2^-19 of what a logit may be: what the roundings of float32 may take, of either logit and of the bounds.
        const float largest = (largest_query * key.whole + bias_sum) * factor + largest_noise;
        if (!(largest < 0x1p100f && key.whole < 0x1p50f && largest_query < 0x1p50f)) {
            for (index_t s = 0; s < p.groups; ++s) questions.push_back({token, s});
            return false;
        }
        const float margin = 0x1p-19f * largest;
        // The sums of float32 and of bfloat16 are each off by at most `channels` roundings.
        const float strength = factor * (1 + 0x1p-18f);
        const float of_whole = strength * (key.rest + channels_row * 0x1p-22f * key.whole);
        const float of_rest = strength * key.whole;
        Vector<float> surely = fill(-std::numeric_limits<float>::infinity());
        for (index_t s = 0; s < groups_row; s += lanes) {
            const Vector<float> error = load(query_whole + s) * of_whole + load(query_rest + s) * of_rest + margin;
            const Vector<float> z = this->tempered(token, s);
            store(upper + s, z + error);
            surely = larger_of(z - error, surely);
        }
        const float least = largest_lane<float>(surely);
        const auto before = questions.size();
        for (index_t first = 0; first < groups_row; first += 4 * lanes) {
            uint64_t mask = 0;
            for (index_t s = first; s < smaller(first + 4 * lanes, groups_row); s += lanes)
                mask |= static_cast<uint64_t>(_mm512_cmp_ps_mask(load(upper + s), fill(least), _CMP_GE_OQ))
                        << (s - first);
            for (; mask != 0; mask &= mask - 1) questions.push_back({token, first + __builtin_ctzll(mask)});
        }
        if (questions.size() > before + 1) return false;
        chosen[token] = questions.back().group;
        questions.pop_back();
        return true;
    }

    void answer() {
        const auto count = static_cast<index_t>(questions.size());
        for (index_t i = 0; i < count; i += lanes)
            multiply_pairs(questions.data() + i, smaller<index_t>(lanes, count - i));
        for (const index_t token : open) this->choose_exactly(token);
    }

    // A pair in each lane, so that its sum is made of one product after the other.
    void multiply_pairs(const Pair* pair, index_t count) {
        const float *left[lanes], *right[lanes];
        for (index_t i = 0; i < lanes; ++i) {
            const Pair& one = pair[smaller(i, count - 1)];
            left[i] = this->keys[one.token];
            right[i] = this->query[one.group];
        }
        Vector<float> sum{};
        for (index_t c = 0; c < channels_row; c += lanes) {
            Vector<float> a[lanes], b[lanes];
            for (int i = 0; i < lanes; ++i) a[i] = load(left[i] + c);
            for (int i = 0; i < lanes; ++i) b[i] = load(right[i] + c);
            transpose_square<float>(a);
            transpose_square<float>(b);
            for (int i = 0; i < lanes; ++i) sum += a[i] * b[i];
        }
        for (index_t i = 0; i < count; ++i) logits[pair[i].token * groups_row + pair[i].group] = sum[i];
    }
};

}  // namespace gvit::GVIT_LEVEL
