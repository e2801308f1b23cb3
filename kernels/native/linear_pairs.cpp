// y = x . W^T + bias in bfloat16 for a dense weight W, by products of pairs (pairs.h); the contract is in
// kernels/linear.py.
//
// Both are read as they lie, 32 columns at once, into sixteen sums of as many lanes, which are added up in the end in a
// fixed order: a row's results do not depend on the others of its batch, nor on the number of threads.

#include <algorithm>

#include "panel.h"
#include "pairs.h"
#include "parallel.h"

namespace lorikeet {
namespace {

constexpr long COLUMNS = 2 * WIDE_LANES;

// Stores the sum of each vector's lanes. Each step adds one half of what each vector still has to the other half, and puts
// what is left of two vectors into one.
inline void store_sums(const Wide* total, float* sums) {
    // Where the steps below put what they are given.
    constexpr long ORDER[WIDE_LANES] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
    Wide left[WIDE_LANES];
    for (long i = 0; i < 8; i++) {
        const Wide &a = total[ORDER[i]], &b = total[ORDER[i + 8]];
        left[i] = LORIKEET_SHUFFLE_WIDE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                  LORIKEET_SHUFFLE_WIDE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (long i = 0; i < 4; i++) {
        const Wide a = left[i], b = left[i + 4];
        left[i] = LORIKEET_SHUFFLE_WIDE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                  LORIKEET_SHUFFLE_WIDE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    for (long i = 0; i < 2; i++) {
        const Wide a = left[i], b = left[i + 2];
        left[i] = LORIKEET_SHUFFLE_WIDE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                  LORIKEET_SHUFFLE_WIDE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    const Wide a = left[0], b = left[1];
    const Wide sum = LORIKEET_SHUFFLE_WIDE(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
                     LORIKEET_SHUFFLE_WIDE(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
    std::memcpy(sums, &sum, sizeof sum);
}

// sums [R, C] of R rows of x and C of W, sixteen together.
template <long R, long C>
[[gnu::noinline]] void multiply(const BF16* const* x, const BF16* const* weight, long width, float* sums) {
    static_assert(R * C == WIDE_LANES, "as many sums as there are lanes");
    Wide total[R * C];
    // As a loop GCC 12 would make a string instruction of it, and keep the sums in memory.
#pragma GCC unroll 16
    for (long i = 0; i < R * C; i++) total[i] = Wide{};
    const auto add = [&](const auto& load_at) {
        Pairs columns[C];
        for (long c = 0; c < C; c++) load_at(weight[c], columns[c]);
        for (long r = 0; r < R; r++) {
            Pairs values;
            load_at(x[r], values);
            for (long c = 0; c < C; c++) accumulate_pairs(total[r * C + c], columns[c], values);
        }
    };
    long k = 0;
    for (; k + COLUMNS <= width; k += COLUMNS) {
        add([k](const BF16* from, Pairs& to) { load_pairs(from + k, to); });
    }
    if (k < width) add([k, width](const BF16* from, Pairs& to) { load_some_pairs(from + k, width - k, to); });
    store_sums(total, sums);
}

struct PairLinear {
    const BF16* x;
    long x_stride;
    const BF16* weight;
    long weight_stride;
    const float* bias;
    BF16* out;
    long num_rows, out_features, in_features;

    // R rows from `row` on and C outputs from `column` on. Of what goes beyond the end the last is computed again.
    template <long R, long C>
    void run_some(long row, long column) const {
        const BF16 *rows[R], *columns[C];
        for (long r = 0; r < R; r++) rows[r] = x + std::min(row + r, num_rows - 1) * x_stride;
        for (long c = 0; c < C; c++) columns[c] = weight + std::min(column + c, out_features - 1) * weight_stride;
        alignas(64) float sums[R * C];
        multiply<R, C>(rows, columns, in_features, sums);
        for (long r = 0; r < std::min(R, num_rows - row); r++) {
            for (long c = 0; c < std::min(C, out_features - column); c++) {
                const float offset = bias == nullptr ? 0.0f : bias[column + c];
                put(out + (row + r) * out_features + column + c, sums[r * C + c] + offset);
            }
        }
    }

    // Tiles of sixteen outputs, whose weights stay in the first-level cache for all rows.
    void run(long tile, long end) const {
        for (; tile < end; tile++) {
            const long first = tile * TILE;
            if (num_rows == 1) {
                run_some<1, 16>(0, first);
            } else if (num_rows == 2) {
                for (long column = first; column < first + TILE; column += 8) run_some<2, 8>(0, column);
            } else {
                for (long row = 0; row < num_rows; row += 4) {
                    for (long column = first; column < first + TILE; column += 4) run_some<4, 4>(row, column);
                }
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
