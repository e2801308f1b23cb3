// y = x . W^T + bias in bfloat16 for a dense weight W, by products of pairs (pairs.h); the contract is in
// kernels/linear.py.
//
// Both are read as they lie, 32 columns at once, into sixteen sums of as many lanes, which are added up in the end in a
// fixed order: a row's results do not depend on the others of its batch, nor on the number of threads. While the first
// rows are multiplied with a tile of W the next one is fetched.

#include <algorithm>

#include "panel.h"
#include "pairs.h"
#include "parallel.h"

namespace lorikeet {
namespace {

constexpr long COLUMNS = 2 * WIDE_LANES;

// sums [R, C] of R rows of x and C of W, sixteen together. FETCH: has memory bring what lies `ahead` of W's elements.
template <long R, long C, bool FETCH>
[[gnu::noinline]] void multiply(
    const BF16* const* x, const BF16* const* weight, long width, [[maybe_unused]] long ahead, Wide& sums) {
    static_assert(R * C == WIDE_LANES, "as many sums as there are lanes");
    Wide total[R * C];
    // As a loop GCC 12 would make a string instruction of it, and keep the sums in memory.
#pragma GCC unroll 16
    for (long i = 0; i < R * C; i++) total[i] = Wide{};
    for (long k = 0; k < width; k += COLUMNS) {
        const auto load_at = [&](const BF16* from, Pairs& to) {
            width - k >= COLUMNS ? load_pairs(from + k, to) : load_some_pairs(from + k, width - k, to);
        };
        Pairs columns[C];
#pragma GCC unroll 16
        for (long c = 0; c < C; c++) {
            load_at(weight[c], columns[c]);
            if (FETCH) __builtin_prefetch(weight[c] + k + ahead, 0, 2);
        }
#pragma GCC unroll 4
        for (long r = 0; r < R; r++) {
            Pairs values;
            load_at(x[r], values);
#pragma GCC unroll 16
            for (long c = 0; c < C; c++) accumulate_pairs(total[r * C + c], columns[c], values);
        }
    }
    add_lanes(total, sums);
}

// Of R vectors, each with some sums of all rows, each becomes one row's.
template <long R>
inline void by_rows(Wide* x) {
    if constexpr (R == 2) {
        const Wide a = x[0], b = x[1];
        x[0] = LORIKEET_SHUFFLE_WIDE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        x[1] = LORIKEET_SHUFFLE_WIDE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    } else if constexpr (R == 4) {
        const Wide a = LORIKEET_SHUFFLE_WIDE(x[0], x[1], 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const Wide b = LORIKEET_SHUFFLE_WIDE(x[2], x[3], 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const Wide c = LORIKEET_SHUFFLE_WIDE(x[0], x[1], 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        const Wide d = LORIKEET_SHUFFLE_WIDE(x[2], x[3], 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        x[0] = LORIKEET_SHUFFLE_WIDE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        x[1] = LORIKEET_SHUFFLE_WIDE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        x[2] = LORIKEET_SHUFFLE_WIDE(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        x[3] = LORIKEET_SHUFFLE_WIDE(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
}

struct PairLinear {
    const BF16* x;
    long x_stride;
    const BF16* weight;
    long weight_stride;
    const float* bias;
    BF16* out;
    long num_rows, out_features, in_features;

    // R rows from `row` on and the sixteen outputs from `column` on. Of what goes beyond the end the last is computed
    // again.
    template <long R>
    void run_rows(long row, long column) const {
        constexpr long C = TILE / R;
        const BF16* rows[R];
        for (long r = 0; r < R; r++) rows[r] = x + std::min(row + r, num_rows - 1) * x_stride;
        Wide sums[R];  // of the outputs [C * i, C * (i + 1)), of all rows
        for (long i = 0; i < R; i++) {
            const BF16* columns[C];
            for (long c = 0; c < C; c++) {
                columns[c] = weight + std::min(column + i * C + c, out_features - 1) * weight_stride;
            }
            if (row == 0) {
                multiply<R, C, true>(rows, columns, in_features, TILE * weight_stride, sums[i]);
            } else {
                multiply<R, C, false>(rows, columns, in_features, 0, sums[i]);
            }
        }
        const long width = std::min(TILE, out_features - column);
        Wide offset{};
        if (bias != nullptr) std::memcpy(&offset, bias + column, static_cast<size_t>(width) * sizeof(float));
        by_rows<R>(sums);
        for (long r = 0; r < R && row + r < num_rows; r++) {
            store_wide(out + (row + r) * out_features + column, bias == nullptr ? sums[r] : sums[r] + offset, width);
        }
    }

    // Tiles of sixteen outputs, whose weights stay in the first-level cache for all rows.
    void run(long tile, long end) const {
        for (; tile < end; tile++) {
            if (num_rows == 1) {
                run_rows<1>(0, tile * TILE);
            } else if (num_rows == 2) {
                run_rows<2>(0, tile * TILE);
            } else {
                for (long row = 0; row < num_rows; row += 4) run_rows<4>(row, tile * TILE);
            }
        }
    }
};

}  // namespace
}  // namespace lorikeet

LORIKEET_EXPORT void lorikeet_pair_linear(
    const void* x, long x_stride, const void* weight, long weight_stride, const float* bias, void* out, long num_rows,
    long out_features, long in_features, int threads) {
    using namespace lorikeet;
    const PairLinear linear{
        static_cast<const BF16*>(x), x_stride, static_cast<const BF16*>(weight), weight_stride, bias,
        static_cast<BF16*>(out), num_rows, out_features, in_features};
    const long tiles = num_rows == 0 ? 0 : (out_features + TILE - 1) / TILE;
    // Estimated: a product takes a quarter of the time that one of panel.h's takes, and to read a weight that of four.
    const long piece = std::max(1L, 4 * PIECE / (TILE * in_features * (num_rows + 4)));
    parallel_for(threads, tiles, piece, [&](long first, long end) { linear.run(first, end); });
}
