// y = x . W^T for a dense weight W in any storage type, computed in fp32; the contract is in kernels/linear.py.
//
// The lanes go along a row of W, as it lies in memory, so that a 16-bit weight is read once and needs no other layout.
// Each output is eight sums over every eighth column, added up at the end, whatever the number of rows: a row's results
// do not depend on the others of its batch, nor on the number of threads.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "parallel.h"
#include "vec.h"

namespace lorikeet {
namespace {

constexpr long GROUP = 12;              // rows of W that share what is read of x
constexpr long MAX_ROWS = 4;            // of x in registers
constexpr long ROW_BLOCK = 32;          // rows of x whose sums are kept at once: 12 KiB
constexpr long CHUNK_BYTES = 1 << 10;   // of a row of W: a group's are 12 KiB
constexpr long PIECE = 1 << 20;         // multiplications: some 20 us

// Rows of W that are multiplied at once by R rows of x: 12 sums where there are rows enough, else what hides the time
// that memory takes.
constexpr long columns_for(long rows) { return rows == 1 ? 6 : GROUP / rows; }

struct Rows {
    const float* x;
    long stride;
};

// sums [R, GROUP], of which this does C columns.
template <long R, long C, class T>
void multiply(const Rows& rows, const T* weight, long weight_stride, long width, bool is_first, Vec* sums) {
    Vec total[R][C]{};
    if (!is_first) {
        for (long r = 0; r < R; r++) {
            for (long c = 0; c < C; c++) total[r][c] = sums[r * GROUP + c];
        }
    }
    for (long k = 0; k < width; k += LANES) {
        Vec w[C];
        for (long c = 0; c < C; c++) {
            w[c] = load(weight + c * weight_stride + k);
            // Of the next group: rows of some kilobytes end before the hardware has seen where they lead.
            __builtin_prefetch(weight + (c + GROUP) * weight_stride + k);
        }
        for (long r = 0; r < R; r++) {
            const Vec x = load(rows.x + r * rows.stride + k);
            for (long c = 0; c < C; c++) total[r][c] += x * w[c];
        }
    }
    for (long r = 0; r < R; r++) {
        for (long c = 0; c < C; c++) sums[r * GROUP + c] = total[r][c];
    }
}

template <long R, class T>
void multiply_group(
    const Rows& rows, const T* weight, long weight_stride, long columns, long width, bool is_first, Vec* sums) {
    constexpr long C = columns_for(R);
    long c = 0;
    for (; c + C <= columns; c += C) {
        multiply<R, C>(rows, weight + c * weight_stride, weight_stride, width, is_first, sums + c);
    }
    for (; c < columns; c++) {
        multiply<R, 1>(rows, weight + c * weight_stride, weight_stride, width, is_first, sums + c);
    }
}

// The sums of four vectors' lanes: of lanes 0 to 3 in the first half, of lanes 4 to 7 in the second.
static inline Vec sum_four(const Vec* v) {
    const Vec ab = LORIKEET_SHUFFLE(v[0], v[1], 0, 8, 1, 9, 4, 12, 5, 13) +
                   LORIKEET_SHUFFLE(v[0], v[1], 2, 10, 3, 11, 6, 14, 7, 15);
    const Vec cd = LORIKEET_SHUFFLE(v[2], v[3], 0, 8, 1, 9, 4, 12, 5, 13) +
                   LORIKEET_SHUFFLE(v[2], v[3], 2, 10, 3, 11, 6, 14, 7, 15);
    return LORIKEET_SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
           LORIKEET_SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
}

// The GROUP sums of one row, of which `columns` are wanted.
void finish(const Vec* sums, long columns, const float* bias, float* out) {
    float totals[GROUP];
    for (long c = 0; c < GROUP; c += 4) {
        const Vec halves = sum_four(sums + c);
        for (long i = 0; i < 4; i++) totals[c + i] = halves[i] + halves[i + 4];
    }
    for (long c = 0; c < columns; c++) out[c] = totals[c] + (bias == nullptr ? 0.0f : bias[c]);
}

}  // namespace
}  // namespace lorikeet

LORIKEET_EXPORT void lorikeet_linear(
    int type, const float* x, long x_stride, const void* weight, long weight_stride, const float* bias, float* out,
    long num_rows, long out_features, long in_features, int threads) {
    using namespace lorikeet;
    with_type(type, [&](auto* null) {
        using T = std::remove_pointer_t<decltype(null)>;
        constexpr long CHUNK = CHUNK_BYTES / sizeof(T);
        const long vectors = in_features / LANES, chunks = (in_features + CHUNK - 1) / CHUNK;
        const long groups = (out_features + GROUP - 1) / GROUP;
        const long piece = std::max(1L, PIECE / (GROUP * in_features * (num_rows + 3)));
        parallel_for(threads, num_rows == 0 ? 0 : groups, piece, [&](long begin, long end) {
            Vec sums[ROW_BLOCK * GROUP]{};
            for (long group = begin; group < end; group++) {
                const long column = group * GROUP, columns = std::min(GROUP, out_features - column);
                const T* w = static_cast<const T*>(weight) + column * weight_stride;
                for (long first_row = 0; first_row < num_rows; first_row += ROW_BLOCK) {
                    const long count = std::min(ROW_BLOCK, num_rows - first_row);
                    const long parts = (count + MAX_ROWS - 1) / MAX_ROWS;
                    for (long chunk = 0; chunk < chunks; chunk++) {
                        const long first = vectors * chunk / chunks * LANES;
                        const long width = vectors * (chunk + 1) / chunks * LANES - first;
                        for (long part = 0; part < parts; part++) {
                            const long row = count * part / parts;
                            const Rows some{x + (first_row + row) * x_stride + first, x_stride};
                            const auto run = [&](auto r) {
                                multiply_group<r>(
                                    some, w + first, weight_stride, columns, width, chunk == 0, sums + row * GROUP);
                            };
                            switch (count * (part + 1) / parts - row) {
                                case 1: run(std::integral_constant<long, 1>{}); break;
                                case 2: run(std::integral_constant<long, 2>{}); break;
                                case 3: run(std::integral_constant<long, 3>{}); break;
                                default: run(std::integral_constant<long, 4>{}); break;
                            }
                        }
                    }
                    for (long r = 0; r < count; r++) {
                        finish(
                            sums + r * GROUP, columns, bias == nullptr ? nullptr : bias + column,
                            out + (first_row + r) * out_features + column);
                    }
                }
            }
        });
    });
}
