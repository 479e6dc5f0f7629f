// The Gumbel noise of a tile of logits, many Philox calls at once. Included once per level.

namespace gvit::GVIT_LEVEL {

// The 64-bit products of the lower halves of the lanes; what is in their upper halves does not matter.
GVIT_INLINE Vector<uint64_t> multiply_low_words(Vector<uint64_t> a, uint32_t b) {
#if defined(__x86_64__) && GVIT_VECTOR_BYTES == 64
    // The masked form with a full mask: GCC warns of an uninitialised operand inside the plain one.
    return reinterpret<Vector<uint64_t>>(_mm512_maskz_mul_epu32(0xFF, reinterpret<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__x86_64__) && GVIT_VECTOR_BYTES == 32
    return reinterpret<Vector<uint64_t>>(_mm256_mul_epu32(reinterpret<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__x86_64__)
    return reinterpret<Vector<uint64_t>>(_mm_mul_epu32(reinterpret<__m128i>(a), _mm_set1_epi64x(b)));
#else
    return (a & 0xFFFFFFFFull) * static_cast<uint64_t>(b);
#endif
}

constexpr int kCalls = 64;  // Philox calls taken together, each step as a loop of its own so that they overlap

// The keys of all rounds, zero-extended.
struct KeySchedule {
    uint64_t first[kPhiloxRounds], second[kPhiloxRounds];

    explicit KeySchedule(uint64_t key) {
        for (int round = 0; round < kPhiloxRounds; ++round) {
            first[round] = low_word(low_word(key) + round * static_cast<uint64_t>(kPhiloxWeyl0));
            second[round] = low_word(high_word(key) + round * static_cast<uint64_t>(kPhiloxWeyl1));
        }
    }
};

// kLanes<uint64_t> calls of philox4x32 (kernels/philox.cuh), `step` apart, one a lane, to word[0..3][first ..].
// The words live in the lower halves of the lanes, so that a product needs no masking.
GVIT_INLINE void draw_words(const KeySchedule& keys, uint64_t offset, uint64_t call, uint64_t step,
                            uint32_t (*word)[kCalls], int first) {
    using Words = Vector<uint64_t>;
    Words c0 = reinterpret<Words>(lane_numbers<uint64_t>()) * step + call;
    Words c1 = c0 >> 32, c2 = fill<uint64_t>(offset), c3 = fill<uint64_t>(offset >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const Words product0 = multiply_low_words(c0, kPhiloxMultiplier0);
        const Words product1 = multiply_low_words(c2, kPhiloxMultiplier1);
        c0 = (product1 >> 32) ^ c1 ^ keys.first[round];
        c1 = product1;
        c2 = (product0 >> 32) ^ c3 ^ keys.second[round];
        c3 = product0;
    }
    const Words words[4] = {c0, c1, c2, c3};
    typedef uint32_t Narrow __attribute__((vector_size(GVIT_VECTOR_BYTES / 2)));
    for (int j = 0; j < 4; ++j) {
        const Narrow narrow = __builtin_convertvector(words[j], Narrow);
        __builtin_memcpy(&word[j][first], &narrow, sizeof narrow);
    }
}

// kernels/philox.cuh: gumbel, on vectors.
GVIT_INLINE Vector<float> gumbel_of_words(const uint32_t* word) {
    const Vector<int32_t> bits = reinterpret<Vector<int32_t>>(load(word) >> 8);
    const Vector<int32_t> positive = bits == 0 ? fill(1) : bits;
    const Vector<float> uniform = __builtin_convertvector(positive, Vector<float>) * 0x1p-24f;
    return -logarithm(-logarithm(uniform));
}

// The noise of one token, whose first Philox call is `call`: the calls of its groups go side by side. Where tokens
// are few, the calls of consecutive tokens would leave most lanes idle.
inline void draw_noise_of_token(const KeySchedule& keys, uint64_t offset, uint64_t call, index_t all_tokens,
                                index_t quads, float* out) {
    constexpr int lanes = kLanes<float>;
    alignas(64) uint32_t word[4][kCalls];
    alignas(64) float noise[lanes];
    for (index_t quad = 0; quad < quads; quad += lanes) {
        const int count = static_cast<int>(smaller<index_t>(lanes, quads - quad));
        for (int i = 0; i < count; i += kLanes<uint64_t>)
            draw_words(keys, offset, call + (quad + i) * all_tokens, all_tokens, word, i);
        for (int j = 0; j < 4; ++j) {
            store(noise, gumbel_of_words(word[j]));
            for (int i = 0; i < count; ++i) out[4 * (quad + i) + j] = noise[i];
        }
    }
}

// Writes the noise of tokens first_token .. + tokens of a sample to out[token][group]; a row of out holds whole
// vectors, of which only the lanes of real groups mean anything.
inline void draw_noise(uint64_t key, uint64_t offset, index_t sample, index_t groups, index_t all_tokens,
                       index_t first_token, index_t tokens, float* out, index_t out_row) {
    constexpr int lanes = kLanes<float>;
    const KeySchedule keys(key);
    const index_t quads = ceil_div<index_t>(groups, 4);
    constexpr index_t kFew = 4;
    if (tokens <= kFew) {
        for (index_t t = 0; t < tokens; ++t)
            draw_noise_of_token(keys, offset, sample * quads * all_tokens + first_token + t, all_tokens, quads,
                                out + t * out_row);
        return;
    }
    alignas(64) uint32_t word[4][kCalls];
    alignas(64) float noise[lanes][kCalls] = {};
    for (index_t group = 0; group < groups; group += lanes) {
        for (index_t token = 0; token < tokens; token += kCalls) {
            const index_t count = smaller<index_t>(kCalls, tokens - token);
            const int whole = static_cast<int>(round_up<index_t>(count, 16));
            for (index_t quad = group / 4; quad < smaller(quads, (group + lanes) / 4); ++quad) {
                const uint64_t call = (sample * quads + quad) * all_tokens + first_token + token;
                float (*rows)[kCalls] = noise + (4 * quad - group);
                for (int i = 0; i < whole; i += kLanes<uint64_t>) draw_words(keys, offset, call + i, 1, word, i);
                for (int j = 0; j < smaller<index_t>(4, groups - 4 * quad); ++j)
                    for (int i = 0; i < whole; i += lanes) store(&rows[j][i], gumbel_of_words(&word[j][i]));
            }
            for (index_t i = 0; i < count; i += lanes) {
                Vector<float> square[lanes];
                for (int j = 0; j < lanes; ++j) square[j] = load(&noise[j][i]);
                transpose_square<float>(square);
                for (int j = 0; j < lanes && i + j < count; ++j)
                    store(out + (token + i + j) * out_row + group, square[j]);
            }
        }
    }
}

}  // namespace gvit::GVIT_LEVEL
