// y += B h of a group of rows in bfloat16, over the columns of y that a piece of work owns: B and y become fp32 in
// registers, and y is rounded once.
#pragma once

#include "lora_pairs.h"

namespace lorikeet {
namespace {

// Columns of one load, and those that B is fetched ahead.
constexpr long LOAD = 2 * WIDE_LANES, AHEAD = 256;
// Values that sums of several adapters may take, so that they stay in the second-level cache.
constexpr long MAX_SUMS = 1 << 16;

// Some columns of one row. What several adapters add is kept in fp32 between the first of them and the last: of LOAD
// columns first the even ones, then the odd ones.
struct PairTarget {
    BF16* y;
    float* sums;
    bool is_first, is_last;

    void add(long column, long columns, const Wide& even_deltas, const Wide& odd_deltas) const {
        Wide even, odd;
        if (is_first) {
            Pairs pairs;
            if (columns < LOAD) {
                load_some_pairs(y + column, columns, pairs);
            } else {
                load_pairs(y + column, pairs);
            }
            widen_pairs(pairs, even, odd);
        } else {
            std::memcpy(&even, sums + column, sizeof even);
            std::memcpy(&odd, sums + column + WIDE_LANES, sizeof odd);
        }
        even += even_deltas;
        odd += odd_deltas;
        if (is_last) {
            Pairs pairs;
            round_pairs(even, odd, pairs);
            if (columns < LOAD) {
                store_some_pairs(y + column, columns, pairs);
            } else {
                store_pairs(y + column, pairs);
            }
        } else {
            std::memcpy(sums + column, &even, sizeof even);
            std::memcpy(sums + column + WIDE_LANES, &odd, sizeof odd);
        }
    }
};

// Rows of B, from some column on.
struct PairRows {
    const BF16* from;
    long stride;
};

// y[i] += sum over r of h[i, r] * b[r] for R rows, over V loads of columns, or a part of one. `ahead` is fetched.
template <int R, int V, bool WHOLE>
[[gnu::noinline]] void add_pairs(
    const PairTarget* targets, long column, long columns, const float* h, long h_stride, PairRows b, PairRows ahead,
    long rank) {
    Wide sums[R * 2 * V];
    // As a loop GCC 12 would make a string instruction of it, and keep the sums in memory.
#pragma GCC unroll 16
    for (int i = 0; i < R * 2 * V; i++) sums[i] = Wide{};
    for (long r = 0; r < rank; r++) {
        Wide values[2 * V];
        for (int v = 0; v < V; v++) {
            Pairs pairs;
            if constexpr (WHOLE) {
                load_pairs(b.from + v * LOAD, pairs);
            } else {
                load_some_pairs(b.from, columns, pairs);
            }
            widen_pairs(pairs, values[2 * v], values[2 * v + 1]);
            __builtin_prefetch(ahead.from + v * LOAD);
        }
        b.from += b.stride;
        ahead.from += ahead.stride;
        for (int i = 0; i < R; i++) {
            const float factor = h[i * h_stride + r];
            for (int v = 0; v < 2 * V; v++) accumulate(sums[i * 2 * V + v], values[v], factor);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            const Wide* deltas = sums + 2 * (i * V + v);
            targets[i].add(column + v * LOAD, WHOLE ? LOAD : columns, deltas[0], deltas[1]);
        }
    }
}

// What a group adds to some columns of a slice.
struct PairStrip {
    const Group* group;
    const float* h;
    PairRows b;
    long rank, slice;
    long column, columns;  // of y
    long sums;             // where its columns start in a row of sums
};

// As `add_pairs` for any number of columns; `next` is what is read after the strip.
template <int R>
void add_strip_rows(const PairTarget* targets, const float* h, const PairStrip& strip, const PairRows& next) {
    long column = 0;
    const auto add = [&](auto loads, auto whole) {
        const BF16* from = strip.b.from + column;
        const long beyond = column + AHEAD - strip.columns;
        const PairRows later{from + AHEAD, strip.b.stride}, after{next.from + beyond, next.stride};
        add_pairs<R, decltype(loads)::value, decltype(whole)::value>(
            targets, column, strip.columns - column, h, strip.group->rank, {from, strip.b.stride},
            beyond < 0 ? later : after, strip.rank);
        column += decltype(loads)::value * LOAD;
    };
    const auto has = [&](int loads) { return column + loads * LOAD <= strip.columns; };
    // Sixteen sums, which hide how long an addition takes; fewer at the end.
    constexpr int V = R == 1 ? 8 : R == 2 ? 4 : 2;
    while (has(V)) add(std::integral_constant<int, V>(), std::true_type());
    if constexpr (V > 4) {
        if (has(4)) add(std::integral_constant<int, 4>(), std::true_type());
    }
    if constexpr (V > 2) {
        if (has(2)) add(std::integral_constant<int, 2>(), std::true_type());
    }
    if (has(1)) add(std::integral_constant<int, 1>(), std::true_type());
    if (column < strip.columns) add(std::integral_constant<int, 1>(), std::false_type());
}

// Of a row in a slice: the entries that change it, and how many of them have.
struct Share {
    int32_t all, done;
};

// A thread's strips of the columns that it works at. Of rows that several adapters change there are shares
// [slices, distinct rows] and sums [distinct rows, sum_columns]; where there are no such rows, neither.
struct PairWork {
    bool has_sums;
    long sum_columns;
    std::vector<PairStrip> strips;
    std::vector<Share> shares;
    std::vector<float> sums;

