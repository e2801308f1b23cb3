// Products of rows of x with a panel: columns of sixteen rows of a weight, decoded to fp32 into the first-level cache,
// [columns, 16]. The sixteen are the lanes of two vectors, and x is broadcast. Each output is one sum, from the first
// column to the last, whatever the number of rows: a row's results do not depend on the others of its batch.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vec.h"

namespace lorikeet {

constexpr long TILE = 2 * LANES;  // rows of a weight
constexpr long MAX_ROWS = 6;      // of x in registers: 12 sums
constexpr long UNROLLED = 4;      // columns; a panel has a multiple of them
constexpr long ROW_BLOCK = 128;   // rows of x that share a panel
constexpr long PIECE = 1 << 20;   // multiplications of a thread's piece of work: some 20 us

struct Input {
    const float* x;
    long stride;

    Input from(long row, long column) const { return {x + row * stride + column, stride}; }
};

// Memory that the next panel will be made of, of which some bytes are fetched with each column. The hardware does not
// foresee where a panel begins, and all of it at once would hold up the multiplications.
struct Ahead {
    const char* at;
    long step;

    void fetch() {
        __builtin_prefetch(at);
        at += step;
    }
};

// Calls body(R) with a number of rows, 1 to Most, known at compile time.
template <long Most, class Body>
static inline void with_rows(long rows, const Body& body) {
    if constexpr (Most > 0) {
        if (rows == Most) return body(std::integral_constant<long, Most>{});
        with_rows<Most - 1>(rows, body);
    }
}

// Adds to sums [R, 16]. Not inlined: among other code the compiler runs out of registers for the sums.
template <long R>
[[gnu::noinline]] static void multiply_panel(
    const Input& rows, const float* panel, long width, float* sums, Ahead ahead) {
    Vec total[R][2];
    const float* x[R];
    for (long r = 0; r < R; r++) {
        x[r] = rows.x + r * rows.stride;
        for (long i = 0; i < 2; i++) total[r][i] = load(sums + r * TILE + i * LANES);
    }
    for (long k = 0; k < width; k += UNROLLED) {
        for (long j = 0; j < UNROLLED; j++, panel += TILE) {
            ahead.fetch();
            const Vec low = load(panel), high = load(panel + LANES);
            for (long r = 0; r < R; r++) {
                const Vec value = fill(x[r][k + j]);
                accumulate(total[r][0], value, low);
                accumulate(total[r][1], value, high);
            }
        }
    }
    for (long r = 0; r < R; r++) {
        for (long i = 0; i < 2; i++) store(sums + r * TILE + i * LANES, total[r][i]);
    }
}

// multiply_panel for `count` rows in parts as even as they can be: a lone row would have too few sums to keep the
// multipliers busy. The first two parts fetch `next`, of which there are `bytes` for each column.
static inline void multiply_rows(
    const Input& rows, long count, const float* panel, long width, float* sums, const char* next, long bytes) {
    const long parts = (count + MAX_ROWS - 1) / MAX_ROWS, fetching = std::min(2L, parts);
    for (long part = 0; part < parts; part++) {
        const long row = count * part / parts, step = bytes / fetching;
        const Ahead ahead = part < fetching ? Ahead{next + part * width * step, step}
                                            : Ahead{reinterpret_cast<const char*>(panel), 0};
        with_rows<MAX_ROWS>(count * (part + 1) / parts - row, [&](auto r) {
            multiply_panel<r>(rows.from(row, 0), panel, width, sums + row * TILE, ahead);
        });
    }
}

// sums [count, 16] plus bias to the first `width` columns of `count` rows of out.
template <class T>
static void write_tile(const float* sums, long count, const float* bias, T* out, long stride, long width) {
    for (long r = 0; r < count; r++, sums += TILE, out += stride) {
        if (width == TILE) {
            for (long i = 0; i < TILE; i += LANES) {
                const Vec sum = load(sums + i);
                store(out + i, bias == nullptr ? sum : sum + load(bias + i));
            }
        } else {
            for (long i = 0; i < width; i++) put(out + i, sums[i] + (bias == nullptr ? 0.0f : bias[i]));
        }
    }
}

}  // namespace lorikeet
