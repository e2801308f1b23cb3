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

}  // namespace lorikeet
