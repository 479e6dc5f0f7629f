// Counter-based noise: Philox4x32-10, and the Gumbel noise made of it.
//
// A number depends on (key, counter) alone, so a backward pass draws the forward's noise again instead of
// reading it, and every back end and launch shape draws the same.
// J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cmath>

#include "portability.cuh"

namespace gvit {

struct Philox4 {
    uint32_t word[4];
};

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

GVIT_HD uint32_t high_word(uint64_t value) { return static_cast<uint32_t>(value >> 32); }
GVIT_HD uint32_t low_word(uint64_t value) { return static_cast<uint32_t>(value); }

// Four words for one 128-bit counter, given as its lower and upper half.
GVIT_HD Philox4 philox4x32(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
    uint32_t key0 = low_word(key), key1 = high_word(key);
    Philox4 state{{low_word(counter_low), high_word(counter_low), low_word(counter_high), high_word(counter_high)}};
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * state.word[0];
        const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * state.word[2];
        state = {{high_word(product1) ^ state.word[1] ^ key0, low_word(product1),
                  high_word(product0) ^ state.word[3] ^ key1, low_word(product0)}};
        key0 += kPhiloxWeyl0;
        key1 += kPhiloxWeyl1;
    }
    return state;
}

// 24 bits of a word as a float32 strictly between 0 and 1: multiples of 2^-24, with 0 folded onto the least.
// (Adding half a step instead would need 25 bits, and round the largest value to 1.)
GVIT_HD float uniform_open(uint32_t word) {
    const uint32_t bits = word >> 8;
    return static_cast<float>(bits == 0 ? 1u : bits) * 0x1p-24f;
}

// Standard Gumbel noise, between -2.8 and 16.6.
GVIT_HD float gumbel(uint32_t word) { return -logf(-logf(uniform_open(word))); }

}  // namespace gvit
