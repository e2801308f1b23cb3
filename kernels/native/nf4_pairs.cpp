// y = x . W^T + bias in bfloat16 for a weight W in NF4, by products of pairs (pairs.h); the contract is in
// kernels/nf4_cpu.py, the layout in kernels/nf4_tiles.py.
//
// Codes become bfloat16 values as they are multiplied, in four instructions for 64 of them, which run beside the
// multiplications: nothing is kept for other rows. A block's sum is multiplied by its constant in fp32. Each output is
// one sum, from the first column to the last: a row's results do not depend on the others of its batch, nor on the
// number of threads.

#include <algorithm>
#include <cstdint>

#include "exports.h"
#include "nf4.h"
#include "pairs.h"

namespace lorikeet {
namespace {

constexpr long MAX_SUMS = 8;  // of a block, in registers, and as many of all blocks so far

struct PairInput {
    const BF16* x;
    long stride;
};

// sums [N, R, 16] of R rows and N tiles: more tiles where rows are too few to hide how long an addition takes.
template <long R, long N>
[[gnu::noinline]] void multiply(
    const PairDecoder& decoder, const PairInput& rows, const NF4Weight& weight, long tile, float* sums) {
    Wide total[N][R]{};
    const uint8_t* codes = weight.codes_of(tile, 0);
    const float* constants = weight.constants_of(tile, 0);
    const long next_codes = weight.columns / GROUP * GROUP_BYTES, next_constants = weight.columns / BLOCK * TILE;
    for (long block = 0; block < weight.columns; block += BLOCK, constants += TILE) {
        Wide part[N][R]{};
        for (long k = block; k < block + BLOCK; k += GROUP, codes += GROUP_BYTES) {
            for (long n = 0; n < N; n++) {
                Pairs low, high;
                decoder.decode(codes + n * next_codes, low, high);
                for (long r = 0; r < R; r++) {
                    const BF16* x = rows.x + r * rows.stride + k;
                    Pairs first, second;
                    fill_pairs(x, first);
                    fill_pairs(x + 2, second);
                    accumulate_pairs(part[n][r], low, first);
                    accumulate_pairs(part[n][r], high, second);
                }
            }
        }
        for (long n = 0; n < N; n++) {
            Wide constant;
            std::memcpy(&constant, constants + n * next_constants, sizeof constant);
            for (long r = 0; r < R; r++) total[n][r] += part[n][r] * constant;
        }
    }
    std::memcpy(sums, total, sizeof total);
}

struct PairLinear {
    PairInput rows;
    NF4Weight weight;
    const float* bias;
    BF16* out;
    long num_rows, out_features;

    // N tiles from `tile` on and R rows from `row` on.
    template <long R, long N>
    void run_some(const PairDecoder& decoder, long tile, long row) const {
        alignas(64) float sums[N * R * TILE];
        multiply<R, N>(decoder, {rows.x + row * rows.stride, rows.stride}, weight, tile, sums);
        for (long n = 0; n < N; n++) {
            const long column = (tile + n) * TILE;
            write_tile(
                sums + n * R * TILE, R, bias == nullptr ? nullptr : bias + column, out + row * out_features + column,
                out_features, std::min(TILE, out_features - column));
        }
    }

    void run(const PairDecoder& decoder, long tile, long end) const {
        with_rows<MAX_SUMS / 2>(num_rows, [&](auto r) {
            constexpr long N = MAX_SUMS / r;
            for (; tile + N <= end; tile += N) run_some<r, N>(decoder, tile, 0);
        });
        const long parts = (num_rows + MAX_SUMS - 1) / MAX_SUMS;
        for (; tile < end; tile++) {
            for (long part = 0; part < parts; part++) {
                const long row = num_rows * part / parts;
                with_rows<MAX_SUMS>(num_rows * (part + 1) / parts - row, [&](auto r) {
                    run_some<r, 1>(decoder, tile, row);
                });
            }
        }
    }
};

}  // namespace
}  // namespace lorikeet

LORIKEET_EXPORT void lorikeet_nf4_pair_linear(
    const void* x, long x_stride, const uint8_t* codes, const float* constants, const float* bias, void* out,
    long num_rows, long out_features, long in_features, int threads) {
    using namespace lorikeet;
    static const PairDecoder decoder(NF4_VALUES);
    const PairLinear linear{
        {static_cast<const BF16*>(x), x_stride}, {codes, constants, in_features}, bias, static_cast<BF16*>(out),
        num_rows, out_features};
    const long tiles = num_rows == 0 ? 0 : (out_features + TILE - 1) / TILE;
    // Estimated: a product takes a quarter of the time that one of panel.h's takes, and decoding that of two rows.
    const long piece = std::max(1L, 4 * PIECE / (TILE * in_features * (num_rows + 2)));
    parallel_for(threads, tiles, piece, [&](long first, long end) { linear.run(decoder, first, end); });
}
