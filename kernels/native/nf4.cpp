// y = x . W^T + bias for a weight W in NF4; the contract is in kernels/nf4.py, the layout in kernels/nf4_tiles.py.
//
// Sixteen rows of W are a tile. Its codes are decoded as some rows of x are multiplied, which other units of a core do,
// and what comes out is kept for the other rows, some hundred columns at once. Sums are panel.h's: a row's results do
// not depend on the others of its batch, nor on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "exports.h"
#include "nf4.h"
#include "panel.h"
#include "vec.h"

namespace lorikeet {
namespace {

constexpr long PANEL = 5 * BLOCK;  // columns decoded at once at most: 20 KiB
constexpr long MAX_ALONE = 5;      // rows of x that need no panel
constexpr long MAX_FIRST = 4;      // rows that are multiplied while a panel is made,
constexpr long MIN_ROWS = 4;       // unless fewer than these would be left for a part of the others

#if defined(__AVX2__)

// The four bytes of each value apart: a byte shuffle looks up 32 codes in one of them, and three interleavings put the
// four results together.
class Decoder {
public:
    Decoder() {
        for (int byte = 0; byte < 4; byte++) {
            uint8_t plane[32];
            for (int i = 0; i < 32; i++) {
                std::memcpy(plane + i, reinterpret_cast<const char*>(NF4_VALUES + i % 16) + byte, 1);
            }
            planes_[byte] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane));
        }
    }

    // Values of two columns, each rows 0-7 and 8-15: columns 0 and 1 of the group, or with `second` 2 and 3.
    void pair(const uint8_t* group, bool second, Vec* out) const {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group));
        const __m256i codes = _mm256_and_si256(second ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
        const __m256i a = _mm256_shuffle_epi8(planes_[0], codes), b = _mm256_shuffle_epi8(planes_[1], codes);
        const __m256i c = _mm256_shuffle_epi8(planes_[2], codes), d = _mm256_shuffle_epi8(planes_[3], codes);
        const __m256i ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
        const __m256i cd_low = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
        out[0] = reinterpret_cast<Vec>(_mm256_unpacklo_epi16(ab_low, cd_low));
        out[1] = reinterpret_cast<Vec>(_mm256_unpackhi_epi16(ab_low, cd_low));
        out[2] = reinterpret_cast<Vec>(_mm256_unpacklo_epi16(ab_high, cd_high));
        out[3] = reinterpret_cast<Vec>(_mm256_unpackhi_epi16(ab_high, cd_high));
    }

private:
    __m256i planes_[4];
};

#else

class Decoder {
public:
    void pair(const uint8_t* group, bool second, Vec* out) const {
        for (long i = 0; i < 4; i++) {
            for (long lane = 0; lane < LANES; lane++) {
                const uint8_t byte = group[lane / 4 * 16 + i * 4 + lane % 4];
                out[i][lane] = NF4_VALUES[second ? byte >> 4 : byte & 15];
            }
        }
    }
};

#endif

// Adds to sums [R, 16] the products of columns [first, first + width). KEEP: the values also go to panel [width, 16].
template <long R, bool KEEP>
[[gnu::noinline]] void multiply_codes(
    const Decoder& decoder, const Input& rows, const NF4Weight& weight, long tile, long first, long width, float* panel,
    float* sums) {
    Vec total[R][2];
    for (long r = 0; r < R; r++) {
        for (long i = 0; i < 2; i++) total[r][i] = load(sums + r * TILE + i * LANES);
    }
    const uint8_t* codes = weight.codes_of(tile, first);
    const float* constants = weight.constants_of(tile, first);
    for (long block = first; block < first + width; block += BLOCK, constants += TILE) {
        const Vec factors[2] = {load(constants), load(constants + LANES)};
        for (long group = block; group < block + BLOCK; group += GROUP, codes += GROUP_BYTES) {
            for (int second = 0; second < 2; second++) {
                Vec values[4];
                decoder.pair(codes, second, values);
                for (long j = 0; j < 2; j++) {
                    const long k = group + 2 * second + j;
                    const Vec low = values[2 * j] * factors[0], high = values[2 * j + 1] * factors[1];
                    if constexpr (KEEP) {
                        store(panel + (k - first) * TILE, low);
                        store(panel + (k - first) * TILE + LANES, high);
                    }
                    for (long r = 0; r < R; r++) {
                        const Vec x = fill(rows.x[r * rows.stride + k]);
                        accumulate(total[r][0], x, low);
                        accumulate(total[r][1], x, high);
                    }
                }
            }
        }
    }
    for (long r = 0; r < R; r++) {
        for (long i = 0; i < 2; i++) store(sums + r * TILE + i * LANES, total[r][i]);
    }
}

// sums [count, 16] of `count` rows for one tile.
void multiply_tile(
    const Decoder& decoder, const Input& rows, long count, const NF4Weight& weight, long tile, float* sums) {
    std::fill(sums, sums + count * TILE, 0.0f);
    if (count <= MAX_ALONE) {
        with_rows<MAX_ALONE>(count, [&](auto r) {
            multiply_codes<r, false>(decoder, rows, weight, tile, 0, weight.columns, nullptr, sums);
        });
        return;
    }
    alignas(64) float panel[PANEL * TILE];
    const long parts = (count - MAX_FIRST + MAX_ROWS - 1) / MAX_ROWS;
    const long at_first = std::min(MAX_FIRST, count - parts * MIN_ROWS);
    const long blocks = weight.columns / BLOCK, chunks = (weight.columns + PANEL - 1) / PANEL;
    for (long chunk = 0; chunk < chunks; chunk++) {
        const long first = blocks * chunk / chunks * BLOCK, next = blocks * (chunk + 1) / chunks * BLOCK;
        with_rows<MAX_FIRST>(at_first, [&](auto r) {
            multiply_codes<r, true>(decoder, rows, weight, tile, first, next - first, panel, sums);
        });
        // What follows, be it of this tile or of the next.
        const uint8_t* codes = weight.codes_of(tile, next);
        const float* constants = weight.constants_of(tile, next);
        for (long i = 0; i < (next - first) / BLOCK; i++) __builtin_prefetch(constants + i * TILE);
        multiply_rows(
            rows.from(at_first, first), count - at_first, panel, next - first, sums + at_first * TILE,
            reinterpret_cast<const char*>(codes), TILE / 2);
    }
}

}  // namespace
}  // namespace lorikeet

LORIKEET_EXPORT void lorikeet_nf4_linear(
    const float* x, long x_stride, const uint8_t* codes, const float* constants, const float* bias, float* out,
    long num_rows, long out_features, long in_features, int threads) {
    using namespace lorikeet;
    static const Decoder decoder;
    const NF4Weight weight{codes, constants, in_features};
    const long tiles = (out_features + TILE - 1) / TILE;
    for (long first_row = 0; first_row < num_rows; first_row += ROW_BLOCK) {
        const long count = std::min(ROW_BLOCK, num_rows - first_row);
        const Input rows{x + first_row * x_stride, x_stride};
        // Decoding a code takes as long as multiplying it by some rows.
        const long piece = std::max(1L, PIECE / (TILE * in_features * (count + 3)));
        parallel_for(threads, tiles, piece, [&](long first, long end) {
            alignas(64) float sums[ROW_BLOCK * TILE];
            for (long tile = first; tile < end; tile++) {
                multiply_tile(decoder, rows, count, weight, tile, sums);
                const long column = tile * TILE;
                write_tile(
                    sums, count, bias == nullptr ? nullptr : bias + column, out + first_row * out_features + column,
                    out_features, std::min(TILE, out_features - column));
            }
        });
    }
}