    // Of columns [first, end) of all slices.
    void find(
        const Site& site, const Rows& rows, const std::vector<Group>& groups, const float* h, long first, long end) {
        strips.clear();
        sum_columns = 0;
        if (has_sums) shares.assign(site.num_slices * rows.num_distinct, {0, 0});
        long start = 0;
        for (long s = 0; s < site.num_slices; start += site.widths[s], s++) {
            const long width = site.widths[s], from = std::max(start, first), to = std::min(start + width, end);
            if (from >= to) continue;
            for (const Group& group : groups) {
                if (group.ranks[s] == 0) continue;
                const BF16* b = static_cast<const BF16*>(site.arena) + group.offset + group.rank * site.in_features;
                long first_rank = 0;
                for (long before = 0; before < s; before++) {
                    b += group.ranks[before] * site.widths[before];
                    first_rank += group.ranks[before];
                }
                strips.push_back(
                    {&group, h + group.h + first_rank, {b + (from - start), width}, group.ranks[s], s, from, to - from,
                     sum_columns});
                if (!has_sums) continue;
                for (long i = 0; i < group.count; i++) share_of(rows, s, group.first + i).all++;
            }
            sum_columns += (to - from + LOAD - 1) / LOAD * LOAD;
        }
        if (has_sums) sums.resize(rows.num_distinct * sum_columns);
    }

    Share& share_of(const Rows& rows, long slice, long entry) {
        return shares[slice * rows.num_distinct + rows.places[entry]];
    }

    // To be asked for once for each entry of a strip, in order.
    PairTarget target_of(const Rows& rows, const PairStrip& strip, long entry, BF16* y, long y_stride) {
        BF16* const to = y + rows.rows[entry] * y_stride + strip.column;
        if (!has_sums) return {to, nullptr, true, true};
        Share& share = share_of(rows, strip.slice, entry);
        const bool is_first = share.done++ == 0;
        return {to, sums.data() + rows.places[entry] * sum_columns + strip.sums, is_first, share.done == share.all};
    }
};

// Columns [first, end) of all slices.
void expand_in_pairs(
    const Site& site, const Rows& rows, const std::vector<Group>& groups, const float* h, BF16* y, long y_stride,
    long first, long end) {
    thread_local PairWork work;
    work.has_sums = rows.starts[rows.num_groups] > rows.num_distinct;
    long most = end - first;
    if (work.has_sums) most = std::max(1L, MAX_SUMS / rows.num_distinct / UNIT_COLUMNS) * UNIT_COLUMNS;
    for (; first < end; first += most) {
        work.find(site, rows, groups, h, first, std::min(first + most, end));
        for (size_t i = 0; i < work.strips.size(); i++) {
            const PairStrip& strip = work.strips[i];
            const PairRows& next = work.strips[std::min(i + 1, work.strips.size() - 1)].b;
            const Group& group = *strip.group;
            for (long done = 0; done < group.count;) {
                const long block = pair_block_of(group.count - done);
                PairTarget targets[MAX_PAIR_BLOCK];
                for (long r = 0; r < block; r++) {
                    targets[r] = work.target_of(rows, strip, group.first + done + r, y, y_stride);
                }
                with_pair_rows(block, [&](auto number) {
                    add_strip_rows<decltype(number)::value>(targets, strip.h + done * group.rank, strip, next);
                });
                done += block;
            }
        }
    }
}

}  // namespace
}  // namespace lorikeet
