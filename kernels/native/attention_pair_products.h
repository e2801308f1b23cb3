// Products of a tile of queries with a tile of keys, and of the weights that these become with its values, by pairs of
// bfloat16. Queries are lanes; keys are read as they lie, and values as pairs of neighbouring positions.
#pragma once

#include "attention_chunk.h"
#include "attention_decode.h"
#include "attention_pairs.h"

namespace lorikeet {
namespace {

// Three vectors of queries by eight keys, or by eight elements of values: 24 sums in registers.
constexpr long QUERY_VECTORS = 3;
constexpr long AT_ONCE = 8;

typedef int32_t Positions __attribute__((vector_size(64)));

// Where the keys and values of a tile begin, up to CHUNK_KEYS as if the last one came again and again.
struct ChunkTile {
    long from, count;  // positions
    long offsets[CHUNK_KEYS];
};

// Entries of the tile that comes next, as many as are multiplied of this one, that are fetched; null: none.
struct ChunkAhead {
    const BF16 *keys, *values;
    const long* offsets;

    void fetch(long j, long head_dim) const {
        if (keys != nullptr) prefetch(keys + offsets[j], head_dim);
        if (values != nullptr) prefetch(values + offsets[j], head_dim);
    }
};

// scores [CHUNK_KEYS, N vectors] = factor * keys . queries, for a tile's keys rounded up to a multiple of eight. `q`:
// pairs [head_dim / 2, stride].
template <long N>
[[gnu::noinline]] void score_chunk(
    const uint32_t* q, long stride, const BF16* keys, const ChunkTile& tile, long head_dim, float factor, float* scores,
    const ChunkAhead& ahead) {
    for (long j = 0; j < tile.count; j += AT_ONCE) {
        const BF16* key[AT_ONCE];
        for (long i = 0; i < AT_ONCE; i++) key[i] = keys + tile.offsets[j + i];
        for (long i = 0; i < AT_ONCE; i++) ahead.fetch(j + i, head_dim);
        Wide total[AT_ONCE][N] = {};
        for (long d = 0; d < head_dim; d += 2) {
            Pairs query[N];
            for (long n = 0; n < N; n++) std::memcpy(&query[n], q + d / 2 * stride + n * WIDE_LANES, sizeof query[n]);
            for (long i = 0; i < AT_ONCE; i++) {
                Pairs pair;
                fill_pairs(key[i] + d, pair);
                for (long n = 0; n < N; n++) accumulate_pairs(total[i][n], pair, query[n]);
            }
        }
        for (long i = 0; i < AT_ONCE; i++) {
            for (long n = 0; n < N; n++) store_wide(scores + ((j + i) * N + n) * WIDE_LANES, total[i][n] * factor);
        }
    }
}

// sums [head_dim, stride] of N vectors = factors * sums + values . weights, pairs [depth, head_dim] and [depth, N
// vectors].
template <long N>
[[gnu::noinline]] void add_chunk(
    const uint32_t* values, const float* weights, long depth, const Wide* factors, float* sums, long stride,
    long head_dim) {
    for (long d = 0; d < head_dim; d += AT_ONCE) {
        Wide total[AT_ONCE][N];
        for (long i = 0; i < AT_ONCE; i++) {
            for (long n = 0; n < N; n++) {
                load_wide(sums + (d + i) * stride + n * WIDE_LANES, total[i][n]);
                total[i][n] *= factors[n];
            }
        }
        for (long j = 0; j < depth; j++) {
            Pairs weight[N];
            for (long n = 0; n < N; n++) std::memcpy(&weight[n], weights + (j * N + n) * WIDE_LANES, sizeof weight[n]);
            for (long i = 0; i < AT_ONCE; i++) {
                Pairs pair;
                fill_pairs(reinterpret_cast<const BF16*>(values + j * head_dim + d + i), pair);
                for (long n = 0; n < N; n++) accumulate_pairs(total[i][n], pair, weight[n]);
            }
        }
        for (long i = 0; i < AT_ONCE; i++) {
            for (long n = 0; n < N; n++) store_wide(sums + (d + i) * stride + n * WIDE_LANES, total[i][n]);
        }
    }
}

// Rows and columns of 16 x 16 change places. Each step swaps halves of two rows' blocks, which get smaller.
static inline void transpose_wide(Pairs x[WIDE_LANES]) {
    const auto step = [x](long distance, const auto& swap) {
#pragma GCC unroll 16
        for (long i = 0; i < WIDE_LANES; i++) {
            if ((i & distance) == 0) swap(x[i], x[i + distance]);
        }
    };
    step(8, [](Pairs& a, Pairs& b) {
        const Pairs low = a, high = b;
        a = LORIKEET_SHUFFLE_WIDE(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        b = LORIKEET_SHUFFLE_WIDE(low, high, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    });
    step(4, [](Pairs& a, Pairs& b) {
        const Pairs low = a, high = b;
        a = LORIKEET_SHUFFLE_WIDE(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        b = LORIKEET_SHUFFLE_WIDE(low, high, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    });
    step(2, [](Pairs& a, Pairs& b) {
        const Pairs low = a, high = b;
        a = LORIKEET_SHUFFLE_WIDE(low, high, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        b = LORIKEET_SHUFFLE_WIDE(low, high, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    });
    step(1, [](Pairs& a, Pairs& b) {
        const Pairs low = a, high = b;
        a = LORIKEET_SHUFFLE_WIDE(low, high, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        b = LORIKEET_SHUFFLE_WIDE(low, high, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    });
}

// Pairs of neighbouring positions' values, [count / 2, head_dim], the even elements of each 32 before the odd ones;
// past the tile's end they are zero. Returns whether all values are finite.
static inline bool pair_values(
    const BF16* values, const ChunkTile& tile, long head_dim, uint32_t* packed) {
    Wide zeros = Wide{};
    for (long j = 0; j < tile.count; j += 2) {
        for (long d = 0; d < head_dim; d += PAIRED, packed += PAIRED) {
            Pairs first, second = Pairs{};
            load_pairs(values + tile.offsets[j] + d, first);
            if (j + 1 < tile.count) load_pairs(values + tile.offsets[j + 1] + d, second);
            accumulate_pairs(zeros, first, Pairs{});
            accumulate_pairs(zeros, second, Pairs{});
            const Pairs even = (first & 0xFFFF) | (second << 16), odd = (first >> 16) | (second & 0xFFFF0000);
            std::memcpy(packed, &even, sizeof even);
            std::memcpy(packed + WIDE_LANES, &odd, sizeof odd);
        }
    }
    combine_lanes(zeros, [](Wide& sum, const Wide& value) { sum += value; });
    return zeros[0] == 0;
}

}  // namespace
}  // namespace lorikeet
