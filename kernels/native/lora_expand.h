// y += B h of a group of rows, over the columns of y that a piece of work owns.
#pragma once

#include "lora.h"

namespace lorikeet {
namespace {

// y[i, 0 : columns] += sum over r of h[i, r] * b[r], for R rows; b has V vectors of columns, y may have fewer.
template <int R, int V>
void add_tile(
    float* const* y, long column, const float* h, long h_stride, const float* b, long b_stride, long rank,
    long columns) {
    Vec sums[R][V];
    clear<R * V>(sums[0]);
    // What comes next in the same rows.
    for (int i = 0; i < R; i++) __builtin_prefetch(y[i] + column + 4 * TILE);
    for (long r = 0; r < rank; r++) {
        const float* from = b + r * b_stride;
        Vec values[V];
        for (int v = 0; v < V; v++) {
            values[v] = load(from + v * LANES);
            if (v % 2 == 0) __builtin_prefetch(from + (2 * V + v) * LANES);
        }
        for (int i = 0; i < R; i++) {
            const float factor = h[i * h_stride + r];
            for (int v = 0; v < V; v++) sums[i][v] += factor * values[v];
        }
    }
    if (columns == V * LANES) {
#pragma GCC unroll 6
        for (int i = 0; i < R; i++) {
            float* to = y[i] + column;
            for (int v = 0; v < V; v++) store(to + v * LANES, load(to + v * LANES) + sums[i][v]);
        }
        return;
    }
#pragma GCC unroll 6
    for (int i = 0; i < R; i++) {
        float deltas[V * LANES];
        for (int v = 0; v < V; v++) store(deltas + v * LANES, sums[i][v]);
        for (long c = 0; c < columns; c++) y[i][column + c] += deltas[c];
    }
}

// The columns of y that a piece owns, in fp32: of y itself, or of a copy of the distinct rows.
struct Target {
    float* y;
    long stride;
    const int32_t* rows;  // of each entry
};

// As `add_tile` for all entries of a group and any number of columns, of which b has TILE at least.
void add_strip(
    const Target& target, const Group& group, const float* h, const float* b, long b_stride, long rank, long column,
    long columns) {
    for (long done = 0; done < group.count;) {
        const long block = block_of(group.count - done);
        float* y[MAX_BLOCK];
        for (long i = 0; i < block; i++) y[i] = target.y + target.rows[group.first + done + i] * target.stride + column;
        const float* block_h = h + done * group.rank;
        with_rows(block, [&](auto number) {
            constexpr int R = decltype(number)::value;
            long c = 0;
            if constexpr (R <= FEW_ROWS) {
                for (; c + 2 * TILE <= columns; c += 2 * TILE) {
                    add_tile<R, 4>(y, c, block_h, group.rank, b + c, b_stride, rank, 2 * TILE);
                }
            }
            for (; c < columns; c += TILE) {
                add_tile<R, 2>(y, c, block_h, group.rank, b + c, b_stride, rank, std::min(TILE, columns - c));
            }
        });
        done += block;
    }
}

// One slice of one group: `columns` columns of y from `column` on and of b, which is [rank, b_stride].
template <class T>
void add_slice(
    const Target& target, const Group& group, const float* h, const T* b, long b_stride, long rank, long column,
    long columns) {
    long c = 0;
    if constexpr (std::is_same<T, float>::value) {
        if (group.count <= MAX_IN_PLACE) {
            c = columns - columns % TILE;
            add_strip(target, group, h, b, b_stride, rank, column, c);
        }
    }
    thread_local std::vector<float> strip;
    for (; c < columns; c += STRIP) {
        const long width = std::min(STRIP, columns - c), stride = (width + TILE - 1) / TILE * TILE;
        strip.assign(rank * stride, 0.0f);
        for (long r = 0; r < rank; r++) widen(b + r * b_stride + c, width, strip.data() + r * stride);
        add_strip(target, group, h, strip.data(), stride, rank, column + c, width);
    }
}

// Columns [first, end) of all slices; the target starts with `first`.
template <class T>
void expand(
    const Site& site, const std::vector<Group>& groups, const float* all_h, const Target& target, long first,
    long end) {
    for (const Group& group : groups) {
        const T* b = static_cast<const T*>(site.arena) + group.offset + group.rank * site.in_features;
        long start = 0, first_rank = 0;
        for (long s = 0; s < site.num_slices; s++) {
            const long rank = group.ranks[s], width = site.widths[s];
            const long from = std::max(start, first), to = std::min(start + width, end);
            if (rank > 0 && from < to) {
                const float* h = all_h + group.h + first_rank;
                add_slice(target, group, h, b + (from - start), width, rank, from - first, to - from);
            }
            b += rank * width;
            start += width;
            first_rank += rank;
        }
    }
}

// As `expand` for 16-bit y, which is rounded once: adds to an fp32 copy of the columns.
template <class T>
void expand_in_float(
    const Site& site, const Rows& rows, const std::vector<Group>& groups, const float* all_h, T* y, long y_stride,
    long first, long end) {
    const long width = end - first, stride = padded(width);
    thread_local std::vector<float> sums;
    sums.resize(rows.num_distinct * stride);
    for (long i = 0; i < rows.num_distinct; i++) {
        widen(y + rows.distinct[i] * y_stride + first, width, sums.data() + i * stride);
    }
    expand<T>(site, groups, all_h, {sums.data(), stride, rows.places}, first, end);
    for (long i = 0; i < rows.num_distinct; i++) {
        const float* from = sums.data() + i * stride;
        T* to = y + rows.distinct[i] * y_stride + first;
        long c = 0;
        for (; c + LANES <= width; c += LANES) store(to + c, load(from + c));
        for (; c < width; c++) put(to + c, from[c]);
    }
}

}  // namespace
}  // namespace lorikeet
