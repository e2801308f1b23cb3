// y = x . W^T + bias for a weight W in NF4; the contract is in kernels/nf4.py, the layout in kernels/nf4_tiles.py.
//
// Sixteen rows of W, a tile, are the lanes of two vectors, and x is broadcast. For more rows of x than a tile's codes
// can be decoded for on the fly, a panel of some hundred columns is decoded into the first-level cache and multiplied
// from there. Each output is one sum, from the first column to the last, whatever the number of rows: a row's results
// do not depend on the others of its batch, nor on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "vec.h"

namespace lorikeet {
namespace {

constexpr long TILE = 2 * LANES;  // rows of W
constexpr long BLOCK = 64;        // columns that share a constant
constexpr long GROUP = 4;         // columns whose codes are 32 bytes
constexpr long GROUP_BYTES = TILE * GROUP / 2;
constexpr long PANEL = 5 * BLOCK;  // columns decoded at once at most: 20 KiB
constexpr long MAX_FUSED = 3;      // rows of x that are multiplied while codes are decoded
constexpr long MAX_ROWS = 6;       // of x in registers: 12 sums
constexpr long ROW_BLOCK = 128;    // rows of x that share a decoded panel
constexpr long PIECE = 1 << 20;    // multiplications: some 20 us

// QLoRA's (arXiv 2305.14314, appendix E), as bitsandbytes 0.50.2 has them.
constexpr float VALUES[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f};

#if defined(__AVX2__)

// The four bytes of each value apart: a byte shuffle looks up 32 codes in one of them, and three interleavings put the
// four results together.
class Decoder {
public:
    Decoder() {
        for (int byte = 0; byte < 4; byte++) {
            uint8_t plane[32];
            for (int i = 0; i < 32; i++) {
                std::memcpy(plane + i, reinterpret_cast<const char*>(VALUES + i % 16) + byte, 1);
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
                out[i][lane] = VALUES[second ? byte >> 4 : byte & 15];
            }
        }
    }
};

#endif

struct Weight {
    const uint8_t* codes;    // [tiles, columns / 4, 32]
    const float* constants;  // [tiles, columns / 64, 16]
    long columns;

    const uint8_t* codes_of(long tile, long column) const {
        return codes + (tile * columns + column) / GROUP * GROUP_BYTES;
    }
    const float* constants_of(long tile, long column) const {
        return constants + (tile * columns + column) / BLOCK * TILE;
    }
};

struct Rows {
    const float* x;
    long stride;
};

// Sums of R rows for one tile.
template <long R>
struct Sums {
    Vec of[R][2];

