// What shrink and expand of LoRA share: a site, the rows of a step, and blocks of rows; see lora.cpp.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "vec.h"

namespace lorikeet {
namespace {

// Rows and columns that the registers hold sums of, at most: 6 x 2 vectors, or 3 x 4 for few rows.
constexpr long MAX_BLOCK = 6, FEW_ROWS = 3, TILE = 2 * LANES;
// From more rows on, and of other types than fp32, so many columns of B are first laid out beside each other.
constexpr long MAX_IN_PLACE = 12, STRIP = 128;
// More rows of an adapter are several groups, so that what they need of x and y stays in the cache.
constexpr long MAX_GROUP = 48;
// Columns of the unit that is dealt out, and about how long a piece of work takes.
constexpr long UNIT_COLUMNS = 64;
constexpr double PIECE_NS = 8000;

// Of one linear; `LoraSite` in kernels/lora_cpu.py has the same fields.
struct Site {
    const void* arena;
    const int64_t* offsets;
    const int32_t* ranks;
    const int64_t* widths;
    int64_t ranks_stride, in_features, num_slices, type;
};

// Of one step; `AdaptedRows` in kernels/lora_rows.py has the same fields. Entries are sorted by slot.
struct Rows {
    const int32_t* slots;     // of each group
    const int32_t* starts;    // first entry of each group, and the number of all
    const int32_t* rows;      // of each entry
    const float* weights;     // of each entry
    const int32_t* places;    // of each entry's row among the distinct ones
    const int32_t* distinct;  // rows
    int64_t num_groups, num_distinct;
};

// Rows of an adapter that adapts the site.
struct Group {
    const int32_t* ranks;
    long first, count;  // its entries, at most MAX_GROUP
    long rank;          // of all slices
    int64_t offset;     // of its block in the arena
    long h;             // where its h [count, rank] starts
};

// Some rows of A for a group.
struct ShrinkItem {
    long group, a, num_a;
};

// About what it takes to read `values` weights and multiply them with `rows` rows.
double nanoseconds(long values, long rows) {
    return static_cast<double>(values) * (0.25 + 0.04 * static_cast<double>(rows));
}

// Rows of the next block, of `left` that are left: blocks as even as possible.
long block_of(long left) { return left <= MAX_BLOCK ? left : left < 2 * MAX_BLOCK ? (left + 1) / 2 : MAX_BLOCK; }

// Calls body with the constant `rows`, 1 to MAX_BLOCK.
template <class Body>
void with_rows(long rows, Body&& body) {
    switch (rows) {
        case 1: return body(std::integral_constant<int, 1>());
        case 2: return body(std::integral_constant<int, 2>());
        case 3: return body(std::integral_constant<int, 3>());
        case 4: return body(std::integral_constant<int, 4>());
        case 5: return body(std::integral_constant<int, 5>());
        default: return body(std::integral_constant<int, 6>());
    }
}

// Zeros for N sums. An initialiser would keep them in memory: GCC makes one `rep stos` of it.
template <int N>
void clear(Vec* sums) {
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) sums[i] = Vec{};
}

// The first `count` of eight values, zeros behind.
template <class T>
Vec load_some(const T* from, long count) {
    float values[LANES] = {};
    for (long i = 0; i < count && i < LANES; i++) values[i] = to_float(from[i]);
    return load(values);
}

// `count` values in fp32, zeros behind up to a multiple of LANES.
template <class T>
void widen(const T* from, long count, float* to) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    if (i < count) store(to + i, load_some(from + i, count - i));
}

long padded(long count) { return (count + LANES - 1) / LANES * LANES; }

}  // namespace
}  // namespace lorikeet
