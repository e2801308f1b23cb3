// Products of pairs of bfloat16 in sixteen fp32 lanes, which processors with AVX512-BF16 have an instruction for. Other
// libraries compute the same in simple code: nothing but tests runs it, so that each CPU can test what calls it.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace lorikeet {

constexpr long WIDE_LANES = 16;

typedef float Wide __attribute__((vector_size(64)));
// Two neighbouring columns a lane, the first in the low half.
typedef uint32_t Pairs __attribute__((vector_size(64)));

// The lanes of a (0 to 15) and b (16 to 31) that the numbers name.
#if defined(__clang__)
#define LORIKEET_SHUFFLE_WIDE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LORIKEET_SHUFFLE_WIDE(a, b, ...) __builtin_shuffle(a, b, Pairs{__VA_ARGS__})
#endif

static inline void load_pairs(const BF16* from, Pairs& to) { std::memcpy(&to, from, sizeof to); }

// The first `columns` of them, below 32; zeros after that.
static inline void load_some_pairs(const BF16* from, long columns, Pairs& to) {
#if defined(__AVX512BW__)
    to = reinterpret_cast<Pairs>(_mm512_maskz_loadu_epi16((1u << columns) - 1, from));
#else
    to = Pairs{};
    std::memcpy(&to, from, static_cast<size_t>(columns) * sizeof(BF16));
#endif
}

// One pair in all lanes.
static inline void fill_pairs(const BF16* from, Pairs& to) {
    uint32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    to = Pairs{pair, pair, pair, pair, pair, pair, pair, pair, pair, pair, pair, pair, pair, pair, pair, pair};
}

// total += the products of the second columns, then those of the first, each addition rounded once. As the instruction
// does, but for what is denormal, which that takes and leaves as zero.
static inline void accumulate_pairs(Wide& total, const Pairs& a, const Pairs& b) {
#if defined(__AVX512BF16__)
    total = reinterpret_cast<Wide>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(total), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#else
    for (long i = 0; i < WIDE_LANES; i++) {
        for (const uint32_t kept : {0xFFFF0000u, 0xFFFFu}) {
            const BF16 x{static_cast<uint16_t>((a[i] & kept) >> (kept == 0xFFFFu ? 0 : 16))};
            const BF16 y{static_cast<uint16_t>((b[i] & kept) >> (kept == 0xFFFFu ? 0 : 16))};
            total[i] = __builtin_fmaf(to_float(x), to_float(y), total[i]);
        }
    }
#endif
}

// Sixteen values, rounded as `put` does; of the first `count` of them.
static inline void store_wide(BF16* to, const Wide& value, long count) {
    typedef uint16_t WideHalves __attribute__((vector_size(32)));
    const Pairs bits = reinterpret_cast<Pairs>(value), is_nan = reinterpret_cast<Pairs>(value != value);
    const Pairs rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const WideHalves halves = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7FC0), WideHalves);
    std::memcpy(to, &halves, count == WIDE_LANES ? sizeof halves : static_cast<size_t>(count) * sizeof(BF16));
}

// Looks up 4-bit codes in a table of bfloat16.
class PairDecoder {
public:
    explicit PairDecoder(const float* values) {
        for (long i = 0; i < 32; i++) put(table_ + i, values[i % 16]);
    }

    // Of 32 bytes: `low` has the values of their low halves, `high` those of the high ones.
    void decode(const uint8_t* bytes, Pairs& low, Pairs& high) const {
#if defined(__AVX512BW__)
        // Of an index only the low five bits count, and the table is there twice: low halves need no masking.
        const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
        const __m512i table = _mm512_loadu_si512(table_);
        low = reinterpret_cast<Pairs>(_mm512_permutexvar_epi16(codes, table));
        high = reinterpret_cast<Pairs>(_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table));
#else
        for (long i = 0; i < WIDE_LANES; i++) {
            const uint8_t first = bytes[2 * i], second = bytes[2 * i + 1];
            low[i] = table_[first & 15].bits | static_cast<uint32_t>(table_[second & 15].bits) << 16;
            high[i] = table_[first >> 4].bits | static_cast<uint32_t>(table_[second >> 4].bits) << 16;
        }
#endif
    }

private:
    alignas(64) BF16 table_[32];
};

// pairs -> their first and second columns in fp32.
static inline void widen_pairs(const Pairs& pairs, Wide& first, Wide& second) {
    first = reinterpret_cast<Wide>(pairs << 16);
    second = reinterpret_cast<Wide>(pairs & 0xFFFF0000u);
}

// The inverse: rounds to nearest even; a NaN stays one. What is denormal the instruction leaves as zero, other code not.
static inline void round_pairs(const Wide& first, const Wide& second, Pairs& pairs) {
#if defined(__AVX512BF16__)
    // One after the other, then in turns.
    const __m512bh apart = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
    const Pairs order = {0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                         0x180008, 0x190009, 0x1A000A, 0x1B000B, 0x1C000C, 0x1D000D, 0x1E000E, 0x1F000F};
    pairs = reinterpret_cast<Pairs>(
        _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(order), reinterpret_cast<__m512i>(apart)));
#else
    BF16 values[2 * WIDE_LANES];
    for (long i = 0; i < WIDE_LANES; i++) {
        put(values + 2 * i, first[i]);
        put(values + 2 * i + 1, second[i]);
    }
    std::memcpy(&pairs, values, sizeof pairs);
#endif
}

static inline void store_pairs(BF16* to, const Pairs& pairs) { std::memcpy(to, &pairs, sizeof pairs); }

// The first `columns` of them, below 32; nothing after that.
static inline void store_some_pairs(BF16* to, long columns, const Pairs& pairs) {
#if defined(__AVX512BW__)
    _mm512_mask_storeu_epi16(to, (1u << columns) - 1, reinterpret_cast<__m512i>(pairs));
#else
    std::memcpy(to, &pairs, static_cast<size_t>(columns) * sizeof(BF16));
#endif
}

// total += a * b, rounded once where the instruction set can. Named for the reason that vec.h's `accumulate` has.
static inline void accumulate(Wide& total, const Wide& a, float b) {
#if defined(__AVX512F__)
    Wide sum = total;
    const Wide factor = reinterpret_cast<Wide>(_mm512_set1_ps(b));
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(factor));
    total = sum;
#else
    total += a * b;
#endif
}

// The sum of each vector's lanes. Each step adds one half of what each vector still has to the other half, and puts
// what is left of two vectors into one.
static inline void add_lanes(const Wide* total, Wide& sums) {
    // Where the steps below put what they are given.
    constexpr long ORDER[WIDE_LANES] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
    Wide left[8];
#pragma GCC unroll 8
    for (long i = 0; i < 8; i++) {
        const Wide &a = total[ORDER[i]], &b = total[ORDER[i + 8]];
        left[i] = LORIKEET_SHUFFLE_WIDE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                  LORIKEET_SHUFFLE_WIDE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
#pragma GCC unroll 8
    for (long i = 0; i < 4; i++) {
        const Wide a = left[i], b = left[i + 4];
        left[i] = LORIKEET_SHUFFLE_WIDE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                  LORIKEET_SHUFFLE_WIDE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
#pragma GCC unroll 8
    for (long i = 0; i < 2; i++) {
        const Wide a = left[i], b = left[i + 2];
        left[i] = LORIKEET_SHUFFLE_WIDE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                  LORIKEET_SHUFFLE_WIDE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    const Wide a = left[0], b = left[1];
    sums = LORIKEET_SHUFFLE_WIDE(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           LORIKEET_SHUFFLE_WIDE(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}

}  // namespace lorikeet
