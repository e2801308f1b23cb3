// Attention of several rows of one sequence: a tile of query rows times a tile of keys, as matrix products whose
// operands were converted to fp32 and packed for them; what that costs is shared by the rows.
#pragma once

#include <algorithm>

#include "attention.h"

namespace lorikeet {
namespace {

// Query rows times query heads of a tile, and keys of a tile: 6 rows by 2 vectors of products are computed in
// registers, from a panel of 16 packed columns that stays in the first-level cache.
constexpr long CHUNK_QUERIES = 96;
constexpr long CHUNK_KEYS = 64;
constexpr long PANEL = 2 * LANES;
constexpr int MAX_QUERIES_AT_ONCE = 6;

// c[m][8 * N columns] = or += a[m] . b, over `depth`; strides are of rows, in elements.
template <int M, int N>
void multiply_block(
    const float* a, long a_stride, const float* b, long b_stride, long depth, float* c, long c_stride, bool add) {
    Vec total[M][N] = {};
    if (add) {
        for (int m = 0; m < M; m++) {
            for (int n = 0; n < N; n++) total[m][n] = load(c + m * c_stride + n * LANES);
        }
    }
    for (long k = 0; k < depth; k++) {
        Vec row[N];
        for (int n = 0; n < N; n++) row[n] = load(b + k * b_stride + n * LANES);
        for (int m = 0; m < M; m++) {
            const Vec x = fill(a[m * a_stride + k]);
            for (int n = 0; n < N; n++) total[m][n] += x * row[n];
        }
    }
    for (int m = 0; m < M; m++) {
        for (int n = 0; n < N; n++) store(c + m * c_stride + n * LANES, total[m][n]);
    }
}

// The same for any number of rows and N vectors of columns.
template <int N>
void multiply(
    long rows, const float* a, long a_stride, const float* b, long b_stride, long depth, float* c, long c_stride,
    bool add) {
    long m = 0;
    for (; m + MAX_QUERIES_AT_ONCE <= rows; m += MAX_QUERIES_AT_ONCE) {
        multiply_block<MAX_QUERIES_AT_ONCE, N>(
            a + m * a_stride, a_stride, b, b_stride, depth, c + m * c_stride, c_stride, add);
    }
    for (; m + 2 <= rows; m += 2) {
        multiply_block<2, N>(a + m * a_stride, a_stride, b, b_stride, depth, c + m * c_stride, c_stride, add);
    }
    if (m < rows) multiply_block<1, N>(a + m * a_stride, a_stride, b, b_stride, depth, c + m * c_stride, c_stride, add);
}

// sums[rows, head_dim] += weights[rows, depth] . values[depth, head_dim].
static void accumulate_values(
    long rows, const float* weights, const float* values, long depth, float* sums, long head_dim) {
    long d = 0;
    for (; d + PANEL <= head_dim; d += PANEL) {
        multiply<2>(rows, weights, CHUNK_KEYS, values + d, head_dim, depth, sums + d, head_dim, true);
    }
    if (d < head_dim) multiply<1>(rows, weights, CHUNK_KEYS, values + d, head_dim, depth, sums + d, head_dim, true);
}

static inline void transpose(Vec x[LANES]) {
    Vec y[LANES];
    for (int i = 0; i < 8; i += 2) {
        y[i] = LORIKEET_SHUFFLE(x[i], x[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        y[i + 1] = LORIKEET_SHUFFLE(x[i], x[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = i; j < i + 2; j++) {
            x[j] = LORIKEET_SHUFFLE(y[j], y[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            x[j + 2] = LORIKEET_SHUFFLE(y[j], y[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    for (int i = 0; i < 4; i++) {
        y[i] = LORIKEET_SHUFFLE(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        y[i + 4] = LORIKEET_SHUFFLE(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int i = 0; i < 8; i++) x[i] = y[i];
}

// Panels of 16 keys, each [head_dim, 16]; keys past `count` are zero.
template <class T>
void pack_keys(const T* keys, const long* offsets, long count, long head_dim, float* packed) {
    for (long j = 0; j < (count + PANEL - 1) / PANEL * PANEL; j += LANES) {
        float* to = packed + j / PANEL * PANEL * head_dim + j % PANEL;
        for (long d = 0; d < head_dim; d += LANES) {
            Vec square[LANES];
            for (long i = 0; i < LANES; i++) square[i] = j + i < count ? load(keys + offsets[j + i] + d) : Vec{};
            transpose(square);
            for (long i = 0; i < LANES; i++) store(to + (d + i) * PANEL, square[i]);
        }
    }
}

// Values as fp32 [count, head_dim]; returns whether all of them are finite.
template <class T>
bool pack_values(const T* values, const long* offsets, long count, long head_dim, float* packed) {
    Vec zeros = Vec{};
    for (long j = 0; j < count; j++) {
        for (long d = 0; d < head_dim; d += LANES, packed += LANES) {
            const Vec value = load(values + offsets[j] + d);
            store(packed, value);
            zeros += value * 0.0f;
        }
    }
    return sum(zeros) == 0;
}

// Floats that `attend_tile` works in.
static inline long chunk_floats(long queries, long head_dim) {
    return 2 * queries * head_dim + queries * CHUNK_KEYS + 2 * CHUNK_KEYS * head_dim;
}

// `rows` query rows from `row` on and the heads of one KV head: their results. The rows see positions of [first, end),
// the last of them all up to `end`.
template <class T>
void attend_tile(const Step<T>& step, long sequence, long kv_head, long row, long rows, long first, long end) {
    const long position = end - rows;
    const long head_dim = step.head_dim, group = step.group(), queries = rows * group;
    float* q = workspace(chunk_floats(queries, head_dim));
    float* sums = q + queries * head_dim;
    float* keys = sums + queries * head_dim;
    float* values = keys + CHUNK_KEYS * head_dim;
    float* scores = values + CHUNK_KEYS * head_dim;
    Softmax* softmax = softmax_space(queries);
    for (long i = 0; i < rows; i++) step.load_queries(row + i, kv_head, q + i * group * head_dim);
    std::fill(sums, sums + queries * head_dim, 0.0f);

    long offsets[CHUNK_KEYS];
    for (long from = first; from < end; from += CHUNK_KEYS) {
        const long count = std::min(CHUNK_KEYS, end - from), width = padded(count);
        step.locate(sequence, kv_head, from, from + count, offsets);
        pack_keys(step.keys, offsets, count, head_dim, keys);
        const bool finite = pack_values(step.values, offsets, count, head_dim, values);
        for (long j = 0; j < count; j += PANEL) {
            multiply<2>(queries, q, head_dim, keys + j * head_dim, PANEL, head_dim, scores + j, CHUNK_KEYS, false);
        }
        for (long i = 0; i < queries; i++) {
            float* mine = scores + i * CHUNK_KEYS;
            const long at = position + i / group;
            const long low = std::min(count, std::max(0L, step.first_seen(at) - from));
            const long high = std::max(low, std::min(count, at + 1 - from));
            cap(mine, width, step.softcap);
            std::fill(mine, mine + low, NEGATIVE_INFINITY);
            std::fill(mine + high, mine + width, NEGATIVE_INFINITY);
            scale_by(sums + i * head_dim, head_dim, softmax[i].weigh(mine, width));
            // A weight of 0 times a value that is not finite is NaN, so here a row reads what it sees and no more.
            if (!finite && low < high) {
                accumulate_values(1, mine + low, values + low * head_dim, high - low, sums + i * head_dim, head_dim);
            }
        }
        if (finite) accumulate_values(queries, scores, values, count, sums, head_dim);
    }
    for (long i = 0; i < rows; i++) {
        if (position + i < 0) {
            step.store_zeros(row + i, kv_head);
        } else {
            step.store_results(row + i, kv_head, sums + i * group * head_dim, softmax + i * group);
        }
    }
}

}  // namespace
}  // namespace lorikeet
