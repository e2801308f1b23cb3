// h = weight * A x of a group of rows in bfloat16 by products of pairs (pairs.h), straight from where A and x lie.
#pragma once

#include "lora_pairs.h"

namespace lorikeet {
namespace {

// h[i, j] = weights[i] * dot(x[i], a[j]) of R rows of x and A rows of a. As much is fetched `ahead` of these.
template <int R, int A>
[[gnu::noinline]] void pair_dots(
    const BF16* const* x, const BF16* a, long ahead, long width, const float* weights, float* h, long h_stride) {
    static_assert(R * A <= WIDE_LANES, "all sums are added up together");
    Wide total[WIDE_LANES];
    // As a loop GCC 12 would make a string instruction of it, and keep the sums in memory; likewise below.
#pragma GCC unroll 16
    for (long i = 0; i < WIDE_LANES; i++) total[i] = Wide{};
    const auto add = [&](const auto& load_at) {
        Pairs values[A];
#pragma GCC unroll 4
        for (int j = 0; j < A; j++) load_at(a + j * width, values[j]);
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
            Pairs row;
            load_at(x[i], row);
#pragma GCC unroll 4
            for (int j = 0; j < A; j++) accumulate_pairs(total[i * A + j], values[j], row);
        }
    };
    constexpr long COLUMNS = 2 * WIDE_LANES;
    long k = 0;
    for (; k + COLUMNS <= width; k += COLUMNS) {
        for (int j = 0; j < A; j++) __builtin_prefetch(a + j * width + (k + ahead));
        add([k](const BF16* from, Pairs& to) { load_pairs(from + k, to); });
    }
    if (k < width) add([k, width](const BF16* from, Pairs& to) { load_some_pairs(from + k, width - k, to); });
    Wide sums;
    add_lanes(total, sums);
    for (int i = 0; i < R; i++) {
        for (int j = 0; j < A; j++) h[i * h_stride + j] = weights[i] * sums[i * A + j];
    }
}

// As `pair_dots` for any number of rows of a; `next` is what is read after them. Four at a time, since those that come
// after them begin before their sums are there.
template <int R>
void pair_dots_of_all(
    const BF16* const* x, const BF16* a, long num_a, const BF16* next, long width, const float* weights, float* h,
    long h_stride) {
    long j = 0;
    const auto run = [&](auto count) {
        constexpr int A = decltype(count)::value;
        const BF16* from = a + j * width;
        pair_dots<R, A>(x, from, j + A < num_a ? A * width : next - from, width, weights, h + j, h_stride);
        j += A;
    };
    while (j + 4 <= num_a) run(std::integral_constant<int, 4>());
    while (j < num_a) run(std::integral_constant<int, 1>());
}

// `next` is the item that comes after this one, or null.
void shrink_in_pairs(
    const Site& site, const Rows& rows, const std::vector<Group>& groups, const ShrinkItem& item,
    const ShrinkItem* next, const BF16* x, long x_stride, float* all_h) {
    const auto a_of = [&](long group, long row) {
        return static_cast<const BF16*>(site.arena) + groups[group].offset + row * site.in_features;
    };
    // After the last one B is read, which begins behind A.
    const BF16* after = next == nullptr ? a_of(item.group, item.a + item.num_a) : a_of(next->group, next->a);
    const Group& group = groups[item.group];
    for (long done = 0; done < group.count;) {
        const long block = pair_block_of(group.count - done), entry = group.first + done;
        const BF16* block_x[MAX_PAIR_BLOCK];
        for (long i = 0; i < block; i++) block_x[i] = x + rows.rows[entry + i] * x_stride;
        with_pair_rows(block, [&](auto number) {
            pair_dots_of_all<decltype(number)::value>(
                block_x, a_of(item.group, item.a), item.num_a, after, site.in_features, rows.weights + entry,
                all_h + group.h + done * group.rank + item.a, group.rank);
        });
        done += block;
    }
}

}  // namespace
}  // namespace lorikeet
