// y = x . W^T + bias in bfloat16 for a weight W in NF4, by products of pairs (pairs.h); the contract is in
// kernels/nf4_cpu.py, the layout in kernels/nf4_tiles.py.
//
// Codes become bfloat16 values as they are multiplied, in four instructions for 64 of them, which run beside the
// multiplications: nothing is kept for other rows. The codes and constants that come next are fetched meanwhile. A
// block's sum is multiplied by its constant in fp32. Each output is one sum, from the first column to the last: a row's
// results do not depend on the others of its batch, nor on the number of threads.

#include <algorithm>
#include <cstdint>

#include "exports.h"
#include "nf4.h"
#include "pairs.h"

namespace lorikeet {
namespace {

// Of a block, in registers. An addition takes six cycles, in which twelve could begin (Zen 5).
constexpr long MAX_SUMS = 16;
// More are multiplied in parts, each of which decodes again.
constexpr long MAX_PART = 8;

struct PairInput {
    const BF16* x;
    long stride;
};

// sums [N, R, 16] of R rows and N tiles: a value of x is loaded once for all tiles.
template <long R, long N>
[[gnu::noinline]] void multiply(
    const PairDecoder& decoder, const PairInput& rows, const NF4Weight& weight, long tile, float* sums) {
    const uint8_t* codes = weight.codes_of(tile, 0);
    const float* constants = weight.constants_of(tile, 0);
    const long next_codes = weight.columns / GROUP * GROUP_BYTES, next_constants = weight.columns / BLOCK * TILE;
    Wide* const total = reinterpret_cast<Wide*>(sums);
#pragma GCC unroll 16
    for (long i = 0; i < N * R; i++) total[i] = Wide{};
    for (long block = 0; block < weight.columns; block += BLOCK, constants += TILE) {
        Wide part[N * R];
#pragma GCC unroll 16
        for (long i = 0; i < N * R; i++) part[i] = Wide{};
        for (long k = block; k < block + BLOCK; k += GROUP, codes += GROUP_BYTES) {
            Pairs low[N], high[N];
            for (long n = 0; n < N; n++) {
                decoder.decode(codes + n * next_codes, low[n], high[n]);
                __builtin_prefetch(codes + (N + n) * next_codes, 0, 2);
            }
            for (long r = 0; r < R; r++) {
                const BF16* x = rows.x + r * rows.stride + k;
                Pairs first, second;
                fill_pairs(x, first);
                for (long n = 0; n < N; n++) accumulate_pairs(part[n * R + r], low[n], first);
                fill_pairs(x + 2, second);
                for (long n = 0; n < N; n++) accumulate_pairs(part[n * R + r], high[n], second);
            }
        }
        for (long n = 0; n < N; n++) {
            Wide constant;
            std::memcpy(&constant, constants + n * next_constants, sizeof constant);
            __builtin_prefetch(constants + (N + n) * next_constants, 0, 2);
            for (long r = 0; r < R; r++) total[n * R + r] += part[n * R + r] * constant;
        }
    }
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
            const long column = (tile + n) * TILE, width = std::min(TILE, out_features - column);
            Wide offset{};
            if (bias != nullptr) std::memcpy(&offset, bias + column, static_cast<size_t>(width) * sizeof(float));
            for (long r = 0; r < R; r++) {
                Wide sum;
                std::memcpy(&sum, sums + (n * R + r) * TILE, sizeof sum);
                store_wide(out + (row + r) * out_features + column, bias == nullptr ? sum : sum + offset, width);
            }
        }
    }

    // Tiles up to `end`, N at once as long as there are so many, then fewer. A part of the rows has MAX_SUMS / N or less.
    template <long N>
    void run(const PairDecoder& decoder, long tile, long end) const {
        const long parts = (num_rows + MAX_PART - 1) / MAX_PART;
        for (; tile + N <= end; tile += N) {
            for (long part = 0; part < parts; part++) {
                const long row = num_rows * part / parts;
                with_rows<std::min(MAX_PART, MAX_SUMS / N)>(num_rows * (part + 1) / parts - row, [&](auto r) {
                    run_some<r, N>(decoder, tile, row);
                });
            }
        }
        if constexpr (N > 1) run<N / 2>(decoder, tile, end);
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
    const auto run = [&](auto at_once) {
        // As many tiles at once as there are sums for, and pieces of whole pairs of them, or fours for few rows.
        constexpr long N = decltype(at_once)::value, UNIT = std::min(N, 4L);
        // Estimated: a product takes a quarter of the time of one of panel.h's, and decoding that of eight rows.
        const long piece = std::max(1L, 4 * PIECE / (UNIT * TILE * in_features * (num_rows + 8)));
        parallel_for(threads, (tiles + UNIT - 1) / UNIT, piece, [&](long first, long end) {
            linear.run<N>(decoder, first * UNIT, std::min(end * UNIT, tiles));
        });
    };
    if (num_rows <= 2) {
        run(std::integral_constant<long, 8>{});
    } else if (num_rows <= 4) {
        run(std::integral_constant<long, 4>{});
    } else {
        run(std::integral_constant<long, 2>{});
    }
}