    void load_from(const float* from) {
        for (long r = 0; r < R; r++) {
            for (long i = 0; i < 2; i++) of[r][i] = load(from + r * TILE + i * LANES);
        }
    }
    void store_to(float* to) const {
        for (long r = 0; r < R; r++) {
            for (long i = 0; i < 2; i++) store(to + r * TILE + i * LANES, of[r][i]);
        }
    }
};

// Decodes columns [0, width) into panel [width, 16].
void decode_panel(const Decoder& decoder, const uint8_t* codes, const float* constants, long width, float* panel) {
    for (long block = 0; block < width; block += BLOCK, constants += TILE) {
        const Vec low = load(constants), high = load(constants + LANES);
        for (long group = 0; group < BLOCK / GROUP; group++, codes += GROUP_BYTES, panel += GROUP * TILE) {
            for (int second = 0; second < 2; second++) {
                Vec values[4];
                decoder.pair(codes, second, values);
                float* to = panel + second * 2 * TILE;
                store(to, values[0] * low);
                store(to + LANES, values[1] * high);
                store(to + TILE, values[2] * low);
                store(to + TILE + LANES, values[3] * high);
            }
        }
    }
}

template <long R>
void multiply_panel(const Rows& rows, const float* panel, long width, bool is_first, float* sums) {
    Sums<R> total{};
    if (!is_first) total.load_from(sums);
    for (long k = 0; k < width; k++) {
        const Vec low = load(panel + k * TILE), high = load(panel + k * TILE + LANES);
        for (long r = 0; r < R; r++) {
            const Vec x = fill(rows.x[r * rows.stride + k]);
            total.of[r][0] += x * low;
            total.of[r][1] += x * high;
        }
    }
    total.store_to(sums);
}

template <long R>
void multiply_fused(const Decoder& decoder, const Rows& rows, const Weight& weight, long tile, float* sums) {
    Sums<R> total{};
    const uint8_t* codes = weight.codes_of(tile, 0);
    const float* constants = weight.constants_of(tile, 0);
    for (long block = 0; block < weight.columns; block += BLOCK, constants += TILE) {
        const Vec factors[2] = {load(constants), load(constants + LANES)};
        for (long k = block; k < block + BLOCK; k += GROUP, codes += GROUP_BYTES) {
            for (int second = 0; second < 2; second++) {
                Vec values[4];
                decoder.pair(codes, second, values);
                for (long column = 0; column < 2; column++) {
                    for (long r = 0; r < R; r++) {
                        const Vec x = fill(rows.x[r * rows.stride + k + 2 * second + column]);
                        for (long i = 0; i < 2; i++) total.of[r][i] += x * (values[2 * column + i] * factors[i]);
                    }
                }
            }
        }
    }
    total.store_to(sums);
}

// Calls body(R) with a number of rows known at compile time.
template <long R, class Body>
void with_rows(long rows, const Body& body) {
    if constexpr (R > 0) {
        if (rows == R) return body(std::integral_constant<long, R>{});
        with_rows<R - 1>(rows, body);
    }
}

// sums [count, 16] of `count` rows for one tile.
void multiply_tile(const Decoder& decoder, const Rows& rows, long count, const Weight& weight, long tile, float* sums) {
    if (count <= MAX_FUSED) {
        with_rows<MAX_FUSED>(count, [&](auto r) { multiply_fused<r>(decoder, rows, weight, tile, sums); });
        return;
    }
    alignas(64) float panel[PANEL * TILE];
    // Parts as even as they can be: a lone row would have too few sums to keep the multipliers busy.
    const long blocks = weight.columns / BLOCK, chunks = (blocks * BLOCK + PANEL - 1) / PANEL;
    const long parts = (count + MAX_ROWS - 1) / MAX_ROWS;
    for (long chunk = 0; chunk < chunks; chunk++) {
        const long first = blocks * chunk / chunks * BLOCK, width = blocks * (chunk + 1) / chunks * BLOCK - first;
        decode_panel(decoder, weight.codes_of(tile, first), weight.constants_of(tile, first), width, panel);
        for (long part = 0; part < parts; part++) {
            const long row = count * part / parts;
            const Rows some{rows.x + row * rows.stride + first, rows.stride};
            with_rows<MAX_ROWS>(count * (part + 1) / parts - row, [&](auto r) {
                multiply_panel<r>(some, panel, width, chunk == 0, sums + row * TILE);
            });
        }
    }
}

}  // namespace
}  // namespace lorikeet

LORIKEET_EXPORT void lorikeet_nf4_linear(
    const float* x, long x_stride, const uint8_t* codes, const float* constants, const float* bias, float* out,
    long num_rows, long out_features, long in_features, int threads) {
    using namespace lorikeet;
    static const Decoder decoder;
    const Weight weight{codes, constants, in_features};
    const long tiles = (out_features + TILE - 1) / TILE;
    for (long first_row = 0; first_row < num_rows; first_row += ROW_BLOCK) {
        const long count = std::min(ROW_BLOCK, num_rows - first_row);
        const Rows rows{x + first_row * x_stride, x_stride};
        // Decoding a code takes as long as multiplying it by some rows.
        const long piece = std::max(1L, PIECE / (TILE * in_features * (count + 3)));
        parallel_for(threads, tiles, piece, [&](long first, long end) {
            alignas(64) float sums[ROW_BLOCK * TILE];
            for (long tile = first; tile < end; tile++) {
                multiply_tile(decoder, rows, count, weight, tile, sums);
                const long column = tile * TILE, width = std::min(TILE, out_features - column);
                for (long r = 0; r < count; r++) {
                    float* y = out + (first_row + r) * out_features + column;
                    for (long i = 0; i < width; i++) {
                        y[i] = sums[r * TILE + i] + (bias == nullptr ? 0.0f : bias[column + i]);
                    }
                }
            }
        });
    }
}
