// What the two ways of paged attention in bfloat16 share where products are of pairs (pairs.h): sixteen lanes.
//
// 32 neighbouring elements of a head are one vector of pairs. As fp32 they are two, the even elements and the odd ones,
// and sums of weighted values stay in that order until they are stored.
#pragma once

#include "attention.h"
#include "pairs.h"

namespace lorikeet {
namespace {

// Elements of a head that are read at once; its width is a multiple.
constexpr long PAIRED = 2 * WIDE_LANES;

#if defined(__AVX512F__)
// GCC 12 warns of what its own header says for instructions without a mask.
constexpr __mmask16 ALL_LANES = 0xFFFF;
#endif

static inline void load_wide(const float* from, Wide& to) { std::memcpy(&to, from, sizeof to); }

static inline void store_wide(float* to, const Wide& value) { std::memcpy(to, &value, sizeof value); }

static inline void fill_wide(float x, Wide& to) { to = Wide{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

static inline void keep_larger(Wide& largest, const Wide& value) {
#if defined(__AVX512F__)
    largest = reinterpret_cast<Wide>(
        _mm512_maskz_max_ps(ALL_LANES, reinterpret_cast<__m512>(value), reinterpret_cast<__m512>(largest)));
#else
    largest = value > largest ? value : largest;
#endif
}

// Puts what `combine` makes of all lanes into each of them.
template <class Combine>
static inline void combine_lanes(Wide& value, const Combine& combine) {
    const Wide a = value;
    combine(value, LORIKEET_SHUFFLE_WIDE(a, a, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    const Wide b = value;
    combine(value, LORIKEET_SHUFFLE_WIDE(b, b, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    const Wide c = value;
    combine(value, LORIKEET_SHUFFLE_WIDE(c, c, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    const Wide d = value;
    combine(value, LORIKEET_SHUFFLE_WIDE(d, d, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
}

// Calls run(Vec&) for both halves: what is too rare to have sixteen lanes of its own.
template <class Run>
static inline void by_halves(Wide& value, const Run& run) {
    Vec halves[2];
    std::memcpy(halves, &value, sizeof value);
    for (Vec& half : halves) run(half);
    std::memcpy(&value, halves, sizeof value);
}

// e^x for the differences of scores and their peak, none above 0; NaN stays NaN. Its relative error is below 2e-7, and
// 2e-8 times x more.
static inline void exp_wide(Wide& x) {
#if defined(__AVX512F__)
    constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    // Of a NaN and a number the instruction returns the second.
    x = reinterpret_cast<Wide>(_mm512_maskz_max_ps(ALL_LANES, _mm512_set1_ps(-104.0f), reinterpret_cast<__m512>(x)));
    const __m512 exponent = reinterpret_cast<__m512>(x * 1.44269504088896341f);
    const __m512 whole = _mm512_maskz_roundscale_ps(ALL_LANES, exponent, NEAREST);
    const Wide r = x * 1.44269504088896341f - reinterpret_cast<Wide>(whole);
    // 2^r for |r| <= 1/2, exact at 0; fitted to the least relative error.
    Wide p = r * 1.326472731e-3f + 9.671512991e-3f;
    p = p * r + 5.550733581e-2f;
    p = p * r + 2.402224243e-1f;
    p = p * r + 6.931470037e-1f;
    p = p * r + 1.0f;
    x = reinterpret_cast<Wide>(_mm512_maskz_scalef_ps(ALL_LANES, reinterpret_cast<__m512>(p), whole));
#else
    by_halves(x, [](Vec& half) { half = exp(half); });
#endif
}

static inline void cap_wide(Wide& score, float softcap) {
    by_halves(score, [softcap](Vec& half) { half = tanh(half / softcap) * softcap; });
}

// One head's result: sums of weighted values, the even elements before the odd ones, over the total of the weights.
static inline void store_pair_result(BF16* to, const float* sums, long head_dim, float total) {
    const float factor = 1.0f / total;
    for (long d = 0; d < head_dim; d += PAIRED) {
        Wide even, odd;
        load_wide(sums + d, even);
        load_wide(sums + d + WIDE_LANES, odd);
        Pairs pairs;
        round_pairs(even * factor, odd * factor, pairs);
        store_pairs(to + d, pairs);
    }
}

struct PairStep : Step<BF16> {
    // The results of one row and KV head: sums [group, head_dim] over the totals of their weights.
    void store_results(long row, long kv_head, const float* sums, const Softmax* softmax) const {
        BF16* to = out + (row * num_heads + kv_head * group()) * head_dim;
        for (long head = 0; head < group(); head++, to += head_dim, sums += head_dim) {
            store_pair_result(to, sums, head_dim, softmax[head].total);
        }
    }
};

}  // namespace
}  // namespace lorikeet
