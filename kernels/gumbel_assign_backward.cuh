// The gradients of gumbel_assign.
//
// With p the softmax, D[s] = grad_output[s] . output[s] - grad_count[s] (n[s] + eps) and n[s] the count,
//     da[l, s] = (grad_output[s] . value[l] - D[s]) / (n[s] + eps)
//     dz[l, s] = p (da - sum over s of p da) / tau
// sum_over_groups_kernel makes the gradients of key and value from these, sum_over_tokens_kernel those of query and
// bias. The logits are made again, with the same noise; nothing of size groups x tokens is stored.
#pragma once

#include "gumbel_assign.cuh"

namespace gvit {

// The workspace holds grad_output . output [samples, groups], then the token terms: the sums over s of p da [samples,
// tokens].
template <class T>
struct AssignGradient {
    static constexpr int kProducts = 2;
    static constexpr bool kTokenTerm = true;

    const AssignParams& p;
    index_t problems;
    int tokens, groups, channels, passes;
    bool shared_value;  // the values are the keys: one result, the sum of both gradients

    GVIT_DEVICE explicit AssignGradient(const AssignParams& params)
        : p(params),
          problems(params.samples),
          tokens(static_cast<int>(params.tokens)),
          groups(static_cast<int>(params.groups)),
          channels(static_cast<int>(params.channels)),
          passes(params.value.data == nullptr ? 1 : 2),
          shared_value(params.value.data == nullptr) {}

    GVIT_DEVICE PairSources<T, 2> sources(index_t sample) const {
        const AssignMatrices<T> from(p, sample);
        return {{from.key, from.value}, {from.query, from.grad_output}, shared_value};
    }

    GVIT_DEVICE float mass(index_t sample, int group) const {
        return static_cast<const float*>(p.count)[sample * groups + group] + static_cast<float>(p.eps);
    }
    GVIT_DEVICE float inverse_mass(index_t sample, int group) const { return 1.0f / mass(sample, group); }
    GVIT_DEVICE float output_term(index_t sample, int group) const {
        const float of_output = p.workspace[sample * groups + group];
        if (p.grad_count == nullptr) return of_output;
        return of_output - static_cast<const float*>(p.grad_count)[sample * groups + group] * mass(sample, group);
    }

    // values[0] becomes p, values[1] da of the formulas at the top.
    GVIT_DEVICE void to_softmax(PairValues (&values)[2], index_t sample, int token, int group) const {
        to_assignment<T>(values[0], p, sample, token, group);
        GVIT_UNROLL
        for (int n = 0; n < 4; ++n) {
            GVIT_UNROLL
            for (int j = 0; j < 2; ++j) {
                const int mine = group + pair_group(n, j);
                const float mean = mine < groups ? output_term(sample, mine) : 0.0f;
                const float inverse = mine < groups ? inverse_mass(sample, mine) : 0.0f;
                GVIT_UNROLL
                for (int i = j; i < 4; i += 2) values[1].value[n][i] = (values[1].value[n][i] - mean) * inverse;
            }
        }
    }

    // values[0] becomes the gradient of the product query . key, values[1] the weight of grad_output in the gradient of
    // the value.
    GVIT_DEVICE void to_weights(PairValues (&values)[2], const float (&term)[2], index_t sample, int group) const {
        const float factor = static_cast<float>(p.scale) / static_cast<float>(p.tau);
        GVIT_UNROLL
        for (int n = 0; n < 4; ++n) {
            GVIT_UNROLL
            for (int i = 0; i < 4; ++i) {
                const float soft = values[0].value[n][i];
                const int mine = group + pair_group(n, i);
                values[0].value[n][i] = factor * soft * (values[1].value[n][i] - term[i / 2]);
                values[1].value[n][i] = p.hard || mine >= groups ? 0.0f : soft * inverse_mass(sample, mine);
            }
        }
    }

    GVIT_DEVICE float* token_terms() const { return p.workspace + problems * groups; }
    GVIT_DEVICE void load_token_terms(float (&term)[2], index_t sample, int token) const {
        load_pair_rows(term, token_terms() + sample * tokens, token, tokens);
    }
    GVIT_DEVICE void put_token_term(index_t sample, int token, float term) const {
        token_terms()[sample * tokens + token] = term;
    }

    // The gradient of the keys, then that of the values.
    GVIT_DEVICE TokenPass pass(int number) const {
        const bool value = number == 1 || shared_value;
        return {{number == 0, value && !p.hard}, value && p.hard};
    }
    GVIT_DEVICE Rows<T> result(int number, index_t sample) const {
        return rows_of<T>(number == 0 ? p.grad_key : p.grad_value, sample, 0, tokens, channels);
    }
    // With hard assignment a value's gradient is the winner's grad_output / (n + eps).
    template <int kBlocks>
    GVIT_DEVICE void gather(Accumulator<kBlocks>& sum, index_t sample, int first_row, int first_column) const {
        const Rows<const T> from = AssignMatrices<T>(p, sample).grad_output;
        GVIT_UNROLL
        for (int i = 0; i < 4; i += 2) {
            const int token = first_row + fragment_row(i);
            if (token >= tokens) continue;
            const int winner = static_cast<int>(p.index[sample * tokens + token]);
            const float factor = inverse_mass(sample, winner);
            GVIT_UNROLL
            for (int n = 0; n < kBlocks; ++n) {
                GVIT_UNROLL
                for (int j = 0; j < 2; ++j) {
                    const int column = first_column + fragment_column(n, j);
                    if (column < channels) sum.value[n][i + j] += factor * to_float(from.row(winner)[column]);
                }
            }
        }
    }

    GVIT_DEVICE Rows<const T> token_rows(index_t sample) const { return AssignMatrices<T>(p, sample).key; }
    GVIT_DEVICE Rows<T> group_result(index_t sample) const {
        return rows_of<T>(p.grad_query, sample, 0, groups, channels);
    }
    GVIT_DEVICE float finish_group(index_t sample, int group, float total, bool writes) const {
        T* const biases = static_cast<T*>(p.grad_bias) + sample * groups;
        if (writes && p.grad_bias != nullptr) biases[group] = from_float<T>(total);
        return 1.0f;
    }
};

}  // namespace gvit
