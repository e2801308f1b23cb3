// What shrink and expand of LoRA share: a site, the rows of a step, and blocks of rows; see lora.cpp.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "vec.h"

namespace lorikeet {

inline namespace LORIKEET_INSTRUCTIONS {
// As `lorikeet_lora_add` at a site that multiplies in pairs.
void add_in_pairs(
    const void* site, const void* rows, const BF16* x, long x_stride, BF16* y, long y_stride, int threads);
}  // namespace LORIKEET_INSTRUCTIONS

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

// Of one linear; `_SiteTables` in kernels/lora_site.py has the same fields.
struct Site {
    const void* arena;
    const int64_t* offsets;
    const int32_t* ranks;
    const int64_t* widths;
    int64_t ranks_stride, in_features, num_slices, type;
    int64_t in_pairs;  // multiplies bfloat16 in pairs; else everything is computed in fp32
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

// About how many nanoseconds it takes to read a weight, and to multiply it with a row.
struct Pace {
    double weight, product;

    double of(long weights, long rows) const {
        return static_cast<double>(weights) * (weight + product * static_cast<double>(rows));
    }
};

// What a call does: groups, items of A and how many of them a piece of work is, columns in units likewise.
struct Plan {
    std::vector<Group> groups;
    std::vector<ShrinkItem> items;
    std::vector<float> h;
    long items_piece, width, units, units_piece;
};

// Without groups where no slot adapts the site; then nothing else is set. `rows_of_a` says how many rows of A an item
// has, at most, for how many rows of a group.
template <class RowsOfA>
void make_plan(const Site& site, const Rows& rows, const Pace& pace, const RowsOfA& rows_of_a, Plan& plan) {
    plan.groups.clear();
    plan.items.clear();
    long num_h = 0;
    double shrink_time = 0, expand_time = 0;
    for (long g = 0; g < rows.num_groups; g++) {
        const int32_t* ranks = site.ranks + rows.slots[g] * site.ranks_stride;
        long rank = 0;
        for (long s = 0; s < site.num_slices; s++) rank += ranks[s];
        if (rank == 0) continue;
        for (long first = rows.starts[g]; first < rows.starts[g + 1]; first += MAX_GROUP) {
            const long count = std::min<long>(MAX_GROUP, rows.starts[g + 1] - first);
            const long number = static_cast<long>(plan.groups.size()), most_a = rows_of_a(count);
            plan.groups.push_back({ranks, first, count, rank, site.offsets[rows.slots[g]], num_h});
            num_h += count * rank;
            for (long a = 0; a < rank; a += most_a) plan.items.push_back({number, a, std::min(most_a, rank - a)});
            shrink_time += pace.of(rank * site.in_features, count);
            for (long s = 0; s < site.num_slices; s++) expand_time += pace.of(ranks[s] * site.widths[s], count);
        }
    }
    if (plan.groups.empty()) return;
    plan.h.resize(num_h);
    plan.width = 0;
    for (long s = 0; s < site.num_slices; s++) plan.width += site.widths[s];
    plan.units = (plan.width + UNIT_COLUMNS - 1) / UNIT_COLUMNS;
    const auto piece_of = [](double time, long count) {
        return std::max(1L, static_cast<long>(PIECE_NS * static_cast<double>(count) / time));
    };
    plan.items_piece = piece_of(shrink_time, static_cast<long>(plan.items.size()));
    plan.units_piece = piece_of(expand_time, plan.units);
}

// Rows of the next block, of `left` that are left: blocks as even as possible.
inline long block_of(long left) { return left <= MAX_BLOCK ? left : left < 2 * MAX_BLOCK ? (left + 1) / 2 : MAX_BLOCK; }

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

inline long padded(long count) { return (count + LANES - 1) / LANES * LANES; }

}  // namespace
}  // namespace lorikeet
